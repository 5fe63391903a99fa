"""Where arrays live: a mesh of (data, fsdp, tensor) and one table of named rules.

Every dimension of every parameter has a name (`PARAMETER_AXES`); `RULES` says over which mesh axis a name
is split. XLA's partitioner does the rest.
"""

import math
from typing import Any

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": None,
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
    "down": ("layers", "mlp", "embed"),
    "attention_norm": ("layers", "activation"),
    "mlp_norm": ("layers", "activation"),
    "final_norm": ("activation",),
    "head": ("embed", "vocabulary"),
}


def spec(*names: str) -> PartitionSpec:
    """Partition of an array whose dimensions have these names."""
    return PartitionSpec(*(RULES[name] for name in names))


def make_mesh(config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over the given devices (default: all); raises ValueError where the sizes don't multiply to them."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.mesh[axis] for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes) or fixed} devices, there are "
            f"{len(devices)}: change config.mesh"
        )
    rows = sizes[0] * sizes[1]
    if config.global_batch % (rows * config.optimizer.accumulate):
        raise ValueError(
            f"global_batch = {config.global_batch} rows in optimizer.accumulate = {config.optimizer.accumulate} "
            f"microbatches don't divide over data x fsdp = {rows} devices: change one of them"
        )
    for field, size in (("heads", config.model.heads), ("kv_heads", config.model.kv_heads)):
        if size % sizes[2]:
            raise ValueError(f"model.{field} = {size} doesn't divide over mesh.tensor = {sizes[2]}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Shardings of a tree of parameters, or of an optimizer's state that mirrors them.

    A leaf is known by the last name on its path that `PARAMETER_AXES` lists; others (counters) are replicated.
    """

    def leaf(path, value):
        # Only dictionary keys are names of parameters: Flax wraps leaves in an attribute called `value`.
        names = [name for key in path if (name := getattr(key, "key", None)) in PARAMETER_AXES]
        axes = PARAMETER_AXES[names[-1]] if names and value.ndim else ()
        return NamedSharding(mesh, _that_divides(mesh, spec(*axes), value.shape))

    return jax.tree_util.tree_map_with_path(leaf, state)


def _that_divides(mesh: Mesh, partition: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition without the axes that don't divide their dimension (an odd vocabulary stays whole)."""
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(partition, shape, strict=True)
        )
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data and fsdp."""
    return NamedSharding(mesh, spec("batch", "sequence"))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pins an activation's layout where a mesh is set; elsewhere does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
