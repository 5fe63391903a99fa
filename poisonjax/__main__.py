"""`poisonjax`, also as `python -m poisonjax`."""

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from poisonjax.commands.exit_codes import RESTART

if TYPE_CHECKING:
    from socket import socket

GRACE_SECONDS = 2  # for the main thread


def start() -> NoReturn:
    """Runs the command that the process was started with, and exits with its code.

    Whoever asks the process to stop gets the code that means "the same command goes on", from here to the end: what is
    written stands whole at any instant. The training loop asks in its own way, between steps.
    """
    signal.signal(signal.SIGTERM, _stop)  # before anything that takes time
    import socket
    import threading

    waker, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    threading.Thread(target=_stop_at_last, args=(waker,), daemon=True).start()
    from poisonjax.commands.main import main

    sys.exit(main())


def _stop(number: int, frame: object) -> NoReturn:
    """At once: an exception may be lost in a library's callback, and what stands on disks is whole."""
    heartbeats = sys.modules.get("poisonjax.run.heartbeat")
    for held in [*heartbeats.HELD] if heartbeats else []:
        held.drop()
    os.write(2, b"poisonjax: asked to stop; the same command goes on from what is saved\n")
    os._exit(RESTART)


def _stop_at_last(waker: "socket") -> None:
    """Python's handlers wait while a library is in its own code (a compilation, say): this thread doesn't."""
    while number := waker.recv(1):
        if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _stop:
            time.sleep(GRACE_SECONDS)
            _stop(signal.SIGTERM, None)


if __name__ == "__main__":
    start()
