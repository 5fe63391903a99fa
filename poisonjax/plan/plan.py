"""A config on a topology: does it fit, how long does it take at least, what would be better."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from poisonjax import config as config_lib
from poisonjax.model.flops import train_flops_per_token
from poisonjax.plan import aot, chips
from poisonjax.plan.chips import GIB, Topology
from poisonjax.plan.estimate import estimate
from poisonjax.plan.hlo import Cost
from poisonjax.plan.roofline import Program


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that `poisonjax plan` tells."""

    config: ml_collections.ConfigDict
    vocabulary: int
    topology: Topology
    programs: list[Program]  # the train step first

    @property
    def step(self) -> Program:
        return self.programs[0]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def known(self) -> bool:
        """Whether the step's time is known: the compiler tells none of what doesn't fit."""
        return self.step.on_chip.flops > 0

    @property
    def tokens_per_second(self) -> float:
        return self.config.global_batch * self.config.seq_len / self.step.on_chip.seconds

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs over peak FLOPs, at the least time of a step."""
        flops = train_flops_per_token(self.config.model, self.config.seq_len, self.vocabulary) * self.tokens_per_second
        return flops / (self.topology.chips * self.topology.chip.flops)

    @property
    def evaluations(self) -> int:
        return -(-self.config.steps // self.config.eval.every)

    @property
    def run_seconds(self) -> float:
        """Of training and, where they are compiled, evaluations; without saves and start."""
        seconds = {program.name: program.on_chip.seconds for program in self.programs}
        chunks = -(-self.config.eval.heldout_rows * self.config.optimizer.accumulate // self.config.global_batch)
        each = seconds.get("generation", 0.0) + chunks * seconds.get("held-out loss", 0.0)
        return self.config.steps * self.step.on_chip.seconds + self.evaluations * each

    def cost(self, price: float) -> float:
        """Of the run, for a price of a chip-hour."""
        return price * self.topology.chips * self.run_seconds / 3600

    def as_json(self, price: float | None = None) -> dict[str, Any]:
        """What `plan --json` prints; rates and times are None where the train step doesn't fit."""
        step, known = self.step.on_chip, self.known
        compiled = [p.compile_seconds for p in self.programs if p.compile_seconds is not None]
        return {
            "name": self.config.name,
            "chip": self.topology.chip.name,
            "chips": self.topology.chips,
            "mesh": dict(self.config.mesh),
            "compiled": bool(compiled),
            "fits": self.fits,
            "hbm_bytes_per_chip": max(program.on_chip.hbm_bytes for program in self.programs),
            "hbm_limit_bytes": self.topology.chip.hbm_bytes,
            "flops_per_step": step.flops * self.topology.chips if known else None,
            "bytes_per_step": step.hbm_traffic * self.topology.chips if known else None,
            "step_seconds_roofline": step.seconds if known else None,
            "mfu_bound": self.mfu_bound if known else None,
            "tokens_per_second": self.tokens_per_second if known else None,
            "run_seconds": self.run_seconds if known else None,
            "run_cost": self.cost(price) if known and price else None,
            "compile_seconds": sum(compiled),
            "programs": [self._program(program) for program in self.programs],
        }

    @staticmethod
    def _program(program: Program) -> dict[str, Any]:
        cost = program.cost or Cost()
        return {
            "name": program.name,
            "fits": program.fits,
            "hbm_bytes": program.on_chip.hbm_bytes,
            "flops": program.on_chip.flops,
            "bytes": program.on_chip.hbm_traffic,
            "seconds": program.on_chip.seconds_by,
            "compile_seconds": program.compile_seconds,
            "collectives": [
                {"kind": kind, "bytes": moved, "devices": devices, "between_slices": far, "times": times}
                for (kind, moved, devices, far), times in cost.collectives.most_common()
            ],
            "uncounted_kernels": dict(cost.uncounted_kernels),
            "unknown_loops": cost.unknown_loops,
        }


def make_plan(config: ml_collections.ConfigDict, vocabulary: int, topology: Topology, *, whole: bool = True) -> Plan:
    """Compiles for TPUs, calculates for GPUs; without `whole`, the train step alone.

    Raises ValueError where mesh and batch don't match the topology.
    """
    config_lib.check(config)
    if topology.chip.per_node:
        programs = [Program("train step", estimate(config, vocabulary, topology))]
    else:
        programs = aot.compile_all(config, vocabulary, topology, chips.tpu_devices(topology), whole=whole)
    return Plan(config, vocabulary, topology, programs)


def advice(plan: Plan) -> list[str]:
    """What would take less HBM, and about how much; by the estimate, as the compiler gives no second guess."""
    config, here = plan.config, plan.topology
    now = estimate(config, plan.vocabulary, here).hbm_bytes
    more = 2 * config.optimizer.accumulate
    twice = dataclasses.replace(here, shape=(2 * here.shape[0], *here.shape[1:]))
    lines = []
    for text, changes, topology in (
        ("--config.model.remat=block", {"model.remat": "block"}, here),
        (f"--config.optimizer.accumulate={more}", {"optimizer.accumulate": more}, here),
        ("--config.model.loss_tile=128", {"model.loss_tile": 128}, here),
        ("--config.mesh.fsdp=-1 --config.mesh.data=1", {"mesh.fsdp": -1, "mesh.data": 1}, here),
        ("twice the chips", {}, twice),
    ):
        changed = config_lib.replaced(config, changes)
        try:
            config_lib.check(changed)
            less = now - estimate(changed, plan.vocabulary, topology).hbm_bytes
        except ValueError:
            continue
        if less > 0.02 * here.chip.hbm_bytes:
            lines.append(f"{text}: about {less / GIB:.1f} GiB less")
    return lines


def search(
    config: ml_collections.ConfigDict, vocabulary: int, topology: Topology, most: int
) -> Iterator[tuple[Plan, str]]:
    """(plan of the train step, its changes as command-line fields) of the `most` most promising of all meshes,
    remat policies and microbatches, by the estimate; raises ValueError where the batch divides over none of them."""
    candidates, suited, refused = [], False, None
    meshes = itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8))
    for (tensor, data), remat, accumulate in itertools.product(meshes, ("none", "dots", "block"), (1, 2, 4, 8, 16)):
        changes = {
            "mesh.slice": topology.slices, "mesh.data": data,
            "mesh.fsdp": topology.chips // (topology.slices * tensor * data), "mesh.tensor": tensor,
            "model.remat": remat, "optimizer.accumulate": accumulate,
        }  # fmt: skip
        changed = config_lib.replaced(config, changes)
        try:
            guess = estimate(changed, vocabulary, topology)
        except ValueError as error:
            refused = refused or error
            continue
        suited = True
        if guess.hbm_bytes <= topology.chip.hbm_bytes:
            # Of equals, the plainest first.
            candidates.append((guess.seconds, accumulate, tensor, data, remat, changes, changed))
    if not suited:
        raise ValueError(f"no mesh of {topology.chips} {topology.chip.name} suits this batch: {refused}")
    candidates.sort(key=lambda c: c[:5])
    for *_, changes, changed in candidates[:most]:
        fields = " ".join(f"--config.{name}={value}" for name, value in changes.items())
        yield make_plan(changed, vocabulary, topology, whole=False), fields
