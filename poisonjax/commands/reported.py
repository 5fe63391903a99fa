"""Training as a command does it: whatever ends the run, its page is written."""

import signal
from collections.abc import Collection

import ml_collections

from poisonjax.commands.exit_codes import RESTART


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
