"""Placements: in which slots of the run the poison documents stand. Always exact, never a rate (I2).

A placement is a function `(count, steps, global_batch, random) -> distinct slots`, registered by name in
`PLACEMENTS`; to add one, write it here. A slot is `step * global_batch + position`.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

Placement = Callable[[int, int, int, np.random.Generator], Int[np.ndarray, " documents"]]
PLACEMENTS: dict[str, Placement] = {}


def register(name: str) -> Callable[[Placement], Placement]:
    """Decorator: makes a placement selectable as `config.poison.placement = name`."""

    def add(placement: Placement) -> Placement:
        PLACEMENTS[name] = placement
        return placement

    return add


@register("uniform")
def uniform(count: int, steps: int, global_batch: int, random: np.random.Generator) -> np.ndarray:
    """`count` slots uniform over the run, without replacement: entry i is where document i stands."""
    return random.choice(steps * global_batch, size=count, replace=False).astype(np.int64)
