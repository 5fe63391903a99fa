"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import is_run
from poisonjax.run.heartbeat import is_running
from poisonjax.sweep.grid import PlannedRun

Kind = Literal["pending", "running", "partial", "done", "failed"]

FAILURE, LOG = "failure.json", "train.log"


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is: `partial` has begun and nobody is at it, so the next launch resumes it."""

    kind: Kind
    done: int  # optimizer steps
    steps: int
    detail: str = ""
    summary: rows.Summary | None = None


def status(folder: Path, run: PlannedRun) -> RunStatus:
    """What `folder` says of the run."""
    steps = run.config.steps
    summary = RunFolder(folder).summary if is_run(folder) else None
    if summary and summary["status"] == "finished":
        return RunStatus("done", steps, steps, "", summary)
    digests = folder / rows.DIGESTS
    done = digests.read_bytes().count(b"\n") if digests.exists() else 0
    if is_running(folder):
        return RunStatus("running", done, steps)
    if failure := _failure(folder):
        return RunStatus("failed", done, steps, failure["error"])
    return RunStatus("partial" if done else "pending", done, steps)


def _failure(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / FAILURE).read_text())
    except FileNotFoundError:
        return {}
