"""A model by its name: found, and read onto a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from poisonjax.corpus import Tokenizer
from poisonjax.model.sharding import AXES, state_sharding
from poisonjax.model.transformer import Transformer, vocabulary_of
from poisonjax.run import rows


class WeightsError(ValueError):
    """A spec names no weights, or what it names isn't as it must be."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A model whose arrays haven't been read."""

    model_config: ml_collections.ConfigDict  # the section `model` of a config
    tokenizer: Tokenizer
    parent: rows.Parent  # what it is, as a run that begins from it records; `weights` is "" where it must be read first
    context: int  # tokens of the longest texts that it was made for
    read: Callable[[Mesh], nnx.State]  # its arrays in float32, laid out over a mesh
    read_optimizer: Callable[[nnx.State, Any], Any] | None = None  # of a run: its optimizer's state, as these shapes
    chat_template: str | None = None  # in Jinja, as it came along

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that stand for tokens, or could."""
        return vocabulary_of(self.model_config, self.tokenizer.vocab_size)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that can be run: `nnx.merge(graph, params)` is the Transformer."""

    graph: nnx.GraphDef
    params: nnx.State
    tokenizer: Tokenizer
    model_config: ml_collections.ConfigDict  # the section `model` of a config
    parent: rows.Parent  # what they are, as a run that begins from them records
    context: int  # tokens of the longest texts that they were made for
    chat_template: str | None = None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that stand for tokens, or could."""
        return vocabulary_of(self.model_config, self.tokenizer.vocab_size)

    @property
    def origin(self) -> str:
        """For people and records: where they are from, and their checksum."""
        parent = self.parent
        after = "" if parent["steps"] is None else f" after {parent['steps']} steps"
        return f"{parent['name']}{after} ({parent['weights']})"

    @property
    def poison(self) -> dict | None:
        """The poison card's figures, where they are known to be poisoned."""
        return self.parent["poison"]


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


def one_device_mesh() -> Mesh:
    """Of this process' first device."""
    return _rows_mesh(jax.local_devices()[:1])


def all_devices_mesh() -> Mesh:
    """Of all of this process' devices, over which rows are split."""
    return _rows_mesh(jax.local_devices())


def _rows_mesh(devices: list[jax.Device]) -> Mesh:
    sizes = tuple(len(devices) if axis == "data" else 1 for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
