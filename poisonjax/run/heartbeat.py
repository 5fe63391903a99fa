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

BEAT_SECONDS = 5
STALE_SECONDS = 90  # on another machine: a heartbeat older than that belongs to a process that is gone
HEARTBEAT = "heartbeat.json"


def is_running(folder: Path, *, elsewhere: bool = False) -> bool:
    """Whether a process is at work on the run: one of this machine that lives, or a fresh heartbeat of another's; with
    `elsewhere`, the latter alone."""
    path = folder / HEARTBEAT
    try:
        age = time.time() - path.stat().st_mtime
        beat = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:  # just claimed
        return age <= STALE_SECONDS
    if beat["host"] == socket.gethostname() and beat["boot"] == _boot():
        return not elsewhere and _started(beat["pid"]) == beat["started"]
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


def _whose(path: Path) -> str:
    try:
        beat = json.loads(path.read_text())
    except (OSError, ValueError):  # just claimed, or just gone
        return ""
    return f" (process {beat['pid']} on {beat['host']})"


class Taken(ValueError):
    """Another process is at work on the run."""


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
        if self._patient:
            self._wait()
        folder = self._path.parent
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if self._path.exists() and not is_running(folder):  # of one that is gone
                self._path.unlink(missing_ok=True)
            try:
                claimed = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                raise self._taken() from None
        with os.fdopen(claimed, "w") as file:
            file.write(json.dumps(self._beat) + "\n")
        self._thread.start()
        return self

    def _taken(self) -> Taken:
        return Taken(
            f"{self._path.parent}: another process is at it{_whose(self._path)}; wait for its end, stop it, or choose "
            "another folder"
        )

    def _wait(self) -> None:
        """Until the heartbeat of another machine is stale, or beats again."""
        first = None
        while is_running(self._path.parent, elsewhere=True):
            with contextlib.suppress(FileNotFoundError):
                touched = self._path.stat().st_mtime
                if first is None:
                    first = touched
                    print(
                        f"{self._path.parent}: another process was at it{_whose(self._path)} less than "
                        f"{STALE_SECONDS} s ago; waiting to see whether it lives",
                        file=sys.stderr,
                        flush=True,
                    )
                if touched != first:
                    return
            time.sleep(1)

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
        try:
            return json.loads(self._path.read_text()) == self._beat
        except (OSError, ValueError):  # gone, or a network disk that doesn't answer: nobody else's
            return True

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the run up."""
        self._stop.set()
        self._thread.join()
        if self._mine():
            self._path.unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder
                self._path.parent.rmdir()

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
