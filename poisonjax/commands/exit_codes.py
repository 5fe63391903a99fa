"""What a process tells the one that started it, by the code that it exits with."""

OK = 0
FAILED = 1  # the run diverged, the audit found a difference, the plan doesn't fit, ...
BAD_INPUT = 2
# Stopped, or hung, and what is saved is good: the same command goes on. XPK restarts 42 and 127-255 only.
RESTART = 42
INTERRUPTED = 130  # by Ctrl-C, as shells have it
BROKEN_PIPE = 141  # nobody reads what it prints


def of(error: BaseException) -> int | None:
    """The code for an error that a library raised; None for one that is a fault of ours, and shows its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ValueError | OSError):  # ours about bad input are ValueErrors; a full or read-only disk, ...
        return BAD_INPUT
    if not isinstance(error, RuntimeError):
        return None
    from poisonjax.training.stop import Diverged, LostProcess, Preempted

    if isinstance(error, LostProcess):
        return RESTART if error.lost_another else of(error.cause) or FAILED
    return RESTART if isinstance(error, Preempted) else FAILED if isinstance(error, Diverged) else None
