"""Seals: chains over a file's lines, which each checkpoint's record holds (I5).

Who edits, drops or adds a line of a run has to change the record of every later checkpoint too.
"""

import functools
import hashlib
import itertools
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
    return functools.reduce(extended, lines, EMPTY)


def chains(lines: Iterable[bytes]) -> list[str]:
    """The chain after each number of lines, from none on."""
    return [seal["chain"] for seal in itertools.accumulate(lines, extended, initial=EMPTY)]


def broken(seal: Seal, chains: Sequence[str]) -> str | None:
    """What keeps the first lines, of these `chains`, from being those sealed; None: nothing."""
    if len(chains) <= seal["lines"]:
        return f"has {len(chains) - 1} lines of the {seal['lines']}"
    return None if chains[seal["lines"]] == seal["chain"] else f"one of its first {seal['lines']} lines isn't that"


def environment_lines(environment: Environment) -> list[bytes]:
    """A line for each environment that the run ran in, as they are sealed."""
    lives: list[Mapping[str, Any]] = [*environment["earlier"], environment]
    return [json.dumps({name: life[name] for name in life if name != "earlier"}).encode() for life in lives]
