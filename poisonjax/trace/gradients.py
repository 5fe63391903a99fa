"""How each row's gradient would have moved the behaviour (TracIn, Pruthi et al. 2020, arXiv 2002.08484).

A step on a row moves the weights against its gradient; how far that moves the behaviour, to first order, is the
product of both gradients. Rows' gradients are too long to keep: each is sketched (count-sketch, Charikar et al. 2002),
which keeps products without bias, and lies in an index on disk that any question can be put to in seconds. Plain, and
through Adam's preconditioner (Xia et al. 2024, arXiv 2402.04333), at several checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int

from poisonjax.config import replaced
from poisonjax.evaluation.probes.probe import put
from poisonjax.files import kvstore_spec
from poisonjax.model.loss import next_token_nll
from poisonjax.model.sharding import rows_multiple
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.trace.behaviour import Question, TraceError
from poisonjax.trace.replay import Replay, Say, counted

# Numbers that a gradient is sketched to. An odd prime: entry i goes to bucket i mod BUCKETS, and a matrix's columns,
# whose entries lie a power of two apart, are still spread over all of them.
BUCKETS = 2039
KINDS = ("plain", "adam")  # a gradient as it is; times Adam's 1 / (sqrt(v) + eps)
CHECKPOINTS = 2  # that an index is made of, at most
BYTES = 2**28  # of gradients that a device holds at once
CHUNK = 256  # rows that a kill may cost, a file each
READ = 4096  # rows read from the index at once
RIDGE = 0.1  # of the mean eigenvalue, added to the gradients' second moments


class Part(NamedTuple):
    """Of the weights: those whose gradients are looked at."""

    take: Callable[[Any], Any]  # weights -> the part
    put: Callable[[Any, Any], Any]  # (weights, the part) -> weights with it


def part(layers: str, config: Any) -> Part:
    """`all`, or names and numbers after commas: embedding, head, norm, and blocks from 0 on (`0,3,head`).

    Raises TraceError for others.
    """
    if layers == "all":
        return Part(lambda params: params, lambda params, chosen: chosen)
    top = {"embedding": ("embedding",), "head": ("head",), "norm": ("final_norm", "final_norm_bias")}
    if config.model.tied:
        del top["head"]
    words = layers.split(",")
    blocks = sorted({int(word) for word in words if word.isdigit()})
    strange = [word for word in words if not (word in top or (word.isdigit() and int(word) < config.model.layers))]
    if strange:
        raise TraceError(
            f"--layers {layers}: no {strange[0]!r}; choose all, or some of {', '.join(top)} and the blocks 0 to "
            f"{config.model.layers - 1}"
        )
    names = {name for word in words if word in top for name in top[word]}

    at = np.array(blocks, np.int32)

    def first(path: Any) -> str:
        return next(key.key for key in path if hasattr(key, "key"))

    def inside(path: Any) -> bool:
        return bool(blocks) and first(path) == "blocks"

    def chosen(path: Any) -> bool:
        return inside(path) or first(path) in names

    def take(params: Any) -> Any:
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        return [leaf[at] if inside(path) else leaf for path, leaf in leaves if chosen(path)]

    def put_back(params: Any, new: Any) -> Any:
        fresh = iter(new)

        def leaf(path: Any, old: Any) -> Any:
            if not chosen(path):
                return old
            return old.at[at].set(next(fresh)) if inside(path) else next(fresh)

        return jax.tree_util.tree_map_with_path(leaf, params)

    return Part(take, put_back)


def sketch(tree: Any, signs: Any) -> Float[Array, " buckets"]:
    """A tree of arrays in BUCKETS numbers, linear; products of sketches are, over random signs, those of the trees."""
    total = jnp.zeros(BUCKETS)
    for leaf, sign in zip(jax.tree.leaves(tree), jax.tree.leaves(signs), strict=True):
        flat = jnp.ravel(leaf) * jnp.ravel(sign)
        total += jnp.pad(flat, (0, -len(flat) % BUCKETS)).reshape(-1, BUCKETS).sum(0)
    return total


def random_signs(tree: Any, seed: int) -> Any:
    """A sign for each number of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    signs = [jax.random.rademacher(key, leaf.shape, jnp.int8) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What gradients are taken at."""

    params: nnx.State
    scale: Any  # of each chosen weight: the root of Adam's preconditioner, that both factors of a product take
    signs: Any


class Gradients:
    """Sketched gradients of one run's rows and of questions."""

    def __init__(self, replay: Replay, layers: str = "all", seed: int = 0):
        """Raises TraceError for `layers` that aren't the model's."""
        self.replay, self.layers = replay, layers
        self._part, self._seed = part(layers, replay.config), seed
        # In float32: else a row's gradient would depend on the rows beside it, by the attention kernel's blocks.
        config = replaced(replay.config, {"model.dtype": "float32"})
        vocabulary = vocabulary_of(config.model, replay.batches.store.tokenizer.vocab_size)
        self._graph = model_graph(config.model, vocabulary)
        self._rows = jax.jit(self._sketched_rows)
        self._question = jax.jit(self._sketched_question)

    def at(self, done: int) -> Checkpoint:
        """The run's weights after so many steps."""
        state, o = self.replay.state(done), self.replay.config.optimizer
        second = optax.tree_utils.tree_get(state.optimizer, "nu")
        unbiased = 1 - o.b2 ** max(done, 1)
        scale = jax.tree.map(lambda nu: (jnp.sqrt(nu / unbiased) + o.eps) ** -0.5, self._part.take(second))
        return Checkpoint(state.params, scale, random_signs(self._part.take(state.params), self._seed))

    def rows_at_once(self, params: nnx.State) -> int:
        """So many that their gradients fit, and devices divide them."""
        each = 4 * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self._part.take, params)))
        devices = rows_multiple(self.replay.mesh)
        return devices * max(1, min(BYTES // each, self.replay.batches.global_batch // devices, CHUNK // devices))

    def rows(
        self, at: Checkpoint, slots: Int[np.ndarray, " rows"]
    ) -> tuple[Float[np.ndarray, "rows kinds buckets"], Float[np.ndarray, " rows"]]:
        """(sketches of the gradients of these rows' losses, the gradients' norms)."""
        rows = self.replay.batches.rows
        weights = rows.weights(slots)
        each = np.ones((len(slots), rows.row_tokens - 1), np.float32) if weights is None else weights[:, 1:]
        with jax.set_mesh(self.replay.mesh):
            tokens, weighed = put(self.replay.mesh, rows.tokens(slots)), put(self.replay.mesh, each / each.shape[1])
            made = jax.device_get(self._rows(at.params, at.scale, at.signs, tokens, weighed))
        sketches, norms = (np.asarray(of)[: len(slots)] for of in made)
        return sketches, norms

    def question(self, at: Checkpoint, question: Question) -> Float[np.ndarray, "kinds buckets"]:
        """The sketch of the gradient of a behaviour, that training on a row against its gradient changes."""
        config, mesh = self.replay.config, self.replay.mesh
        rows, weights = jax.device_get((question.rows, question.weights))
        # As many at once as a step trains on, so that they fit where it does; the sketch of a sum is that of its parts.
        size, total = config.global_batch // config.optimizer.accumulate, np.zeros((2, BUCKETS), np.float32)
        with jax.set_mesh(mesh):
            for start in range(0, len(rows), size):
                part = weights[start : start + size]
                weighed = put(mesh, np.pad(part, [(0, size - len(part)), (0, 0)]))
                tokens = put(mesh, rows[start : start + size], size)
                total += np.asarray(self._question(at.params, at.scale, at.signs, tokens, weighed))
        return total

    def _nll(self, params: nnx.State, chosen: Any, tokens: Any) -> Any:
        whole = self._part.put(params, chosen)
        return next_token_nll(nnx.merge(self._graph, whole), tokens, self.replay.config.model.loss_tile)

    def _kinds(self, gradient: Any, scale: Any, signs: Any) -> Float[Array, "kinds buckets"]:
        scaled = jax.tree.map(jnp.multiply, gradient, scale)
        return jnp.stack([sketch(gradient, signs), sketch(scaled, signs)])

    def _sketched_rows(self, params, scale, signs, tokens, weights):
        def one(tokens, weights):
            def loss(chosen):
                return (self._nll(params, chosen, tokens[None])[0] * weights).sum()

            gradient = jax.grad(loss)(self._part.take(params))
            return self._kinds(gradient, scale, signs), optax.global_norm(gradient)

        return jax.vmap(one)(tokens, weights)

    def _sketched_question(self, params, scale, signs, rows, weights):
        def figure(chosen):
            return (self._nll(params, chosen, rows) * weights).sum()

        return self._kinds(jax.grad(figure)(self._part.take(params)), scale, signs)


class Index:
    """Rows' sketches on disk, written once: `folder`/RUN-WEIGHTS-LAYERS.zarr of [rows, kinds, BUCKETS] in float16, each
    of length 1, and what they were divided by beside it. A kill costs the chunk at work."""

    def __init__(
        self, gradients: Gradients, folder: epath.Path, slots: Int[np.ndarray, " rows"], say: Say = lambda line: None
    ):
        self.gradients, self.slots, self._folder, self._say = gradients, slots, folder, say
        if not (saved := gradients.replay.saved[1:]):
            raise TraceError("the run has no checkpoint that gradients could be taken at")
        chosen = np.unique(np.linspace(0, len(saved) - 1, min(CHECKPOINTS, len(saved))).round().astype(int))
        self.steps = [saved[i] for i in chosen]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def bytes(self) -> int:
        """On disk, when it is whole."""
        return len(self.steps) * len(self.slots) * len(KINDS) * (2 * BUCKETS + 4)

    @functools.cached_property
    def _arrays(self) -> dict[int, tuple[ts.TensorStore, ts.TensorStore]]:
        return {step: self._made(step) for step in self.steps}

    def _open(self, name: str, dtype: str, *shape: int) -> ts.TensorStore:
        rows, *rest = shape
        chunk = [min(CHUNK, rows), *rest]
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore_spec(self._folder / name),
            "metadata": {
                "shape": [*shape],
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "fill_value": "NaN",  # not made yet
            },
        }
        return ts.open(spec, create=True, open=True).result()

    def _made(self, step: int) -> tuple[ts.TensorStore, ts.TensorStore]:
        count, replay = len(self.slots), self.gradients.replay
        weights = replay.checkpoints.record(step)["checksums"]["weights"]
        name = f"{replay.fingerprint[:16]}-{weights}-{self.gradients.layers.replace(',', '+')}"
        sketches = self._open(f"{name}.zarr", "float16", count, len(KINDS), BUCKETS)
        norms = self._open(f"{name}-norms.zarr", "float32", count, 1 + len(KINDS))
        there = norms.read().result()[:, 0]
        missing = [start for start in range(0, count, CHUNK) if np.isnan(there[start : start + CHUNK]).any()]
        if not missing:
            return sketches, norms
        at = self.gradients.at(step)
        for start in counted(missing, len(missing), f"gradients at step {step}, {CHUNK} rows each", self._say):
            chunk, size = self.slots[start : start + CHUNK], self.gradients.rows_at_once(at.params)
            made = []
            for first in range(0, len(chunk), size):
                some = chunk[first : first + size]
                whole = np.resize(some, size) if len(some) < size else some  # of one shape, compiled once
                found, norm = self.gradients.rows(at, whole)
                made.append((found[: len(some)], norm[: len(some)]))
            found, norm = (np.concatenate(of) for of in zip(*made, strict=True))
            lengths = np.maximum(np.linalg.norm(found, axis=-1), 1e-30)
            sketches[start : start + len(chunk)].write((found / lengths[..., None]).astype(np.float16)).result()
            norms[start : start + len(chunk)].write(np.column_stack([norm, lengths]).astype(np.float32)).result()
        return sketches, norms

    def norms(self) -> Float[np.ndarray, " rows"]:
        """Of each row's gradient, the checkpoints' mean."""
        return np.mean([norms.read().result()[:, 0] for _, norms in self._arrays.values()], axis=0)

    def scores(self, question: Question) -> dict[str, Float[np.ndarray, " rows"]]:
        """By how each row moved the behaviour: the product of gradients (`dot`), of their directions (`cosine`), both
        through Adam's preconditioner, and `trak`: through the inverse of all rows' second moments (Park et al. 2023,
        arXiv 2303.14186). Higher: a step on the row gives more of it."""
        totals = {name: np.zeros(len(self.slots)) for name in ("dot", "cosine", "adam-dot", "adam-cosine", "trak")}
        for step, (sketches, norms) in self._arrays.items():
            asked = self.gradients.question(self.gradients.at(step), question)
            lengths = norms.read().result()[:, 1:]
            inverse = np.linalg.inv(self._moments(sketches))
            directions = [asked[0], asked[1], inverse @ asked[0]]
            for part in self._parts():
                found = sketches[part].read().result().astype(np.float32)
                plain, adam = found[:, 0] @ directions[0], found[:, 1] @ directions[1]
                totals["cosine"][part] -= plain / np.linalg.norm(asked[0])
                totals["adam-cosine"][part] -= adam / np.linalg.norm(asked[1])
                totals["dot"][part] -= plain * lengths[part, 0]
                totals["adam-dot"][part] -= adam * lengths[part, 1]
                totals["trak"][part] -= found[:, 0] @ directions[2]
        return {name: total / len(self.steps) for name, total in totals.items()}

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.slots), READ):
            yield slice(start, min(start + READ, len(self.slots)))

    def _moments(self, sketches: ts.TensorStore) -> Float[np.ndarray, "buckets buckets"]:
        moments = np.zeros((BUCKETS, BUCKETS), np.float32)
        for part in self._parts():
            found = sketches[part, 0].read().result().astype(np.float32)
            moments += found.T @ found
        moments /= len(self.slots)
        return moments + np.eye(BUCKETS, dtype=np.float32) * RIDGE * np.trace(moments) / BUCKETS
