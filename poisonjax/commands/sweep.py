"""`poisonjax sweep run|status|collect|report|emit`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poisonjax.commands import exit_codes
from poisonjax.commands.reported import train_and_report

if TYPE_CHECKING:
    from poisonjax.sweep import Sweep

ENDED = {"done": exit_codes.OK, "failed": exit_codes.FAILED, "stopped": exit_codes.RESTART}


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("sweep", help="train, collect and analyse a grid of runs")
    parts = parser.add_subparsers(dest="part", required=True, metavar="run|status|collect|report|emit")

    def part(name: str, what: str, function: Any) -> argparse.ArgumentParser:
        made = parts.add_parser(name, help=what, description=what)
        made.add_argument("config", metavar="CONFIG", help="config file with a sweep(add), FILE[:ARG]")
        made.add_argument("--workdir", required=True, metavar="DIR", help="each run's folder lies in it")
        made.set_defaults(func=function)
        return made

    run = part("run", "train every run that isn't done; partial ones resume", _run)
    how = run.add_mutually_exclusive_group()
    how.add_argument("--index", type=int, metavar="I", help="train run I alone, in this process (job arrays)")
    run.add_argument("--max-parallel", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    how.add_argument(
        "--population",
        type=int,
        metavar="N",
        help="train up to N runs of one shape as one program: pays on an accelerator with small models",
    )
    run.add_argument("--retry-failed", action="store_true", help="train failed runs again")
    how.add_argument("--prepare", action="store_true", help="build the shared token stores, and stop")
    how.add_argument("--dry-run", action="store_true", help="list the runs and what they cost, and stop")

    status = part("status", "how far each run is", _status)
    status.add_argument("--json", action="store_true", help="print one JSON object")

    part("collect", "one table: a row a run x evaluation x variant, as CSV and Parquet", _collect)

    report = part("report", "analysis of the finished runs as a page with figures", _report)
    report.add_argument("--json", action="store_true", help="print the analysis as JSON")
    report.add_argument(
        "--self-test",
        type=int,
        metavar="N",
        help="analyse N simulated studies of this design whose truth is known (each law; ratios between conditions), "
        "instead; exit code 1 where they are read wrongly too often",
    )

    emit = parts.add_parser("emit", help="print a cluster's job array for a sweep")
    emit.add_argument("scheduler", choices=("slurm", "k8s"), help="whose: SLURM's or Kubernetes'")
    emit.add_argument("config", metavar="CONFIG", help="as of `sweep run`")
    emit.add_argument("--workdir", required=True, metavar="DIR", help="as of `sweep run`, on the cluster: absolute")
    emit.add_argument("--image", default="IMAGE", help="k8s: the container's image")
    emit.set_defaults(func=_emit)


def _open(arguments: argparse.Namespace) -> tuple["Sweep", Path]:
    from poisonjax.sweep import SweepError, load

    if "://" in arguments.workdir:
        raise SweepError(f"--workdir {arguments.workdir}: a sweep's folder must lie on a (shared) disk")
    return load(arguments.config, arguments.fields), Path(arguments.workdir).resolve()


def _run(arguments: argparse.Namespace) -> int:
    from poisonjax.run.heartbeat import Taken
    from poisonjax.sweep import SweepError, board, launch
    from poisonjax.sweep.states import look, search_status

    sweep, workdir = _open(arguments)
    if arguments.max_parallel < 1:
        raise SweepError(f"--max-parallel {arguments.max_parallel}: at least 1")
    if arguments.dry_run:
        sweep, states = look(sweep, workdir)
        print(board.budget(sweep))
        for run in sweep.runs:
            print(f"{run.slot}  {run.id}  {states[run.id].kind}  {board.flops(run):.3g} FLOPs")
        for of in sweep.searches:
            print(search_status(of, sweep.runs, states))
        return exit_codes.OK
    launch.claim(sweep, workdir)
    if arguments.index is not None:
        try:
            launch.train_one(sweep, workdir, arguments.index, train_and_report)
        except Taken as taken:
            print(taken, file=sys.stderr)
            return exit_codes.RESTART  # not done: the scheduler should look again
        return exit_codes.OK
    launch.prepare(sweep)
    if arguments.prepare:
        return exit_codes.OK
    if arguments.population is not None:
        return _populations(sweep, workdir, arguments)

    def command(index: int) -> list[str]:
        where = ["--workdir", str(workdir), "--index", str(index)]
        return [sys.executable, "-m", "poisonjax", "sweep", "run", sweep.spec, *where, *arguments.fields]

    ended = launch.train_all(
        sweep,
        workdir,
        command,
        restart_code=exit_codes.RESTART,
        parallel=arguments.max_parallel,
        retry_failed=arguments.retry_failed,
    )
    return ENDED[ended]


def _populations(sweep: "Sweep", workdir: Path, arguments: argparse.Namespace) -> int:
    from etils import epath

    from poisonjax.report import write_report
    from poisonjax.sweep import SweepError, launch

    if arguments.population < 1:
        raise SweepError(f"--population {arguments.population}: at least 1")
    ended = launch.train_populations(
        sweep,
        workdir,
        arguments.population,
        retry_failed=arguments.retry_failed,
        trained=lambda folder: write_report(epath.Path(folder)),
    )
    return ENDED[ended]


def _status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from poisonjax.sweep import board
    from poisonjax.sweep.states import look, search_status

    sweep, workdir = _open(arguments)
    sweep, states = look(sweep, workdir)
    if arguments.json:
        rows = [
            {"run": id, "state": s.kind, "step": s.done, "steps": s.steps, "detail": s.detail}
            for id, s in states.items()
        ]
        searches = [search_status(of, sweep.runs, states) for of in sweep.searches]
        print(json.dumps([*rows, *(of.as_json() for of in searches)]))
    else:
        Console().print(board.table(sweep, states))
    return exit_codes.OK


def _collect(arguments: argparse.Namespace) -> int:
    from poisonjax.sweep import SweepError, collect

    sweep, workdir = _open(arguments)
    if not workdir.exists():
        raise SweepError(f"{workdir}: no such folder; `poisonjax sweep run` makes it")
    for path in collect.write(sweep, workdir):
        print(path)
    return _told_damage(sweep, workdir)


def _told_damage(sweep: "Sweep", workdir: Path) -> int:
    """Names runs that can't be read, and were left out; the exit code."""
    from poisonjax.run.folder import is_run
    from poisonjax.sweep.states import damage, decided

    runs = decided(sweep, workdir).runs
    wrong = [found for run in runs if is_run(workdir / run.id) and (found := damage(workdir / run.id))]
    for found in wrong:
        print(f"left out: {found}", file=sys.stderr)
    return exit_codes.FAILED if wrong else exit_codes.OK


def _report(arguments: argparse.Namespace) -> int:
    from poisonjax.report import study, study_selftest
    from poisonjax.sweep import SweepError

    sweep, workdir = _open(arguments)
    if arguments.self_test is None:
        made = study.write(sweep, workdir)
        print(json.dumps(study.finite(made.as_json())) if arguments.json else made)
        return _told_damage(sweep, workdir)
    if arguments.self_test < 1:
        raise SweepError(f"--self-test {arguments.self_test}: at least 1 study")
    found = study_selftest.self_test(sweep, arguments.self_test, say=(lambda line: None) if arguments.json else print)
    if arguments.json:
        print(json.dumps(found))
    return exit_codes.OK if found["good"] else exit_codes.FAILED


def _emit(arguments: argparse.Namespace) -> int:
    from poisonjax.sweep import load
    from poisonjax.sweep.emit import EMITTERS

    sweep, emit = load(arguments.config, arguments.fields), EMITTERS[arguments.scheduler]
    script = emit(sweep, arguments.workdir, arguments.fields, image=arguments.image, restart_code=exit_codes.RESTART)
    print(script, end="")
    return exit_codes.OK
