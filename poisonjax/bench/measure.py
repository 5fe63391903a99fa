"""Paired timing: two things in turn, so that a machine whose speed drifts gives an honest ratio."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

ROUNDS = 7

Result = dict[str, Any]
Bench = Callable[[ml_collections.ConfigDict], Iterator[Result]]
BENCHES: dict[str, Bench] = {}


def register(bench: Bench) -> Bench:
    """Makes a bench run as `poisonjax bench --only NAME`."""
    BENCHES[bench.__name__] = bench
    return bench


def result(name: str, value: float, unit: str, baseline: float, ratio: float) -> Result:
    """A row of `bench --json`; what `ratio` compares is said by the bench's docstring."""
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}


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
