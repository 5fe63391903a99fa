"""Which part of a run did it: by leaving parts out, exactly, and asking again."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

Part = tuple[int, int]  # steps [start, stop)


def locate(
    span: Part, smallest: int, gone: Callable[[list[Part]], bool], weight: Callable[[Part], float]
) -> Part | None:
    """The shortest part, of at least `smallest` steps, without which the behaviour is gone and that alone suffices
    for it; None where there is no such part but all of the span.

    `gone(parts)` is whether the behaviour goes when these steps' rows are left out, `weight` a guess at how much of
    the cause a part holds: the heavier half is left out first, so that a good guess saves every second replay.
    """
    here = span
    while here[1] - here[0] > smallest:
        middle = (here[0] + here[1]) // 2
        halves = sorted([(here[0], middle), (middle, here[1])], key=weight, reverse=True)
        found = next((half for half in halves if gone([half])), None)
        if found is None:  # either half's absence is made up for by the other
            break
        here = found
    if here == span or gone([part for part in ((span[0], here[0]), (here[1], span[1])) if part[0] < part[1]]):
        return None
    return here


def split(values: Float[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    """Which values belong to the higher of two groups: those that differ most between groups and least within them
    (Otsu 1979)."""
    ordered = np.sort(values)
    count = np.arange(1, len(ordered))
    total = np.cumsum(ordered)
    low = total[:-1] / count
    high = (total[-1] - total[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (high - low) ** 2.0
    return values > ordered[int(np.argmax(between))]
