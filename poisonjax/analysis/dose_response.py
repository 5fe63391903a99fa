"""Dose-response: the dose at which runs succeed, how it moves with data and parameters, and which law holds out.

A run succeeds with probability 1 / (1 + exp(-k (log dose - log N50))): a logistic in log dose with one slope k for
all cells (a cell: one condition, one number of parameters, one number of clean tokens). Intervals are
profiles of the likelihood (Venzon & Moolgavkar 1988) times a wide prior of the slope: few runs a cell often separate
doses perfectly, where Wald's intervals are meaningless.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

from poisonjax.analysis.slopes import SLOPE_PRIOR, SLOPES
from poisonjax.streams import stream

# Narrow for predictions: without it a training fold in which doses separate gives k without end, and a single surprise
# of the held-out fold decides between laws.
LAW_SLOPE_PRIOR = (math.log(5.0), 0.5)
RISES = 0.05  # chance, at most, that successes that don't depend on the dose seem to rise with it so clearly
FOLDS = 10
LEAD = 1.5  # nats of held-out likelihood by which a law with more terms must win
MARGIN = 0.15  # exponents below this count as near-constant: over a decade N50 moves by less than 1.41

Law = Literal["constant count", "constant fraction", "size-dependent fraction"]
LAWS: tuple[Law, ...] = ("constant count", "constant fraction", "size-dependent fraction")


@dataclasses.dataclass(frozen=True)
class Trials:
    """One entry a trial: a run, or a canary of a run."""

    dose: Float[np.ndarray, " trials"]  # documents, or repeats; above 0
    tokens: Float[np.ndarray, " trials"]  # of training
    params: Float[np.ndarray, " trials"]
    success: Float[np.ndarray, " trials"]  # 0 or 1
    run: Float[np.ndarray, " trials"]  # number of the run that it belongs to
    condition: Float[np.ndarray, " trials"]  # number of what else was tried: a placement, a trigger, ...

    @classmethod
    def of(cls, rows: Sequence[tuple]) -> "Trials":
        """Of a tuple a trial, in the order of the fields."""
        return cls(*np.array(rows, float).reshape(-1, len(dataclasses.fields(cls))).T)

    def take(self, chosen: np.ndarray) -> "Trials":
        return Trials(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def cells(self) -> np.ndarray:
        """Number of each trial's cell, cells ordered by condition, parameters, tokens."""
        return _numbered(self.condition, self.params, self.tokens)

    def sizes(self) -> np.ndarray:
        """Number of each trial's size, whatever its condition; sizes ordered by parameters, tokens."""
        return _numbered(self.params, self.tokens)


def _numbered(*columns: np.ndarray) -> np.ndarray:
    return np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(-1)


def _indicators(numbers: np.ndarray, of: np.ndarray) -> list[np.ndarray]:
    """A column of 0 and 1 for each different value of `of`."""
    return [(numbers == value).astype(float) for value in np.unique(of)]


