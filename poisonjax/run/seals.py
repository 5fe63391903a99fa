"""Seals: chains over a file's lines, which each checkpoint's record holds (I5).

Who edits, drops or adds a line of a run has to change the record of every later checkpoint too.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from poisonjax.run.rows import Environment, Seal

EMPTY: Seal = {"lines": 0, "chain": ""}


def extended(seal: Seal, line: bytes) -> Seal:
    """The seal of a file with one line more, given without its end."""
    chain = hashlib.sha256(seal["chain"].encode() + line).hexdigest()
    return {"lines": seal["lines"] + 1, "chain": chain}


def of_lines(lines: Iterable[bytes]) -> Seal:
    """The seal of a file of these lines."""
    seal = EMPTY
    for line in lines:
        seal = extended(seal, line)
    return seal


def broken(seal: Seal, lines: Sequence[bytes]) -> str | None:
    """What keeps the first lines from being those sealed; None: nothing."""
    if len(lines) < seal["lines"]:
        return f"has {len(lines)} lines of the {seal['lines']}"
    return None if of_lines(lines[: seal["lines"]]) == seal else f"one of its first {seal['lines']} lines isn't that"


def environment_lines(environment: Environment) -> list[bytes]:
    """A line for each environment that the run ran in, as they are sealed."""
    lives: list[Mapping[str, Any]] = [*environment["earlier"], environment]
    return [json.dumps({name: life[name] for name in life if name != "earlier"}).encode() for life in lives]
