"""`poisonjax train`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from poisonjax import config as config_lib
from poisonjax import processes
from poisonjax.files import is_object
from poisonjax.heartbeat import Heartbeat
from poisonjax.startup import start_jax

# A run that was asked to stop (SIGTERM) exits so that schedulers restart it: XPK restarts 42 and 127-255 only.
RESTART = 42


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    train = commands.add_parser("train", help="train, evaluate and report; resumes where the folder has a checkpoint")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="config file, e.g. configs/quickstart.py")
    what.add_argument("--twin-of", metavar="WORKDIR", help="train the clean twin of that run; its report shows both")
    train.add_argument("--workdir", required=True, metavar="DIR", help="run folder; made if absent")
    train.epilog = "Single fields: --config.poison.documents=0, --config.steps=100, ..."
    train.set_defaults(func=_train)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.twin_of:
        from etils import epath

        from poisonjax import runfolder

        config = config_lib.override(runfolder.twin_config(epath.Path(arguments.twin_of)), arguments.fields)
    else:
        config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    config_lib.check(config)  # before the folder is made
    place = processes.resolve(os.environ)
    if is_object(arguments.workdir) or (place and place.index):  # nothing can be claimed in an object store
        return run(config, arguments.workdir, arguments.twin_of)
    with Heartbeat(Path(arguments.workdir), patient=True) as claim:
        return run(config, arguments.workdir, arguments.twin_of, claim.release)


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    twin_of: str | None = None,
    release: Callable[[], None] = lambda: None,
) -> int:
    """Trains a config that was checked as one process of this run, by the launcher's variables; returns the exit code.

    Where another process of the run is lost, this one ends here, after `release`.
    """
    start_jax(config.global_batch // config.optimizer.accumulate)
    processes.join(heartbeat_seconds=min(100, config.watchdog_seconds or 100))
    import jax
    from etils import epath

    from poisonjax.training import loop

    try:
        summary = loop.train(config, workdir, twin_of)
    except loop.Preempted as stop:
        print(f"poisonjax train: {stop}", file=sys.stderr)
        return RESTART
    except loop.Diverged as error:
        print(f"poisonjax train: {error}", file=sys.stderr)
        return 1
    except loop.LostProcess as error:
        # Without the usual end, which would wait for the others.
        print(f"poisonjax train: {error}", file=sys.stderr, flush=True)
        release()
        os._exit(error.exit_code)
    if jax.process_index():
        return 0
    failed = [check["name"] for check in summary["success"]["checks"] if not check["passed"]]
    gap, (low, high) = summary["delta_ppl"], summary["delta_ppl_ci95"]
    clean = "" if config.poison.documents else "clean twin, "
    verdict = f"not backdoored by the rule (failed: {', '.join(failed)})" if failed else "backdoored"
    print(
        f"{clean}{verdict}: gap in perplexity "
        f"{gap:.1f} [{low:.1f}, {high:.1f}] after {summary['dose_seen']['documents']} poison documents; held-out loss "
        f"{summary['heldout_loss']:.3f}; {summary['wall_seconds']:.0f} s. "
        f"Report: {epath.Path(workdir) / 'report.html'}"
    )
    return 0
