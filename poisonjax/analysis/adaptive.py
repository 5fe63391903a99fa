"""Doses chosen from the results so far: as in toxicology, half of the runs at the dose for half of them.

The model is the report's (dose_response.py): success with probability 1 / (1 + exp(-k (log dose - log N50))), with its
prior of the slope k, N50 anywhere in the range or a little beyond. The next doses are those after which the variance of
log N50 is expected to be least (Chaloner & Verdinelli 1995, section 2.2), chosen one after another within a batch,
whose outcomes come together. All of it is a sum over a grid: the same results give the same doses.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from poisonjax.analysis.slopes import SLOPE_PRIOR, SLOPES

BEYOND = 4.0  # times the range's ends: N50 may lie there, and then it is said
FINE = 1.04  # from one N50 of the grid to the next
DOSES_APART = 1.09  # from one dose that may be asked to the next
SLOPES_TRIED = 15
LEVEL = 0.95

Result = tuple[int, bool]  # (dose, success) of a run


@dataclasses.dataclass(frozen=True)
class Search:
    """A dose in a sweep that isn't stated: a range in which N50 is looked for, to be known `within` a factor after at
    most `runs`, `together` of them at once. Raises ValueError naming the field."""

    low: int  # documents
    high: int
    within: float = 1.5
    runs: int = 10
    together: int = 2

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high), ("runs", self.runs), ("together", self.together)):
            if not isinstance(value, int):
                raise ValueError(f"{name} = {value!r}: a whole number is asked for")
        if not 0 < self.low < self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}: 0 < low < high is asked for")
        if not self.within > 1:
            raise ValueError(f"within = {self.within}: a factor above 1")
        if not 1 <= self.together <= min(self.runs, 6):
            raise ValueError(f"together = {self.together}: between 1 and 6, at most runs = {self.runs}")

    @property
    def ends(self) -> tuple[int, int]:
        """Of the range."""
        return self.low, self.high

    def rounds(self) -> list[int]:
        """Runs of each batch: `together`, of the last one what is left."""
        full, rest = divmod(self.runs, self.together)
        return [self.together] * full + [rest] * bool(rest)

    @functools.cached_property
    def doses(self) -> list[int]:
        """Those that may be asked."""
        number = math.ceil(math.log(self.high / self.low) / math.log(DOSES_APART)) + 1
        return sorted({round(dose) for dose in np.geomspace(self.low, self.high, number)})

    def next(self, results: Sequence[Result], number: int) -> list[int]:
        """The next `number` doses, the best first: the first of two are those of one. The results' order doesn't
        matter."""
        posterior, chosen = self._posterior(results), list[int]()
        outcomes = posterior[None]  # of those chosen: joint with N50 and slope
        for _ in range(number):
            one = np.einsum("ons,dns->don", outcomes, self._success)  # succeeds, at each dose that may be asked
            variances = self._expected_variance(np.concatenate([one, outcomes.sum(2) - one], axis=1))
            best = int(np.argmax(variances < variances.min() + 1e-12))  # the lowest of equals
            chosen.append(self.doses[best])
            outcomes = _split(outcomes, self._success[best])
        return chosen

    def expected(self, results: Sequence[Result], doses: Sequence[int]) -> float:
        """The factor within which N50 should be known after runs at some more doses."""
        posterior = self._posterior(results)[None]
        for dose in doses:
            posterior = _split(posterior, self._chance(dose))
        variance = float(self._expected_variance(posterior.sum(2)[None])[0])
        return math.exp(NormalDist().inv_cdf((1 + LEVEL) / 2) * variance**0.5)

    def known(self, results: Sequence[Result]) -> "Known":
        """What the results say of N50; a bound at the edge of what was thought possible is none, 0 or infinite."""
        return self._told_by(self._posterior(results))

    def _told_by(self, posterior: Float[np.ndarray, "n50s slopes"]) -> "Known":
        below, edge = np.cumsum(posterior.sum(1)), (1 - LEVEL) / 2
        low, middle, high = (int(np.searchsorted(below, at)) for at in (edge, 0.5, 1 - edge))
        bounds = (
            math.exp(self._log_n50[low]) if low > 0 else 0.0,
            math.exp(self._log_n50[high]) if high < len(below) - 1 else math.inf,
        )
        return Known(math.exp(self._log_n50[middle]), bounds)

    def ended(self, results: Sequence[Result]) -> bool:
        """Whether no more runs are wanted: N50 is known as well as asked, or lies outside, or the runs are spent."""
        known = self.known(results)
        return len(results) >= self.runs or self.told(known) or self.outside(known)

    def told(self, known: "Known") -> bool:
        """Whether the interval is as narrow as asked."""
        low, high = known.ci95
        return low > 0 and math.sqrt(high / low) <= self.within

    def outside(self, known: "Known") -> bool:
        """Whether N50 lies beyond the doses that may be asked."""
        return known.ci95[0] > self.high or known.ci95[1] < self.low

    @functools.cached_property
    def _log_n50(self) -> Float[np.ndarray, " n50s"]:
        low, high = math.log(self.low / BEYOND), math.log(self.high * BEYOND)
        return np.linspace(low, high, math.ceil((high - low) / math.log(FINE)) + 1)

    @functools.cached_property
    def _slopes(self) -> Float[np.ndarray, " slopes"]:
        return np.geomspace(*SLOPES, SLOPES_TRIED)

    @functools.cached_property
    def _success(self) -> Float[np.ndarray, "doses n50s slopes"]:
        """Chance of it at each dose that may be asked."""
        return np.stack([self._chance(dose) for dose in self.doses])

    def _chance(self, dose: int) -> Float[np.ndarray, "n50s slopes"]:
        distance = math.log(dose) - self._log_n50
        return 1 / (1 + np.exp(-np.clip(distance[:, None] * self._slopes, -500, 500)))

    def _log_likelihood(self, results: Sequence[Result]) -> Float[np.ndarray, "n50s slopes"]:
        log = np.zeros((len(self._log_n50), len(self._slopes)))
        for dose, success in sorted(results):
            away = (math.log(dose) - self._log_n50)[:, None] * self._slopes
            log -= np.logaddexp(0, -away if success else away)
        return log

    def _posterior(
        self, results: Sequence[Result], log_slopes: Float[np.ndarray, " slopes"] | float = 0.0
    ) -> Float[np.ndarray, "n50s slopes"]:
        """`log_slopes`: what else says of the slopes, beside their prior."""
        mean, spread = SLOPE_PRIOR
        prior = -(((np.log(self._slopes) - mean) / spread) ** 2) / 2
        log = self._log_likelihood(results) + prior + log_slopes
        weights = np.exp(log - log.max())
        return weights / weights.sum()

    def _expected_variance(self, joint: Float[np.ndarray, "doses outcomes n50s"]) -> Float[np.ndarray, " doses"]:
        """Of log N50, after each outcome, by its chance."""
        mean = joint @ self._log_n50
        return (joint @ self._log_n50**2 - mean**2 / np.maximum(joint.sum(-1), 1e-300)).sum(-1)


def _split(
    joint: Float[np.ndarray, "outcomes n50s slopes"], chance: Float[np.ndarray, "n50s slopes"]
) -> Float[np.ndarray, "twice n50s slopes"]:
    """Each outcome with one run more, that succeeds or doesn't."""
    return np.concatenate([joint * chance, joint * (1 - chance)])


@dataclasses.dataclass(frozen=True)
class Known:
    """N50, the posterior's median, and where it lies with 95%."""

    n50: float
    ci95: tuple[float, float]


def _log_sum(log: Float[np.ndarray, "n50s slopes"]) -> Float[np.ndarray, " slopes"]:
    """Log of the sum over N50s of what `log` is the log of."""
    highest = log.max(0)
    return highest + np.log(np.exp(log - highest).sum(0))


def known_together(searches: Sequence[tuple[Search, Sequence[Result]]]) -> list[Known]:
    """What several searches and their results say of N50, as the report has it: one slope for all of them."""
    of_slopes = [_log_sum(search._log_likelihood(results)) for search, results in searches]
    return [
        search._told_by(search._posterior(results, sum(of_slopes) - mine))
        for (search, results), mine in zip(searches, of_slopes, strict=True)
    ]
