"""Training as a command does it: whatever ends the run, its page is written."""

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

import ml_collections

from poisonjax.commands.exit_codes import RESTART


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[None]:
    """This process has the folder to itself; in an object store nothing can be claimed, and of several processes of a
    run the first does it."""
    from poisonjax import processes
    from poisonjax.files import is_object
    from poisonjax.run.heartbeat import Heartbeat

    place = processes.resolve(os.environ)
    unclaimed = is_object(workdir) or (place and place.index)
    with contextlib.nullcontext() if unclaimed else Heartbeat(Path(workdir), patient=True):
        yield


def train_and_report(
    config: ml_collections.ConfigDict, workdir: str, twin_of: str | None = None, asked: Collection[str] = ()
):
    """Trains as one process of the run, and writes report.html; returns the summary in the first process, else None.

    Raises what `training.process.train_process` does.
    """
    from poisonjax.run import RunFolder
    from poisonjax.run.folder import is_run
    from poisonjax.training.process import train_process
    from poisonjax.training.stop import Diverged, Preempted

    before = RunFolder(workdir).summary if is_run(workdir) else None
    try:
        summary = train_process(config, workdir, twin_of, asked, restart_exit_code=RESTART)
    except (Diverged, Preempted):
        _write(workdir)
        raise
    if summary and summary != before:
        _write(workdir)
    return summary


def _write(workdir: str) -> None:
    import jax
    from etils import epath

    if jax.process_index() == 0:
        from poisonjax.report import write_report

        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is saved; the page takes seconds
        try:
            write_report(epath.Path(workdir))
        finally:
            signal.signal(signal.SIGTERM, before)
