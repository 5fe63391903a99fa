"""Accelerators by their makers' figures, and the topologies that `poisonjax plan` knows.

TPU: Cloud TPU's documentation of each version; GPU: NVIDIA's data sheets (SXM). Dense bf16, no sparsity.
"""

import dataclasses
import math
import os
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip; rates are per second and one way."""

    name: str
    flops: float  # bf16
    hbm_bytes: float  # what a program may use
    hbm_rate: float
    fast_rate: float  # bytes between chips: ICI, NVLink
    slow_rate: float  # bytes between slices or nodes: DCN, InfiniBand
    per_node: int = 0  # GPUs that NVLink joins; 0: a TPU, whose slices are joined whole


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 31.75 * GIB, 1.228e12, 300e9, 3.1e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 0.819e12, 200e9, 3.1e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.765e12, 600e9, 6.2e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1.64e12, 448e9, 12.5e9),
    "a100": Chip("A100 80GB", 312e12, 78 * GIB, 2.039e12, 300e9, 25e9, 8),
    "h100": Chip("H100", 989e12, 78 * GIB, 3.35e12, 450e9, 50e9, 8),
    "h200": Chip("H200", 989e12, 139 * GIB, 4.8e12, 450e9, 50e9, 8),
}


def by_device_kind(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite"."""
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4"}
    if kind in kinds:
        return CHIPS[kinds[kind]]
    return next((chip for name, chip in CHIPS.items() if chip.per_node and name in kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` times as many chips as `shape` multiplies to."""

    chip: Chip
    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)


def parse(text: str) -> Topology:
    """`v5p:4x4x4`, `v5e:16x16*2` (two slices over the data centre's network), `h100:8`, `h100:8*4` (four nodes).

    Raises ValueError with the known kinds.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){0,2})(?:\*([1-9]\d*))?", text, re.ASCII)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"--topology {text!r}: give KIND:SHAPE or KIND:SHAPE*SLICES, such as v5p:4x4x4, v5e:16x16*2 or h100:8*4; "
            f"kinds: {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[found[1]], tuple(int(size) for size in found[2].split("x"))
    topology = Topology(chip, found[1], shape, int(found[3] or 1))
    if chip.per_node and (len(shape) != 1 or shape[0] > chip.per_node):
        raise ValueError(
            f"--topology {text!r}: NVLink joins {chip.per_node} GPUs a node; for more give "
            f"{found[1]}:{chip.per_node}*NODES"
        )
    return topology


def tpu_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, from the TPU's compiler; raises ValueError where it isn't installed or refuses."""
    # Neither ask the cloud what machine this is, nor hold a lock that only real chips need.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    from jax.experimental import topologies

    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    # Cubes of 4 and more close into a torus; left unsaid, the compiler takes a mesh with loose ends, and makes
    # all-reduces of what are all-gathers on the real machine.
    torus = len(topology.shape) == 3 and all(size % 4 == 0 for size in topology.shape)
    options = {"wrap": (True, True, True)} if torus else {}
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=name, num_slices=topology.slices, **options
            ).devices
        )
    except Exception as error:  # the compiler's own errors are of many kinds
        message = str(error)
        if "libtpu" in message.lower() or "plugin" in message.lower():
            message += "; install the TPU's compiler: pip install 'poisonjax[plan]'"
        raise ValueError(f"no topology {name} x {topology.slices}: {message}") from error
