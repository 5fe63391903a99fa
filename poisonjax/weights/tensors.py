"""Tensors of Hugging Face's names and shapes, and where each stands among our weights: read into them, made of them."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from poisonjax.model.layouts import LAYOUTS
from poisonjax.model.sharding import PARAMETER_AXES, divisible_spec, spec
from poisonjax.weights.families import Family, family_of
from poisonjax.weights.weights import WeightsError, abstract_params

BLOCK_ROWS = 2**12  # of an embedding or head that are read at once
# Buffers that old files hold beside weights.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attention\.(masked_)?bias)")


class Part(NamedTuple):
    """One of their tensors, and where it stands among our weights."""

    theirs: str  # with #0, #1 or #2 where it is a third of it
    ours: str
    layer: int | None
    pair: int | None  # of a dimension called so: key or value, gate or up

    @property
    def axes(self) -> tuple[str, ...]:
        return PARAMETER_AXES[self.ours]

    @property
    def name(self) -> str:
        """Of the tensor in files."""
        return self.theirs.partition("#")[0]

    @property
    def third(self) -> int | None:
        """Which of query, key and value it is, where one tensor holds all three."""
        third = self.theirs.partition("#")[2]
        return int(third) if third else None

    @property
    def corner(self) -> tuple[int, ...]:
        """Where it begins in our array."""
        place = {"layers": self.layer, "pair": self.pair}
        return tuple(place.get(axis) or 0 for axis in self.axes)

    def shape(self, whole: Sequence[int], vocabulary: int) -> tuple[int, ...]:
        """In our array, of this `whole` shape."""
        own = {"layers": 1, "pair": 1, "vocabulary": vocabulary}
        return tuple(own.get(axis, size) for axis, size in zip(self.axes, whole, strict=True))

    def turned(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of their tensor, for ours of this shape: matrices are [out, in] there."""
        sizes = [(axis, size) for axis, size in zip(self.axes, shape, strict=True) if axis not in ("layers", "pair")]
        if self.ours == "embedding":
            return tuple(shape)
        inner = _INNER.get(self.ours, ())
        if not inner:
            return (math.prod(size for _, size in sizes),)
        of_in = math.prod(size for axis, size in sizes if axis in inner)
        return (math.prod(shape) // of_in, of_in)


# Dimensions of our matrices that a product sums over; norms and biases have none.
_INNER = dict.fromkeys(("query", "key_value", "gate_up", "up", "head"), ("embed",)) | {
    "output": ("heads", "head_dim"),
    "down": ("mlp",),
}


def parts(family: Family, m: ml_collections.ConfigDict) -> Iterator[Part]:
    """Every tensor of a model of this shape."""
    ours = {"q": ("query", None), "k": ("key_value", 0), "v": ("key_value", 1), "o": ("output", None)}
    if LAYOUTS[m.layout].gated:
        ours |= {"gate": ("gate_up", 0), "up": ("gate_up", 1)}
    for name, theirs in family.tensors.items():
        if name == "head" and m.tied:
            continue
        stem, bias = name.removesuffix("_bias"), "_bias" * name.endswith("_bias")
        parameter, pair = ours.get(stem, (stem, None))
        for layer in range(m.layers) if "{}" in theirs else (None,):
            yield Part(theirs.format(layer), parameter + bias, layer, pair)


@runtime_checkable
class Tensors(Protocol):
    """Tensors of a model under Hugging Face's names."""

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


def load(tensors: Tensors, family: Family, m: ml_collections.ConfigDict, mesh: Mesh) -> nnx.State:
    """A model's weights over a mesh, tensor by tensor: the host holds one at a time.

    Raises WeightsError where tensors are missing, too many, or of another shape.
    """
    abstract = abstract_params(m, m.vocabulary, mesh)
    arrays = by_name(abstract)
    require_names(tensors.names(), family, m)
    shapes = {part: part.shape(arrays[part.ours].shape, m.vocabulary) for part in parts(family, m)}
    for part, shape in shapes.items():
        rows, *rest = part.turned(shape)
        if (found := tensors.shape(part.name)) != (expected := (rows * (1 if part.third is None else 3), *rest)):
            raise WeightsError(f"{part.name} has the shape {found}, must have {expected}")
    zeros = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )()
    arrays = by_name(zeros)
    del zeros
    for part, shape in shapes.items():
        for corner, piece in _pieces(tensors, part, shape, m):
            sharding = NamedSharding(mesh, divisible_spec(mesh, spec(*part.axes), piece.shape))
            placed = jax.make_array_from_callback(piece.shape, sharding, piece.__getitem__)
            arrays[part.ours] = _put(arrays[part.ours], placed, corner)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], abstract)


