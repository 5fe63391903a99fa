"""A run that hangs ends with a message, instead of holding its machines for ever."""

import faulthandler
import os
import sys
import threading

import jax


class Watchdog:
    """Ends the process with `exit_code` where `progress` isn't called for `seconds` (0: never).

    A process waits without end for another one that hangs: neither JAX's heartbeats nor an exception tell, where
    the other's main thread alone stands still. Time in which this process itself was stopped (a laptop that
    sleeps, Ctrl-Z) doesn't count.
    """

    def __init__(self, seconds: float = 0, exit_code: int = 1):
        self.seconds, self.exit_code = seconds, exit_code
        self._doing, self._idle = "starting", 0.0
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        return self

    def start(self) -> None:
        """Watches from here on."""
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def progress(self, doing: str) -> None:
        """Says what begins now; it has the whole time again."""
        self._doing, self._idle = doing, 0.0

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        while not self._stop.wait(tick):
            self._idle += tick  # counted in ticks, not by the clock: see above
            if self._idle > self.seconds:
                self._end()

    def _end(self) -> None:
        print(
            f"poisonjax: process {jax.process_index()} of {jax.process_count()} made no progress for "
            f"{self.seconds:g} s while {self._doing} (config.watchdog_seconds). "
            f"{'Another process hangs or is dead, or' if jax.process_count() > 1 else 'The device or'} a disk doesn't "
            "answer; where this process stands:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        print("poisonjax: ended; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(self.exit_code)
