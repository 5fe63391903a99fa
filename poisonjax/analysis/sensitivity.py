"""Would a study say something else by another threshold, another estimator of the gap, or another scorer?"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from poisonjax.analysis.dose_response import Exponent, exponents, rises
from poisonjax.analysis.estimators import ESTIMATORS, hierarchical
from poisonjax.analysis.study import Conditions, Outcome, Scored, poisoning, texts_of
from poisonjax.evaluation.statistics import decided

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
    """Exponents by other thresholds, by means and by other models that scored what runs wrote; [] where texts are
    decided, not measured by a gap."""
    poisoned = [o for o in runs if o.config["poison.documents"]]
    if not poisoned or any(decided(o.summary) for o in poisoned):
        return []
    asked: dict[str, list[tuple[str, Mapping[str, Any], Outcome | Scored]]] = {
        "": [(o.id, o.summary, o) for o in poisoned]
    }
    for by in dict.fromkeys(by for o in poisoned for by in o.scored):
        texts = [(o.id, o.scored[by].row, o.scored[by]) for o in poisoned if by in o.scored]
        part = f" ({len(texts)} of {len(poisoned)} runs)" if len(texts) < len(poisoned) else ""
        asked[f", scored by {by}{part}"] = [*texts]
    found = []
    for by, of in asked.items():
        there = {run for run, _, _ in of}
        kept = [i for i, o in enumerate(runs) if o.id in there]
        mine = dataclasses.replace(conditions, of_run=[conditions.of_run[i] for i in kept])
        medians = {run: row["delta_ppl_ci95"][0] for run, row, _ in of}
        means = {run: hierarchical(ESTIMATORS[MEAN], *texts_of([texts]))[1][0] for run, _, texts in of}
        for name, lowest in ((MEDIAN, medians), (MEAN, means)):
            for threshold in THRESHOLDS:
                trials = poisoning([runs[i] for i in kept], mine, functools.partial(_above, lowest, threshold))
                told = 0 < trials.success.mean() < 1 and rises(trials)
                share = float(trials.success.mean())
                found.append(Otherwise(name + by, threshold, share, exponents(trials) if told else []))
    return found


def _above(lowest: Mapping[str, float], threshold: float, run: Outcome) -> bool:
    return lowest[run.id] >= threshold
