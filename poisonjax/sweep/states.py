"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

from poisonjax.runfolder import write_json
from poisonjax.sweep.grid import Run

Kind = Literal["pending", "running", "partial", "done", "failed"]

BEAT_SECONDS = 5
STALE_SECONDS = 90  # on another machine: a heartbeat older than that belongs to a process that is gone
HEARTBEAT, FAILURE, LOG = "heartbeat.json", "failure.json", "train.log"


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


def beats(folder: Path) -> bool:
    """Whether a process is at work on the run."""
    try:
        beat = json.loads((folder / HEARTBEAT).read_text())
        age = time.time() - (folder / HEARTBEAT).stat().st_mtime
    except (FileNotFoundError, ValueError):  # being written: then a moment old
        return False
    if age > STALE_SECONDS:
        return False
    return beat["host"] != socket.gethostname() or _alive(beat["pid"])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie answers too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


class Heartbeat:
    """Says that this process is at work on a run, until it ends; with `parent`, a process id, it stops with that."""

    def __init__(self, folder: Path, parent: int | None = None):
        self._path, self._parent = folder / HEARTBEAT, parent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"host": socket.gethostname(), "pid": os.getpid()})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        asked = False
        while not self._stop.wait(1 if self._parent else BEAT_SECONDS):
            self._path.touch()
            if self._parent and os.getppid() != self._parent and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)  # saves and stops
