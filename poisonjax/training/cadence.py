"""What is due after a step."""

import dataclasses
from collections.abc import Mapping

import ml_collections

from poisonjax.evaluation.probes import Probe


@dataclasses.dataclass(frozen=True)
class Due:
    """After a number of finished steps: which probes measure, whether all is saved, whether the run ends early."""

    probes: list[str]
    save: bool
    stop: bool


def due(config: ml_collections.ConfigDict, probes: Mapping[str, Probe], done: int, stopping: bool) -> Due:
    """After the last step everything; `stopping` is whether the run was asked to end."""
    last = done == config.steps
    return Due(
        probes=[name for name, probe in probes.items() if last or done % probe.every == 0],
        save=last or stopping or done % config.checkpoint.every == 0,
        stop=stopping and not last,
    )
