"""Probes: what is measured of a model's weights, each in a file of its own.

To add one, write a file here with a class like these, and name it in `PROBES`.
"""

from collections.abc import Callable

from poisonjax.evaluation.probes.canaries import CanaryProbe
from poisonjax.evaluation.probes.generation import GenerationProbe
from poisonjax.evaluation.probes.heldout import HeldoutProbe
from poisonjax.evaluation.probes.probe import EvalSteps, Measurement, Probe, Subject, make_eval_steps

# Each makes a probe, or None for a run that it has nothing to ask.
PROBES: dict[str, Callable[[Subject], Probe | None]] = {
    "heldout": HeldoutProbe,
    "generation": GenerationProbe,
    "canaries": CanaryProbe.of,
}

__all__ = ["PROBES", "EvalSteps", "HeldoutProbe", "Measurement", "Probe", "Subject", "make_eval_steps"]
