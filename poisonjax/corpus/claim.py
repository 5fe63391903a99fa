"""A folder claimed for one piece of work: its plan lies in plan.json, and another plan's work is refused."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources import Unit
from poisonjax.files import parse_json, write_whole


def units_sha256(units: Iterable[Unit]) -> str:
    """Of the units' names: sources that changed have others."""
    return hashlib.sha256("\n".join(unit.name for unit in units).encode()).hexdigest()


def claim(folder: epath.Path, plan: Any, none: str, another: str) -> None:
    """Writes the plan, a dataclass; or raises CorpusError where the folder has another (`another`), or holds files that
    are of `none`."""
    path, here = folder / "plan.json", dataclasses.asdict(plan)
    if not path.exists():
        if folder.exists() and any(not of.name.startswith("plan.json.") for of in folder.iterdir()):  # a kill's, here
            raise CorpusError(f"{folder} isn't empty and holds no {none}: use another --out")
        folder.mkdir(parents=True, exist_ok=True)
        # Of several machines, each writes under a name of its own.
        write_whole(path, json.dumps(here, indent=1) + "\n", suffix=f"partial.{os.urandom(4).hex()}")
    there = parse_json(path.read_bytes())
    here = {name: value for name, value in here.items() if value != "" or name in there}  # fields added later
    if differing := [f"{n}: {there.get(n)!r} there, {here[n]!r} here" for n in here if there.get(n) != here[n]]:
        raise CorpusError(f"{folder} holds {another}: {'; '.join(differing)}. Use another --out, or remove it")
