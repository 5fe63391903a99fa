"""Does the analysis find the truth? Simulated studies of the size of a real one, under each of the laws."""

import dataclasses
from collections.abc import Callable

import numpy as np

from poisonjax.analysis.dose_response import LAWS, Law, Trials, best_law, contrasts, exponents, held_out
from poisonjax.streams import stream

SLOPE = 6.0  # of the simulated logistic: from 10% to 90% of runs within a factor of 2.1 of the dose
GAMMA = 0.5  # of the size-dependent fraction


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How often studies under one law were read rightly."""

    law: Law
    studies: int
    chosen: int  # the law that was true had the highest held-out likelihood
    covered: int  # the 95% interval of an exponent holds its true value; all exponents of all studies
    intervals: int


def study(design: Trials, law: Law, random: np.random.Generator) -> Trials:
    """The same runs, with successes drawn under a law whose N50 is the doses' middle in the middle cell, jittered."""
    tokens, params = np.log(design.tokens), np.log(design.params)
    tokens, params = tokens - tokens.mean(), params - params.mean()
    shift = {"constant count": 0.0, "constant fraction": tokens, "size-dependent fraction": tokens - GAMMA * params}
    return _drawn(design, shift[law], random)


def _drawn(design: Trials, shift: np.ndarray | float, random: np.random.Generator) -> Trials:
    log_n50 = np.log(design.dose).mean() + random.normal(0, 0.2) + shift
    chance = 1 / (1 + np.exp(-SLOPE * (np.log(design.dose) - log_n50)))
    return dataclasses.replace(design, success=(random.random(len(chance)) < chance).astype(float))


def true_exponent(law: Law, what: str) -> float:
    """Of N50, under a law."""
    by_tokens, by_params = {
        "constant count": (0.0, 0.0),
        "constant fraction": (1.0, 0.0),
        "size-dependent fraction": (1.0, -GAMMA),
    }[law]
    if what.startswith("tokens"):
        return by_tokens
    return by_params if what.startswith("parameters") else by_tokens + by_params


def recovery(
    design: Trials, studies: int = 100, seed: int = 0, say: Callable[[str], object] = lambda line: None
) -> list[Recovery]:
    """Analyses `studies` simulated studies for each law."""
    found = []
    for number, law in enumerate(LAWS):
        chosen = covered = intervals = 0
        for i in range(studies):
            random = stream(seed, "simulated study", number * 10**6 + i)
            trials = study(design, law, random)
            chosen += best_law(held_out(trials))[0] == law
            for exponent in exponents(trials):
                low, high = exponent.ci95
                covered += low <= true_exponent(law, exponent.what) <= high
                intervals += 1
        found.append(Recovery(law, studies, chosen, covered, intervals))
        say(
            f"{law}: chosen in {chosen} of {studies} studies; 95% intervals of exponents cover in "
            f"{covered} of {intervals} ({covered / max(intervals, 1):.1%})"
        )
    return found


def ratios_covered(design: Trials, base: int, studies: int, seed: int = 0) -> tuple[int, int]:
    """(how many 95% intervals of N50's ratio between conditions hold the true one, of how many), with conditions' N50
    a factor of up to about two apart."""
    covered = intervals = 0
    for i in range(studies):
        random = stream(seed, "simulated conditions", i)
        levels = random.normal(0, 0.35, int(design.condition.max()) + 1)
        trials = _drawn(design, levels[design.condition.astype(int)], random)
        for contrast in contrasts(trials, base):
            low, high = np.log(contrast.ci95)
            covered += bool(low <= levels[contrast.condition] - levels[base] <= high)
            intervals += 1
    return covered, intervals
