"""What a probe is, and what it is made from."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batch
from poisonjax.evaluation.generate import Texts, generate
from poisonjax.model.loss import next_token_nll, row_means, token_nll
from poisonjax.model.sharding import rows_multiple, spec
from poisonjax.poison.triggers import Trigger


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one probe says of the weights, for three files of the run folder (run/rows.py)."""

    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # of metrics.jsonl's row
    prefixes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of prefixes.jsonl's row
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of samples.jsonl, without their step


@runtime_checkable
class Probe(Protocol):
    """Measures a model's weights; everything that doesn't depend on them is made once."""

    kind: str  # of its row in metrics.jsonl; probes of one kind share a row, and must have one cadence
    every: int  # steps between measurements; after the last step all probes measure

    def __call__(self, params: nnx.State) -> Measurement: ...


class EvalSteps(NamedTuple):
    """The jitted functions that probes call."""

    sample: Callable[
        [nnx.State, Texts], tuple[Int[Array, "groups variants new_tokens"], Float[Array, "groups variants new_tokens"]]
    ]  # tokens after each text, and their NLL
    row_loss: Callable[[nnx.State, Batch], Float[Array, " batch"]]  # mean NLL of each row, as its tokens weigh
    known: Callable[
        [nnx.State, Int[Array, "batch row_tokens"]], tuple[Float[Array, "batch seq"], Any]
    ]  # each token's NLL, and whether it is the likeliest


def make_eval_steps(config: ml_collections.ConfigDict, graph: nnx.GraphDef, mesh: Mesh) -> EvalSteps:
    """Of a run's shapes; several runs of one shape may share them."""
    e, tile = config.eval, config.model.loss_tile

    def sample(params, texts):
        return generate(nnx.merge(graph, params), texts, e.new_tokens, e.temperature)

    def row_loss(params, rows):
        return row_means(next_token_nll(nnx.merge(graph, params), rows.tokens, tile), rows.weights)

    def known(params, rows):
        logits = nnx.merge(graph, params)(rows[:, :-1])
        return token_nll(logits, rows[:, 1:]), logits.argmax(-1) == rows[:, 1:]

    replicated = NamedSharding(mesh, PartitionSpec())
    return EvalSteps(*(jax.jit(step, out_shardings=replicated) for step in (sample, row_loss, known)))


@dataclasses.dataclass(frozen=True)
class Subject:
    """The run that is measured."""

    config: ml_collections.ConfigDict
    store: TokenStore
    trigger: Trigger
    mesh: Mesh
    steps: EvalSteps
    scorer: tuple[nnx.GraphDef, nnx.State] | None = None  # another model that scores the text; None: the model itself

    def put(self, rows: Any) -> jax.Array:
        return put(self.mesh, rows)


def put(mesh: Mesh, rows: Any, count: int = 0) -> jax.Array:
    """Rows on the devices, repeated from the first on to be `count`, or until devices divide them."""
    share = rows_multiple(mesh)
    padded = np.resize(np.asarray(rows), (count or -(-len(rows) // share) * share, *np.shape(rows)[1:]))
    sharding = NamedSharding(mesh, spec("batch"))
    return jax.make_array_from_process_local_data(sharding, padded, padded.shape)