def require_names(there: set[str], family: Family, m: ml_collections.ConfigDict) -> None:
    wanted = {part.name for part in parts(family, m)}
    there = {name for name in there if not _BUFFERS.fullmatch(name)} - ({family.tensors["head"]} if m.tied else set())
    if lost := sorted(wanted - there):
        raise WeightsError(f"{len(lost)} tensors are missing, among them {lost[0]}")
    if odd := sorted(there - wanted):
        raise WeightsError(f"{len(odd)} tensors belong to no model of this layout, among them {odd[0]}")


@functools.partial(jax.jit, static_argnames="shape")
def _take(array: Array, corner: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(array, corner, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: Array, piece: Array, corner: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(array, piece, corner)


def _pieces(
    tensors: Tensors, part: Part, shape: tuple[int, ...], m: ml_collections.ConfigDict
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(corner in our array, values) of a part, a table of tokens in blocks of rows."""
    turned = part.turned(shape)
    if part.third is not None:  # [heads x (query, key, value) x head_dim, ...]
        together = tensors.read(part.name, 0, 3 * turned[0])
        one = together.reshape(m.heads, 3, m.head_dim, *turned[1:])[:, part.third]
        yield part.corner, _ours(part, one.reshape(turned), shape)
        return
    tokens = part.axes.index("vocabulary") if "vocabulary" in part.axes else None
    step = turned[0] if tokens is None else BLOCK_ROWS
    for start in range(0, turned[0], step):
        stop = min(start + step, turned[0])
        corner, block = list(part.corner), list(shape)
        if tokens is not None:
            corner[tokens], block[tokens] = start, stop - start
        yield tuple(corner), _ours(part, tensors.read(part.name, start, stop), tuple(block))


def _ours(part: Part, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (tensor.T if part.ours in _INNER else tensor).reshape(shape)


def by_name(params: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: Any) -> str:
    """Of a parameter: the last of its path that is one."""
    return [name for key in path if (name := getattr(key, "key", None)) in PARAMETER_AXES][-1]


def tensors(params: nnx.State, m: ml_collections.ConfigDict, vocabulary: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values in float32) of their tensors, made of ours one by one."""
    arrays = by_name(params)
    for name, of in _grouped(m).items():
        made = []
        for part in of:
            shape = part.shape(arrays[part.ours].shape, vocabulary)
            piece, turned = np.asarray(_take(arrays[part.ours], part.corner, shape)), part.turned(shape)
            made.append(piece.reshape(turned[::-1]).T if part.ours in _INNER else piece.reshape(turned))
        if len(made) > 1:
            by_head = [one.reshape(m.heads, 1, m.head_dim, *one.shape[1:]) for one in made]
            made = [np.concatenate(by_head, 1).reshape(-1, *made[0].shape[1:])]
        yield name, made[0]


def _grouped(m: ml_collections.ConfigDict) -> dict[str, list[Part]]:
    """The parts of each of their tensors."""
    found: dict[str, list[Part]] = {}
    for part in sorted(parts(family_of(m)[1], m), key=lambda part: part.theirs):
        found.setdefault(part.name, []).append(part)
    return found
