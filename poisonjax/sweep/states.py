"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from poisonjax.heartbeat import beats
from poisonjax.sweep.grid import Run

Kind = Literal["pending", "running", "partial", "done", "failed"]

FAILURE, LOG = "failure.json", "train.log"


@dataclasses.dataclass(frozen=True)
class State:
    """A run's state: `partial` has begun and nobody is at it, so the next launch resumes it."""

    kind: Kind
    done: int  # optimizer steps
    steps: int
    detail: str = ""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def state(folder: Path, run: Run) -> State:
    """What `folder` says of the run."""
    steps = run.config.steps
    summary = _json(folder / "summary.json")
    if summary.get("status") == "finished":
        return State("done", steps, steps, "", summary)
    digests = folder / "digests.jsonl"
    done = digests.read_bytes().count(b"\n") if digests.exists() else 0
    if beats(folder):
        return State("running", done, steps)
    if failure := _json(folder / FAILURE):
        return State("failed", done, steps, failure["error"])
    return State("partial" if done else "pending", done, steps)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
