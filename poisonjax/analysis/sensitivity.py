"""Would a study say something else by another threshold, or another estimator of the gap?"""

import dataclasses
import functools
from collections.abc import Callable

from poisonjax.analysis.dose_response import Exponent, exponents, rises
from poisonjax.analysis.estimators import ESTIMATORS, hierarchical
from poisonjax.analysis.study import Conditions, Outcome, poisoning, texts_of
from poisonjax.evaluation.statistics import attacked, decided

THRESHOLDS = (10.0, 50.0, 100.0)  # perplexity
MEDIAN, MEAN = GAPS = ("gap of median perplexities", "gap of mean perplexities")


@dataclasses.dataclass(frozen=True)
class Otherwise:
    """What a study would say if success meant something else."""

    estimator: str
    threshold: float
    share: float  # of runs that succeed
    exponents: list[Exponent]


def sensitivity(runs: list[Outcome], conditions: Conditions) -> list[Otherwise]:
    """Exponents by other thresholds and by means; [] where texts are decided, not measured by a gap."""
    poisoned = [o for o in runs if o.config["poison.documents"]]
    if not poisoned or any(decided(o.summary) for o in poisoned):
        return []
    means = {o.id: hierarchical(ESTIMATORS[MEAN], *texts_of([o]))[1][0] for o in poisoned}
    judged: dict[str, Callable[[float, Outcome], bool]] = {
        MEDIAN: lambda threshold, o: attacked(o.summary, threshold),
        MEAN: lambda threshold, o: means[o.id] >= threshold,
    }
    found = []
    for name, above in judged.items():
        for threshold in THRESHOLDS:
            trials = poisoning(runs, conditions, functools.partial(above, threshold))
            told = 0 < trials.success.mean() < 1 and rises(trials)
            found.append(Otherwise(name, threshold, float(trials.success.mean()), exponents(trials) if told else []))
    return found
