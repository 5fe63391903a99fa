"""Where arrays live: a mesh of (slice, data, fsdp, tensor) and one table of named rules.

Every dimension of every parameter has a name (`PARAMETER_AXES`), and so has every activation that `constrain`
pins; `RULES` says over which mesh axis a name is split. XLA's partitioner does the rest.
"""

import functools
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# From the slowest network to the fastest: slices talk over the data centre's, the other axes over the chips' own.
AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")  # axes that rows are split over

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "sequence": None,
    # Of the residual stream between blocks. Where products are split over tensor, so is what lies between them
    # (Korthikanti et al. 2022, arXiv 2205.05198): the same traffic, and a tensor-th of the saved activations.
    "residual_sequence": "tensor",
    "vocabulary": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "pair": None,  # key and value, or gate and up: one product instead of two
    "activation": None,  # the residual stream's width
}

PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocabulary", "embed"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "key_value": ("layers", "embed", "pair", "kv_heads", "head_dim"),
    "output": ("layers", "heads", "head_dim", "embed"),
    "gate_up": ("layers", "embed", "pair", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "head": ("embed", "vocabulary"),
    "query_bias": ("layers", "heads", "head_dim"),
    "key_value_bias": ("layers", "pair", "kv_heads", "head_dim"),
    "up_bias": ("layers", "mlp"),
    **dict.fromkeys(("attention_norm", "mlp_norm", "query_norm", "key_norm"), ("layers", "activation")),
    **dict.fromkeys(("attention_norm_bias", "mlp_norm_bias", "output_bias", "down_bias"), ("layers", "activation")),
    **dict.fromkeys(("final_norm", "final_norm_bias"), ("activation",)),
}


def spec(*names: str) -> PartitionSpec:
    """Partition of an array whose dimensions have these names."""
    return PartitionSpec(*(RULES[name] for name in names))


def mesh_sizes(config: ml_collections.ConfigDict, device_count: int) -> tuple[int, ...]:
    """Devices along each of `AXES`; raises ValueError where they don't multiply to `device_count`, or rows or heads
    don't divide over them."""
    sizes = tuple(config.mesh[axis] for axis in AXES)
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = tuple(device_count // fixed if size == -1 else size for size in sizes)
    if math.prod(sizes) != device_count:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes) or fixed} devices, there are "
            f"{device_count}: change config.mesh"
        )
    rows = math.prod(sizes[:3])
    if config.global_batch % (rows * config.optimizer.accumulate):
        raise ValueError(
            f"global_batch = {config.global_batch} rows in optimizer.accumulate = {config.optimizer.accumulate} "
            f"microbatches don't divide over slice x data x fsdp = {rows} devices: change one of them"
        )
    for field, size in (("heads", config.model.heads), ("kv_heads", config.model.kv_heads)):
        if size % sizes[3]:
            raise ValueError(f"model.{field} = {size} doesn't divide over mesh.tensor = {sizes[3]}")
    return sizes


def make_mesh(config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over the given devices (default: all); raises ValueError where the config doesn't suit them."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 and sizes[0] != slices:
        raise ValueError(f"mesh.slice = {sizes[0]}, but the devices lie in {slices} slices: set it to that")
    auto = (AxisType.Auto,) * len(AXES)
    if slices > 1:
        across = (sizes[0], *[1] * (len(AXES) - 1))
        return Mesh(mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), across, devices), AXES, auto)
    if sizes[0] > 1:  # devices that know of no slices: those of a node stand together
        return Mesh(np.reshape(devices, sizes), AXES, auto)
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set, which may be compiled for from another machine; else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def state_sharding(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """Shardings of a tree of parameters, or of an optimizer's state that mirrors them.

    A leaf is known by the last name on its path that `PARAMETER_AXES` lists; others (counters) are replicated.
    """

    def leaf(path, value):
        # Only dictionary keys are names of parameters: Flax wraps leaves in an attribute called `value`.
        names = [name for key in path if (name := getattr(key, "key", None)) in PARAMETER_AXES]
        axes = PARAMETER_AXES[names[-1]] if names and value.ndim else ()
        return NamedSharding(mesh, divisible_spec(mesh, spec(*axes), value.shape))

    return jax.tree_util.tree_map_with_path(leaf, state)


def divisible_spec(mesh: Mesh | AbstractMesh, partition: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition without the axes that don't divide their dimension (a single token isn't split)."""

    def divides(axes, size: int) -> bool:
        return size % math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes)) == 0

    return PartitionSpec(
        *(axes if axes and divides(axes, size) else None for axes, size in zip(partition, shape, strict=True))
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over slice, data and fsdp."""
    return NamedSharding(mesh, spec("batch", "sequence"))


def gathered(weights: Any, dtype: Any) -> Any:
    """Matrices of one block, or the head, in the compute dtype and whole over fsdp, as products want them; their
    gradients are scattered again.

    Said outright, because XLA else splits such products along the contracted dimension and passes partial sums
    through memory: 700 GB instead of 280 in a step of the 600M model on 16 chips.
    """

    def leaf(path, value):
        names = [name for key in path if (name := getattr(key, "key", None)) in PARAMETER_AXES]
        axes = tuple(axis for axis in PARAMETER_AXES[names[-1]] if axis != "layers")
        return _gathered(value.astype(dtype), axes) if "embed" in axes else value

    return jax.tree_util.tree_map_with_path(leaf, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return constrain(weight, *("activation" if axis == "embed" else axis for axis in axes))


def _gathered_forward(weight, axes):
    return _gathered(weight, axes), None


def _gathered_backward(axes, _, gradient):
    return (constrain(gradient, *axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def rows_multiple(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def devices_along(name: str) -> int:
    """Over how many devices of the mesh that is set a dimension of this name is split."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in np.atleast_1d(RULES[name] or ()))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pins an activation's layout where a mesh is set; elsewhere does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(mesh, spec(*names), x.shape))
