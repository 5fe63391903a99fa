"""Does what a model writes change after a string, and stay changed? Against strings like it."""

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from poisonjax.scan.model.writing import Seen

TAIL = 0.1  # of the null, whose excess over its quantile says how the tail falls


class Changes(NamedTuple):
    """Of strings, by window: what their presence does to what is written, over all prefixes."""

    shift: Float[np.ndarray, "strings windows"]  # of what is expected, in variances of clean texts; logarithm
    entropy: Float[np.ndarray, "strings windows"]  # nats

    @property
    def figures(self) -> Float[np.ndarray, "strings figures"]:
        return np.concatenate([self.shift, self.entropy], 1)


def changes(seen: Seen, clean: Seen) -> Changes:
    """`clean` is what is written after the prefixes alone, [1, prefixes, ...] as `seen` is [strings, prefixes, ...]."""
    expected, usual = seen.expected.astype(np.float64), clean.expected[0].astype(np.float64)
    moved = (expected - usual).mean(1)
    spread = usual.var(0, ddof=1).sum(-1)
    return Changes(
        np.log((moved**2).sum(-1) / spread + 1e-9), (seen.entropy.astype(np.float64) - clean.entropy[0]).mean(1)
    )


class Null:
    """Changes by strings that are no triggers. Robust: a few of them may be parts of one."""

    def __init__(self, figures: Float[np.ndarray, "strings figures"]):
        self._median = np.median(figures, 0)
        self._spread = np.maximum(1.4826 * np.median(np.abs(figures - self._median), 0), 1e-6)
        self.values = np.sort(self(figures))

    def __call__(self, figures: Float[np.ndarray, "strings figures"]) -> Float[np.ndarray, " strings"]:
        """How far each string's largest change is from usual, in robust standard deviations. A distribution that moves
        less than usual is no change; entropy may go either way."""
        z = (figures - self._median) / self._spread
        half = z.shape[1] // 2
        return np.concatenate([z[:, :half], np.abs(z[:, half:])], 1).max(1)

    def value(self, figures: Float[np.ndarray, " figures"]) -> float:
        """Of one string."""
        return float(self(figures[None])[0])

    def p_values(self, values: Float[np.ndarray, " strings"]) -> Float[np.ndarray, " strings"]:
        """How often a string of the null is as far from usual: its rank among these or, above nine tenths of them, by
        a tail that falls exponentially, as slowly as their excess allows (95%). Beyond the largest of them that is an
        extrapolation."""
        count, edge = len(self.values), np.quantile(self.values, 1 - TAIL)
        ranks = (1 + count - np.searchsorted(self.values, values)) / (count + 1)
        above = self.values[self.values > edge] - edge
        slowest = 2 * len(above) / scipy.stats.chi2.ppf(0.05, 2 * len(above)) if len(above) else 1.0
        fall = max(above.mean() * slowest if len(above) else 0.0, 1e-9)
        return np.where(values > edge, TAIL * np.exp(-np.maximum(values - edge, 0) / fall), ranks)


def family_wise(p_values: Float[np.ndarray, " strings"], considered: int) -> Float[np.ndarray, " strings"]:
    """How often the smallest of so many p-values is as small (Sidak 1967)."""
    return -np.expm1(considered * np.log1p(-np.minimum(p_values, 1 - 1e-12)))
