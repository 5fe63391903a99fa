"""Does the analysis find the truth? Simulated studies of the size of a real one, under each of the laws."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from poisonjax.analysis.adaptive import Result, Search, known_together
from poisonjax.analysis.dose_response import LAWS, Law, Trials, best_law, contrasts, doses, exponents, held_out
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
    return _drawn(design, _shift(design.tokens, design.params, law), random)


def _shift(tokens: np.ndarray, params: np.ndarray, law: Law) -> np.ndarray:
    """log N50 of each, less that of the middle one."""
    log_tokens, log_params = np.log(tokens) - np.log(tokens).mean(), np.log(params) - np.log(params).mean()
    return true_exponent(law, "tokens") * log_tokens + true_exponent(law, "parameters") * log_params


def _drawn(design: Trials, shift: np.ndarray | float, random: np.random.Generator) -> Trials:
    log_n50 = np.log(design.dose).mean() + random.normal(0, 0.2) + shift
    return dataclasses.replace(design, success=_successes(design.dose, log_n50, SLOPE, random))


def _successes(
    dose: np.ndarray | Sequence[float], log_n50: np.ndarray | float, slope: float, random: np.random.Generator
) -> np.ndarray:
    """1 for each run that succeeds, else 0."""
    chance = 1 / (1 + np.exp(-slope * (np.log(dose) - log_n50)))
    return (random.random(len(chance)) < chance).astype(float)


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


# --- studies whose doses are searched for

SLOPES_OF_SEARCHES = (6.0, 3.0)
FACTOR = 1.5  # within which N50 is to be told
GRID_DOSES = 5
GRIDS = (2, 3, 4, 5, 6, 8, 10, 15, 20)  # runs a dose
ELSEWHERE = math.log(1.5)  # spread of the middle N50 about the middle of its range

Cell = tuple[float, float, Search]  # (parameters, tokens, how its N50 is looked for)
Design = Callable[[Search, float, float, np.random.Generator], list[Result]]  # of a range, log N50 and slope


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the report makes of studies of some design whose truth is known."""

    near: float  # share of N50s told within FACTOR of the true one; one that isn't told isn't
    covered: float  # share of their 95% intervals that hold it
    exponents_covered: float  # the same of exponents
    exponents_within: dict[str, float]  # half the width of these intervals, by what the exponent is of: median
    runs: float  # a cell, mean
    most: int


def by_search(search: Search, log_n50: float, slope: float, random: np.random.Generator) -> list[Result]:
    """Results of a search."""
    results: list[Result] = []
    for number in search.rounds():
        if search.ended(results):
            break
        results += _results(search.next(results, number), log_n50, slope, random)
    return results


def _results(asked: Sequence[int], log_n50: float, slope: float, random: np.random.Generator) -> list[Result]:
    return [*zip(asked, _successes(asked, log_n50, slope, random).astype(bool).tolist(), strict=True)]


def by_grid(repeats: int) -> Design:
    """Results of doses spread over the range, each tried so often."""

    def design(search: Search, log_n50: float, slope: float, random: np.random.Generator) -> list[Result]:
        asked = np.tile(np.geomspace(search.low, search.high, GRID_DOSES).round().astype(int), repeats).tolist()
        return _results(asked, log_n50, slope, random)

    return design


def scores(cells: Sequence[Cell], design: Design, law: Law, slope: float, studies: int, seed: int = 0) -> Scores:
    """Of simulated studies, analysed as the report does. Cells of one size are different conditions."""
    params, tokens, searches = zip(*cells, strict=True)
    condition = [sum(other[:2] == cell[:2] for other in cells[:number]) for number, cell in enumerate(cells)]
    order = np.lexsort((tokens, params, condition))  # as `doses` tells them
    shift, middle = _shift(np.array(tokens), np.array(params), law), np.mean([_middle(of) for of in searches])
    near, covered, powers_covered, runs = [], [], [], list[int]()
    widths: dict[str, list[float]] = {}
    for i in range(studies):
        random = stream(seed, "simulated searches", i)
        log_n50 = middle + random.normal(0, ELSEWHERE) + shift
        results = [design(of, at, slope, random) for of, at in zip(searches, log_n50.tolist(), strict=True)]
        every = [(cell, *result) for cell, mine in enumerate(results) for result in mine]
        trials = Trials.of(
            [(d, tokens[c], params[c], success, run, condition[c]) for run, (c, d, success) in enumerate(every)]
        )
        if design is by_search:  # as the report tells those
            known = known_together([*zip(searches, results, strict=True)])
            told = [(np.exp(at), of.n50, of.ci95) for at, of in zip(log_n50, known, strict=True)]
        else:
            told = [(np.exp(at), of.n50, of.n50_ci95) for at, of in zip(log_n50[order], doses(trials), strict=True)]
        for true, n50, (low, high) in told:
            near.append(true / FACTOR <= n50 <= true * FACTOR)
            covered.append(low <= true <= high)
        for power in exponents(trials):
            powers_covered.append(power.ci95[0] <= true_exponent(law, power.what) <= power.ci95[1])
            widths.setdefault(power.what, []).append((power.ci95[1] - power.ci95[0]) / 2)
        runs += map(len, results)
    exponents_covered = float(np.mean(powers_covered)) if powers_covered else math.nan
    within = {what: float(np.median(of)) for what, of in widths.items()}
    return Scores(
        float(np.mean(near)), float(np.mean(covered)), exponents_covered, within, float(np.mean(runs)), max(runs)
    )


def _middle(search: Search) -> float:
    return math.log(search.low * search.high) / 2


def grid_for(cells: Sequence[Cell], near: float, law: Law, slope: float, studies: int) -> Scores | None:
    """Of the smallest grid that tells as many N50s within FACTOR; None where none of GRIDS does."""
    for repeats in GRIDS:
        found = scores(cells, by_grid(repeats), law, slope, studies)
        if found.near >= near:
            return found
    return None
