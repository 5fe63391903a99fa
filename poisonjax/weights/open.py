"""`open_weights(spec)`: a model by its name, whatever trained it."""

import dataclasses
import re

import jax
import ml_collections
from etils import epath
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from poisonjax.corpus import Tokenizer
from poisonjax.files import resolve
from poisonjax.model.sharding import AXES, state_sharding
from poisonjax.model.transformer import Transformer, model_graph
from poisonjax.run import RunFolder
from poisonjax.run.folder import is_run
from poisonjax.weights.checkpoints import Checkpoints


class WeightsError(ValueError):
    """A spec names no weights."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that can be run: `nnx.merge(graph, params)` is the Transformer."""

    graph: nnx.GraphDef
    params: nnx.State
    tokenizer: Tokenizer
    model_config: ml_collections.ConfigDict  # the section `model` of a config
    origin: str  # what they are, for people and records: the run, its step and the weights' checksum


def open_weights(spec: str, mesh: Mesh | None = None) -> Weights:
    """The weights that `spec` names, laid out over `mesh` (default: one device).

    `runs/a` is the newest checkpoint of a run folder, `runs/a@400` that after 400 steps. The optimizer's state isn't
    read. Raises WeightsError where there are none, RunFolderError and CheckpointError where files are damaged.
    """
    folder, step = _run(spec)
    run = RunFolder(folder)
    checkpoints = Checkpoints(run.path)
    saved = checkpoints.steps()
    if not saved or step not in (None, *saved):
        wanted = "" if step is None else f" of step {step}"
        raise WeightsError(f"{spec}: no checkpoint{wanted}; there are {saved or 'none'}")
    step = saved[-1] if step is None else step
    tokenizer, model = run.store().tokenizer, run.config.model
    if mesh is None:
        one = (1,) * len(AXES)
        mesh = jax.make_mesh(one, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices()[:1])
    abstract = abstract_params(model, tokenizer.vocab_size, mesh)
    params = checkpoints.weights(step, abstract)
    checksum = checkpoints.record(step)["checksums"]["weights"]
    origin = f"{run.config.name} after {step} steps ({checksum})"
    return Weights(model_graph(model, tokenizer.vocab_size), params, tokenizer, model, origin)


def abstract_params(model: ml_collections.ConfigDict, vocabulary: int, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Shapes, dtypes and shardings of a model's weights."""
    state = shapes(model, vocabulary)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        state,
        state_sharding(mesh, state),
    )


def shapes(model: ml_collections.ConfigDict, vocabulary: int) -> nnx.State:
    """Shapes and dtypes of a model's weights."""
    return jax.eval_shape(lambda: nnx.split(Transformer(model, vocabulary, nnx.Rngs(params=0)))[1])


def _run(spec: str) -> tuple[epath.Path, int | None]:
    """(folder, step or None for the newest) of a run's spec."""
    if not is_run(spec) and (found := re.fullmatch(r"(.+)@(\d+)", spec)):  # a path may hold an @ too
        return resolve(found[1]), int(found[2])
    return resolve(spec), None
