"""`poisonjax evaluate`."""

import argparse
import concurrent.futures
import glob
import json
import subprocess
import sys
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("evaluate", help="evaluate the checkpoints of a run folder")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="run folders, or patterns such as 'runs/*'")
    parser.add_argument("--max-parallel", type=int, default=1, metavar="N", help="of several folders, so many at once")
    parser.add_argument("--steps", default="all", metavar="all|N,N", help="which checkpoints (default: all)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(func=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        steps = None if arguments.steps == "all" else [int(step) for step in arguments.steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {arguments.steps!r}: give all, or numbers like 100,200") from None
    folders = _run_folders(arguments.workdirs)
    if len(folders) > 1 or any(map(glob.has_magic, arguments.workdirs)):
        return _evaluate_each(folders, arguments)
    from poisonjax.run import RunFolder

    config = RunFolder(folders[0]).config
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.evaluation.offline import evaluate_run

    rows = evaluate_run(folders[0], steps, say=(lambda line: None) if arguments.json else print)
    if arguments.json:
        print(json.dumps(rows))
    return exit_codes.OK


def _run_folders(patterns: list[str]) -> list[str]:
    """The folders named, and of each pattern those that are run folders."""
    from poisonjax.run.folder import is_run

    folders: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            folders.append(pattern)
            continue
        found = [path for path in sorted(glob.glob(pattern)) if is_run(path)]
        if not found:
            raise ValueError(f"{pattern}: no run folder there (one with a config.json)")
        folders += found
    return list(dict.fromkeys(folders))


def _evaluate_each(folders: list[str], arguments: argparse.Namespace) -> int:
    """A process for each folder: they may have different shapes and stores."""
    if arguments.max_parallel < 1:
        raise ValueError(f"--max-parallel {arguments.max_parallel}: at least 1")

    def one(folder: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "poisonjax", "evaluate", folder, "--steps", arguments.steps]
        return subprocess.run(
            [*command, "--json"] if arguments.json else command, capture_output=True, text=True, check=False
        )

    rows, failed = {}, 0
    with concurrent.futures.ThreadPoolExecutor(arguments.max_parallel) as threads:
        for folder, done in zip(folders, threads.map(one, folders), strict=True):
            if done.returncode:
                failed += 1
                print(f"{folder}: {done.stderr.strip()}", file=sys.stderr)
            elif arguments.json:
                rows[folder] = json.loads(done.stdout)
            else:
                print("".join(f"{folder}  {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return exit_codes.FAILED if failed else exit_codes.OK
