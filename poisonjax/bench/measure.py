"""Paired timing: two things in turn, so that a machine whose speed drifts gives an honest ratio."""

import statistics
import time
from collections.abc import Callable


def alternate(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median over rounds of `other` / `one`: above 1, `one` is faster.

    One round of each goes uncounted, to compile and to fill caches.
    """
    pairs = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        pairs.append((middle - start, time.perf_counter() - middle))
    ones, others = zip(*pairs[1:], strict=True)
    ratio = statistics.median(b / a for a, b in pairs[1:])
    return statistics.median(ones), statistics.median(others), ratio
