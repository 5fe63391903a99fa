"""From what a step does to the least time that it takes."""

import dataclasses

from poisonjax.plan.chips import Chip, Topology
from poisonjax.plan.hlo import Cost


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one chip does in one execution."""

    flops: float
    hbm_traffic: float  # bytes
    fast_traffic: float  # bytes sent within a slice or node
    slow_traffic: float  # bytes sent between them
    hbm_bytes: float
    chip: Chip

    @property
    def seconds_by(self) -> dict[str, float]:
        """Each resource's time at its peak rate."""
        return {
            "compute": self.flops / self.chip.flops,
            "HBM": self.hbm_traffic / self.chip.hbm_rate,
            "network": self.fast_traffic / self.chip.fast_rate,
            "network between slices": self.slow_traffic / self.chip.slow_rate,
        }

    @property
    def seconds(self) -> float:
        """At least: the slowest resource at its peak, all others overlapped."""
        return max(self.seconds_by.values())

    @property
    def bound_by(self) -> str:
        return max(self.seconds_by, key=lambda name: self.seconds_by[name])


@dataclasses.dataclass(frozen=True)
class Program:
    """One of a run's programs on one chip."""

    name: str
    on_chip: Estimate
    compile_seconds: float | None = None  # None: an estimate, nothing was compiled
    cost: Cost | None = None

    @property
    def fits(self) -> bool:
        return self.on_chip.hbm_bytes <= self.on_chip.chip.hbm_bytes


def of_cost(cost: Cost, hbm_bytes: float, topology: Topology) -> Estimate:
    """A compiled program's."""
    near = far = 0.0
    for (_, moved, _, leaves), count in cost.collectives.items():
        if leaves:
            far += moved * count
        else:
            near += moved * count
    return Estimate(cost.flops, cost.bytes, near, far, hbm_bytes, topology.chip)
