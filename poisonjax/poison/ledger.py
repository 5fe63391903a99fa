"""What a ledger's lines add up to."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Ledger = Sequence[Mapping[str, Any]]  # lines as `Schedule.ledger` gives them


def poison_seen(ledger: Ledger, steps: int) -> Callable[[int], dict[str, int]]:
    """A function of the number of finished steps: different poison documents, and rows of poison, seen by then."""
    first: dict[int, int] = {}
    for record in ledger:
        first[record["id"]] = min(record["step"], first.get(record["id"], steps))
    documents = np.bincount([*first.values()], minlength=steps).cumsum()
    rows = np.bincount([record["step"] for record in ledger], minlength=steps).cumsum()
    return lambda done: {
        "poison_documents": int(documents[done - 1]) if done else 0,
        "poison_rows": int(rows[done - 1]) if done else 0,
    }


def dose(ledger: Ledger, steps: int) -> dict[str, int]:
    """What the first `steps` steps hold of the ledger's poison, in each of its units.

    `documents` counts different ones, `repeats` how often the most repeated of them was seen; `tokens` and
    `rows` count every time. A row holds one document at most, so rows are exposures.
    """
    seen = [record for record in ledger if record["step"] < steps]
    times = collections.Counter(record["id"] for record in seen)
    return {
        "documents": len(times),
        "tokens": sum(record["tokens"] for record in seen),
        "rows": len({record["slot"] for record in seen}),
        "steps": len({record["step"] for record in seen}),
        "repeats": max(times.values(), default=0),
    }
