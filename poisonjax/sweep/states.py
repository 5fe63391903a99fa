"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

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
    """Whether a process is at work on the run: one of this machine that lives, or a fresh heartbeat of another's."""
    path = folder / HEARTBEAT
    try:
        age = time.time() - path.stat().st_mtime
        beat = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:  # just claimed
        return age <= STALE_SECONDS
    if beat["host"] == socket.gethostname() and beat["boot"] == _boot():
        return _started(beat["pid"]) == beat["started"]
    return age <= STALE_SECONDS


def _boot() -> str:
    """Tells this machine, and this container of it, from others of the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a living process started, so that another one with its number isn't taken for it; "" where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return str(pid) if not Path("/proc").exists() and _alive(pid) else ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Taken(RuntimeError):
    """Another process is at work on the run."""


class Heartbeat:
    """Claims a run for this process until it ends; with `parent`, a process id, the process stops with that.

    Entering raises Taken where another process has the run.
    """

    def __init__(self, folder: Path, parent: int | None = None):
        self._path, self._parent = folder / HEARTBEAT, parent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and not beats(folder):  # of one that is gone; of two who see that, one gets it
            with contextlib.suppress(FileNotFoundError):
                gone = self._path.with_name(f"{HEARTBEAT}.{os.getpid()}")
                self._path.rename(gone)
                gone.unlink()
        try:
            claimed = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise Taken(f"{folder.name}: another process is at it") from None
        beat = {
            "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid()),
        }  # fmt: skip
        with os.fdopen(claimed, "w") as file:
            file.write(json.dumps(beat) + "\n")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        asked = False
        while not self._stop.wait(1 if self._parent else BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network disk that doesn't answer for a while
                os.utime(self._path)
            if self._parent and os.getppid() != self._parent and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)  # saves and stops