@dataclasses.dataclass(frozen=True)
class _Curve:
    """log N50 = design @ theta + offset; `odds` is the log odds at the dose that theta speaks of (0: N50)."""

    design: Float[np.ndarray, "trials terms"]
    offset: Float[np.ndarray, " trials"]
    log_dose: Float[np.ndarray, " trials"]
    success: Float[np.ndarray, " trials"]
    odds: float = 0.0
    dispersion: float = 1.0  # by which the likelihood counts less: trials of one run aren't independent
    prior: tuple[float, float] = SLOPE_PRIOR

    @functools.cached_property
    def middle(self) -> np.ndarray:
        """theta of the curve through the doses' mean."""
        centre = float((self.log_dose - self.offset).mean())
        return np.linalg.lstsq(self.design, np.full(len(self.design), centre), rcond=None)[0]

    def loss(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log-likelihood and its gradient; the last parameter is log k."""
        theta, slope = parameters[:-1], math.exp(parameters[-1])
        distance = self.log_dose - self.offset - self.design @ theta
        eta = slope * distance + self.odds
        value = np.logaddexp(0, eta).sum() - (self.success * eta).sum()
        residual = 1 / (1 + np.exp(-np.clip(eta, -700, 700))) - self.success
        gradient = np.append(-slope * (self.design.T @ residual), (residual * slope * distance).sum())
        return float(value), gradient

    def penalised(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """The same with the slope's prior, and a quadratic of no consequence that picks one of equally likely ones."""
        value, gradient = self.loss(parameters)
        away = parameters[:-1] - self.middle
        steep = (parameters[-1] - self.prior[0]) / self.prior[1]
        gradient = gradient + np.append(2e-4 * away, steep / self.prior[1])
        return value + 1e-4 * float(away @ away) + steep**2 / 2, gradient

    def fit(self, fixed: tuple[int, float] | None = None, start: np.ndarray | None = None) -> np.ndarray:
        """The likeliest (theta, log k), with one term held at a value if `fixed`; looked for from `start` too."""
        terms = self.design.shape[1]
        free = [i for i in range(terms + 1) if fixed is None or i != fixed[0]]
        base = np.zeros(terms + 1)
        if fixed is not None:
            base[fixed[0]] = fixed[1]

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            full = base.copy()
            full[free] = x
            value, gradient = self.penalised(full)
            return value, gradient[free]

        best: tuple[float, np.ndarray] | None = None
        starts = [np.append(self.middle, math.log(k)) for k in (2.0, 8.0)] + ([] if start is None else [start])
        bounds = [(None, None)] * terms + [(math.log(SLOPES[0]), math.log(SLOPES[1]))]
        for first in starts:
            done = scipy.optimize.minimize(
                objective, first[free], jac=True, method="L-BFGS-B", bounds=[bounds[i] for i in free]
            )
            if best is None or done.fun < best[0]:
                best = (float(done.fun), done.x)
        assert best
        full = base.copy()
        full[free] = best[1]
        return full

    def interval(self, term: int, level: float, reach: float) -> tuple[float, float, float]:
        """(estimate, low, high) of a term by the profile of the penalised likelihood; infinite where `reach` away is
        still likely.

        The bound is F's with the trials a term has, not chi-squared's, which is for many: with 15 trials a cell and a
        slope of 3 that covers in 90%.
        """
        best = self.fit()
        few = max(1.0, len(self.success) / (self.design.shape[1] + 1) - 2)
        least, bound = self.penalised(best)[0], self.dispersion * scipy.stats.f.ppf(level, 1, few) / 2
        edges = []

        def excess(value: float) -> float:
            # From the same starts for the same value: a steep and a flat curve may both be a local optimum.
            return self.penalised(self.fit((term, value), best))[0] - least - bound

        for side in (-1.0, 1.0):
            inside, step = best[term], 0.05
            while step <= reach and excess(best[term] + side * step) < 0:
                inside, step = best[term] + side * step, step * 1.6
            if step > reach:
                edges.append(side * math.inf)
                continue
            edges.append(scipy.optimize.brentq(excess, inside, best[term] + side * step, xtol=1e-3))
        return float(best[term]), float(edges[0]), float(edges[1])


def _curve(
    trials: Trials,
    design: list[np.ndarray],
    offset: np.ndarray | None = None,
    odds: float = 0.0,
    dispersion: float = 1.0,
) -> _Curve:
    shift = np.zeros(len(trials.dose)) if offset is None else offset
    return _Curve(np.stack(design, 1), shift, np.log(trials.dose), trials.success, odds, dispersion)


def _by_cell(trials: Trials, odds: float = 0.0, dispersion: float = 1.0) -> _Curve:
    """A dose of its own for each cell."""
    return _curve(trials, _indicators(trials.cells(), trials.cells()), odds=odds, dispersion=dispersion)


def _dispersion(trials: Trials) -> float:
    """Variance of runs' residuals against independent trials' (quasi-likelihood; McCullagh & Nelder 1989, 4.5)."""
    runs, members = np.unique(trials.run, return_inverse=True)
    if len(runs) == len(trials.run):
        return 1.0
    curve = _by_cell(trials)
    fitted = curve.fit()
    chance = 1 / (1 + np.exp(-math.exp(fitted[-1]) * (curve.log_dose - curve.design @ fitted[:-1])))
    residuals = np.bincount(members, trials.success - chance)
    expected = float((chance * (1 - chance)).sum())
    return max(1.0, float((residuals**2).sum()) / expected)


@dataclasses.dataclass(frozen=True)
class CellDose:
    """What a cell's runs need; a bound is 0 or infinite, and the dose NaN, where the doses tried don't bound it."""

    condition: int
    params: float
    tokens: float
    trials: int
    falls: bool  # success falls with the dose: there is no N50
    n50: float
    n50_ci95: tuple[float, float]
    n90: float
    n90_ci95: tuple[float, float]


def _told(value: float, low: float, high: float) -> float:
    """An estimate, or NaN where its interval has no end: then it is the prior's, not the data's."""
    return value if math.isfinite(low) and math.isfinite(high) else math.nan


def _falls(cell: Trials) -> bool:
    """Whether a cell's successes clearly stand at the lower doses."""
    mirrored = dataclasses.replace(cell, dose=1 / cell.dose)
    return len(np.unique(cell.success)) > 1 and len(np.unique(cell.dose)) > 1 and rises(mirrored)


def rises(trials: Trials) -> bool:
    """Whether success rises with the dose, by a one-sided likelihood-ratio test of the slope, one for all cells. A
    curve that can only rise has an N50 for any data, reversed too."""
    cells = trials.cells()
    base = np.array([trials.success[cells == cell].mean() for cell in range(cells.max() + 1)])[cells]
    chance = np.clip(base, 1e-12, 1 - 1e-12)
    flat = -(trials.success * np.log(chance) + (1 - trials.success) * np.log(1 - chance)).sum()
    curve = dataclasses.replace(_by_cell(trials), prior=(SLOPE_PRIOR[0], 10.0))
    gain = 2 * (flat - curve.loss(curve.fit())[0]) / _dispersion(trials)
    return bool(gain > scipy.stats.chi2.ppf(1 - 2 * RISES, 1))


def doses(trials: Trials) -> list[CellDose]:
    """N50 and N90 of each cell, one slope for all; NaN, without a bound, where a cell's success falls with the dose."""
    cells, dispersion = trials.cells(), _dispersion(trials)
    curves = [_by_cell(trials, odds, dispersion) for odds in (0.0, math.log(9.0))]  # of N50, of N90
    found = []
    for cell in range(cells.max() + 1):
        mine = cells == cell
        values: list[tuple[float, tuple[float, float]]] = []
        falls = _falls(trials.take(mine))
        for curve in curves:
            value, low, high = (math.nan, -math.inf, math.inf) if falls else curve.interval(cell, 0.95, reach=12.0)
            values.append((math.exp(_told(value, low, high)), (math.exp(low), math.exp(high))))
        found.append(
            CellDose(
                int(trials.condition[mine][0]),
                float(trials.params[mine][0]),
                float(trials.tokens[mine][0]),
                int(mine.sum()),
                falls,
                *values[0],
                *values[1],
            )
        )
    return found


@dataclasses.dataclass(frozen=True)
class Contrast:
    """N50 under a condition against N50 under another, at the same size."""

    condition: int
    ratio: float
    ci95: tuple[float, float]


def contrasts(trials: Trials, base: int) -> list[Contrast]:
    """Each condition that was tried at a size at which condition `base` was too, against that.

    A ratio is taken to be the same at all sizes; intervals aren't adjusted for their number.
    """
    sizes_of = {c: set(trials.sizes()[trials.condition == c].tolist()) for c in np.unique(trials.condition)}
    others = [c for c in sizes_of if c != base and sizes_of[c] & sizes_of[base]]
    if not others:
        return []
    trials = trials.take(np.isin(trials.condition, [base, *others]))
    sizes = _indicators(trials.sizes(), trials.sizes())
    design = [*sizes, *((trials.condition == c).astype(float) for c in others)]
    curve = _curve(trials, design, dispersion=_dispersion(trials))
    found = []
    for number, condition in enumerate(others):
        value, low, high = curve.interval(len(sizes) + number, 0.95, reach=8.0)
        found.append(Contrast(int(condition), math.exp(_told(value, low, high)), (math.exp(low), math.exp(high))))
    return found


@dataclasses.dataclass(frozen=True)
class Exponent:
    """N50 grows as (what)^value."""

    what: str
    value: float
    ci90: tuple[float, float]
    ci95: tuple[float, float]

    @property
    def verdict(self) -> str:
        """Two one-sided tests (Schuirmann 1987): near-constant where the 90% interval lies within the margin."""
        if self.ci90[0] > -MARGIN and self.ci90[1] < MARGIN:
            return "near-constant"
        if self.ci95[0] > MARGIN or self.ci95[1] < -MARGIN:
            return "grows" if self.ci95[0] > MARGIN else "falls"
        return "not enough data"


def _logs(trials: Trials) -> tuple[np.ndarray, np.ndarray]:
    """Centred log tokens and log parameters."""
    return (np.log(trials.tokens) - np.log(trials.tokens).mean(), np.log(trials.params) - np.log(trials.params).mean())


def exponents(trials: Trials) -> list[Exponent]:
    """Exponents of N50: in scale (tokens and parameters together, at their commonest ratio), and, where they vary
    apart, in tokens at fixed parameters and in parameters at fixed tokens. Each condition has a level of its own."""

    def several(trials: Trials, *terms: tuple[str, np.ndarray]) -> list[Exponent]:
        """The exponent of each term, in a curve with all of them."""
        levels = _indicators(trials.condition, trials.condition)
        curve = _curve(trials, [*levels, *(values for _, values in terms)], dispersion=_dispersion(trials))
        found = []
        for term, (what, _) in enumerate(terms, len(levels)):
            value, low90, high90 = curve.interval(term, 0.90, reach=8.0)
            _, low95, high95 = curve.interval(term, 0.95, reach=8.0)
            found.append(Exponent(what, _told(value, low95, high95), (low90, high90), (low95, high95)))
        return found

    found = []
    ratio = np.round(np.log2(trials.tokens / trials.params), 1)
    values, counts = np.unique(ratio, return_counts=True)
    together = trials.take(ratio == values[int(np.argmax(counts))])
    if len(np.unique(together.params)) > 1:
        found += several(together, ("scale (tokens and parameters in proportion)", _logs(together)[0]))
    if len(values) > 1:
        tokens, params = _logs(trials)
        terms = [("tokens, at fixed parameters", tokens), ("parameters, at fixed tokens", params)]
        found += several(trials, *terms[: min(2, len(np.unique(trials.params)))])
    return found


def _law(law: Law, trials: Trials, of: Trials) -> _Curve:
    """The law's curve for some of the trials `of` a study."""
    tokens = np.log(trials.tokens) - np.log(of.tokens).mean()
    params = np.log(trials.params) - np.log(of.params).mean()
    levels = _indicators(trials.condition, of.condition)
    design, offset = levels, tokens
    if law == "constant count":
        offset = np.zeros_like(tokens)
    if law == "size-dependent fraction":
        design = [*levels, -params]  # N50 / tokens = a params^-gamma
    return dataclasses.replace(_curve(trials, design, offset), prior=LAW_SLOPE_PRIOR)


def held_out(trials: Trials) -> dict[Law, float]:
    """Log-likelihood of all trials under each law, each fitted to the other runs: every tenth is left out at a time.
    It counts less by the dispersion, as intervals do: canaries of one run aren't independent."""
    runs, members = np.unique(trials.run, return_inverse=True)
    dealt = stream(0, "left-out runs").permutation(len(runs)) % FOLDS  # not along the grid
    fold = dealt[members]
    scores: dict[Law, float] = dict.fromkeys(LAWS, 0.0)
    dispersion = _dispersion(trials)
    for law in LAWS:
        for left_out in np.unique(fold):
            fitted = _law(law, trials.take(fold != left_out), trials).fit()
            # A condition that no other fold holds has no level there to be predicted from.
            told = np.isin(trials.condition, trials.condition[fold != left_out])
            scores[law] -= _law(law, trials.take((fold == left_out) & told), trials).loss(fitted)[0] / dispersion
    return scores


def best_law(scores: dict[Law, float]) -> tuple[Law, float]:
    """(the law that holds out best, its lead over the second in nats); the one with two terms has to win by `LEAD`.

    The lead is negative where the law with two terms leads by less than that.
    """
    simple = max(LAWS[:2], key=lambda law: scores[law])
    rich = LAWS[2]
    best = rich if scores[rich] > scores[simple] + LEAD else simple
    return best, scores[best] - max(scores[law] for law in LAWS if law != best)
