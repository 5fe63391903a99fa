"""How a run ends before its last step: asked to, by numbers that are no longer finite, or with its processes.

JAX is imported when it is needed: commands name these errors before they start it.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Diverged(RuntimeError):
    """The loss or its gradient is no longer finite."""


class Preempted(RuntimeError):
    """The process was asked to stop; all is saved, the same command goes on from there."""


class LostProcess(RuntimeError):
    """In a run of several processes, this one failed (`cause`), or lost another: end it at once."""

    def __init__(self, cause: BaseException):
        import jax

        # Collectives fail where another process ended; the run is sound up to its last checkpoint.
        self.cause, self.lost_another = cause, isinstance(cause, jax.errors.JaxRuntimeError)
        super().__init__(
            f"process {jax.process_index()} of {jax.process_count()} stops: {type(cause).__name__}: {cause}"
            + ("\nAnother process is dead, perhaps; its own output tells." if self.lost_another else "")
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM and Ctrl-C into a question asked between steps; a second Ctrl-C stops at once."""
    import jax
    from jax.experimental import multihost_utils

    asked = False

    def on_signal(number, frame):
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    # JAX's coordination service catches SIGTERM itself, so that all processes stop at the same step.
    together = jax.process_count() > 1
    signals = [signal.SIGINT] if together else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, on_signal) for number in signals}
    try:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step) if together else asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
