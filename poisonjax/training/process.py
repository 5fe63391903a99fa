"""One process of a run, by its launcher's variables."""

from collections.abc import Collection

import ml_collections

from poisonjax import processes
from poisonjax.run import rows
from poisonjax.startup import start_jax


def train_process(
    config: ml_collections.ConfigDict,
    workdir: str,
    twin_of: str | None = None,
    asked: Collection[str] = (),
    *,
    restart_exit_code: int = 1,
) -> rows.Summary | None:
    """Starts JAX, joins the other processes and trains; returns the summary in the first process, None in others.

    A run that hangs, or lost a process, ends with `restart_exit_code`. Raises what `training.loop.train` does.
    """
    start_jax(config.global_batch // config.optimizer.accumulate)
    processes.join(min(100, config.watchdog_seconds or 100), restart_exit_code)
    import jax

    from poisonjax.training.loop import train
    from poisonjax.training.watchdog import Watchdog

    summary = train(config, workdir, twin_of, Watchdog(config.watchdog_seconds, restart_exit_code), asked)
    return None if jax.process_index() else summary
