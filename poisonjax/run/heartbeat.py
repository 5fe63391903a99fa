"""Who is at work on a run folder: one process at a time, told by a file that it keeps touching."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5
STALE_SECONDS = 90  # on another machine: a heartbeat older than that belongs to a process that is gone
HEARTBEAT = "heartbeat.json"


def is_running(folder: Path) -> bool:
    """Whether a process is at work on the run: one of this machine that lives, or a fresh heartbeat of another's."""
    path = folder / HEARTBEAT
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    beat = _read(path)
    if beat and (beat["host"], beat["boot"]) == (socket.gethostname(), _boot()):
        return _started(beat["pid"]) == beat["started"]
    # One of the future was dated by a clock that isn't ours, and tells as little as an old one.
    return abs(age) <= STALE_SECONDS


def _read(path: Path) -> dict[str, Any] | None:
    """What a heartbeat says; None for one that was just claimed, is just gone, or is damaged."""
    try:
        beat = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    kinds = {"host": str, "boot": str, "pid": int, "started": str}
    return beat if isinstance(beat, dict) and all(type(beat.get(n)) is kind for n, kind in kinds.items()) else None


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


def _whose(path: Path) -> str:
    beat = _read(path)
    return "" if not beat else f" (process {beat['pid']} on {beat['host']})"


class Taken(ValueError):
    """Another process is at work on the run."""


HELD: set["Heartbeat"] = set()  # by this process


class Heartbeat:
    """Claims a run for this process until it ends; with `parent`, a process id, the process stops with that.

    Entering raises Taken where another process has the run. One on another machine that was killed still seems to have
    it for `STALE_SECONDS`: a `patient` claim waits that long, unless it is seen to live.
    """

    def __init__(self, folder: Path, parent: int | None = None, *, patient: bool = False):
        self._path, self._parent, self._patient = folder / HEARTBEAT, parent, patient
        self._beat = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        folder = self._path.parent
        dead = self._watched()
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            # Of one that is gone.
            if self._path.exists() and (self._touched() == dead or not is_running(folder)):
                self._path.unlink(missing_ok=True)
            try:
                claimed = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                raise self._taken() from None
        with os.fdopen(claimed, "w") as file:
            file.write(json.dumps(self._beat) + "\n")
        HELD.add(self)
        self._thread.start()
        return self

    def _taken(self) -> Taken:
        return Taken(
            f"{self._path.parent}: another process is at it{_whose(self._path)}; wait for its end, stop it, or choose "
            "another folder"
        )

    def _touched(self) -> float | None:
        try:
            return self._path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _watched(self) -> float | None:
        """When a heartbeat of another machine was touched last, where it is seen not to beat; raises Taken where it
        does. Clocks of two machines differ: its date alone tells little."""
        beat, folder = _read(self._path), self._path.parent
        here = beat and (beat["host"], beat["boot"]) == (self._beat["host"], self._beat["boot"])
        fresh, touched = is_running(folder), self._touched()
        if here or touched is None or (fresh and not self._patient):
            return None
        seconds = STALE_SECONDS if fresh else 2 * BEAT_SECONDS + 1
        print(
            f"{folder}: another process was at it{_whose(self._path)}; waiting {seconds} s to see whether it lives",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._touched() is not None:
            if self._touched() != touched:
                raise self._taken()
            time.sleep(min(1, BEAT_SECONDS))
        return touched

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One claim at a time: who finds a heartbeat stale must not remove the fresh one of another who did too."""
        lock = self._path.with_name(f"{HEARTBEAT}.claim")
        for _ in range(40):
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - lock.stat().st_mtime > STALE_SECONDS:  # it was killed meanwhile
                        lock.unlink()
                time.sleep(0.05)
        else:
            raise self._taken()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def _mine(self) -> bool:
        """Whether the file still is this process's: one that stood still for long may have lost it."""
        beat = _read(self._path)
        return beat is None or beat == self._beat  # None: gone, or a network disk that doesn't answer: nobody else's

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the run up."""
        self._stop.set()
        self._thread.join()
        self.drop()
        if self._made:
            with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder
                self._path.parent.rmdir()

    def drop(self) -> None:
        """Takes the file away, where the process ends without more ado."""
        HELD.discard(self)
        if self._mine():
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        asked = False
        while not self._stop.wait(1 if self._parent else BEAT_SECONDS):
            mine = self._mine()
            if mine:
                with contextlib.suppress(OSError):
                    os.utime(self._path)
            orphan = self._parent and os.getppid() != self._parent
            if (orphan or not mine) and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)  # saves and stops
