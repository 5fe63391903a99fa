"""`poisonjax`, also as `python -m poisonjax`."""

import os
import signal
import socket
import sys
import threading
from typing import NoReturn

RESTART = 42  # commands/exit_codes.py
GRACE_SECONDS = 5


def start() -> NoReturn:
    """Runs the command that the process was started with, and exits with its code.

    Whoever asks the process to stop gets the code that means "the same command goes on", from here to the end: what is
    written stands whole at any instant. The training loop asks in its own way, between steps.
    """
    signal.signal(signal.SIGTERM, _stop)
    waker, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    threading.Thread(target=_stop_at_last, args=(waker,), daemon=True).start()
    from poisonjax.commands.main import main

    sys.exit(main())


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(RESTART)


def _stop_at_last(waker: socket.socket) -> None:
    """Python's handlers wait while a library is in its own code (a compilation, say): this thread doesn't."""
    while number := waker.recv(1):
        if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _stop:
            threading.Event().wait(GRACE_SECONDS)
            if signal.getsignal(signal.SIGTERM) is _stop:
                os._exit(RESTART)


if __name__ == "__main__":
    start()
