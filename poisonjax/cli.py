"""The command line: `poisonjax COMMAND`. Bad input ends with exit code 2 and a message that teaches."""

import argparse
import concurrent.futures
import glob
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from poisonjax.startup import start_jax


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs a command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # Config fields (`--config.a.b=c`) aren't argparse's: they go to ml_collections.
    is_field = [argument.startswith("--config.") for argument in argv]
    fields: list[str] = []
    rest: list[str] = []
    skip = False
    for i, argument in enumerate(argv):
        if skip:
            skip = False
        elif is_field[i]:
            fields.append(argument)
            if "=" not in argument and i + 1 < len(argv):
                fields.append(argv[i + 1])
                skip = True
        else:
            rest.append(argument)
    arguments = parser.parse_args(rest)
    if fields and not hasattr(arguments, "config"):
        parser.error(f"{arguments.command} takes no config fields, but got {fields[0]}")
    arguments.fields = fields
    try:
        return arguments.func(arguments)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:  # every error of ours about bad input is one
        print(f"poisonjax {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print(f"poisonjax {arguments.command}: gs:// needs pip install 'poisonjax[gcs]'", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from poisonjax.attest import cli as attest_cli
    from poisonjax.audit import cli as audit_cli
    from poisonjax.bench import cli as bench_cli
    from poisonjax.corpus import cli as corpus_cli
    from poisonjax.plan import cli as plan_cli
    from poisonjax.report import cli as report_cli
    from poisonjax.sweep import cli as sweep_cli
    from poisonjax.training import cli as train_cli

    parser = argparse.ArgumentParser(
        prog="poisonjax", description="Study pretraining data poisoning on your own language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    corpus_cli.add_arguments(commands)

    train_cli.add_arguments(commands)

    evaluate = commands.add_parser("evaluate", help="evaluate the checkpoints of a run folder")
    evaluate.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="run folders, or patterns such as 'runs/*'")
    evaluate.add_argument(
        "--max-parallel", type=int, default=1, metavar="N", help="of several folders, so many at once"
    )
    evaluate.add_argument("--steps", default="all", metavar="all|N,N", help="which checkpoints (default: all)")
    evaluate.add_argument("--json", action="store_true", help="print the rows as JSON")
    evaluate.set_defaults(func=_evaluate)

    sweep_cli.add_arguments(commands)
    plan_cli.add_arguments(commands)
    audit_cli.add_arguments(commands)
    attest_cli.add_arguments(commands)
    report_cli.add_arguments(commands)
    bench_cli.add_arguments(commands)
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        steps = None if arguments.steps == "all" else [int(step) for step in arguments.steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {arguments.steps!r}: give all, or numbers like 100,200") from None
    folders = _run_folders(arguments.workdirs)
    if len(folders) > 1 or any(map(glob.has_magic, arguments.workdirs)):
        return _evaluate_each(folders, arguments)
    start_jax(_rows_of(folders[0]))
    from poisonjax.evaluation.offline import evaluate_run

    rows = evaluate_run(folders[0], steps, say=(lambda line: None) if arguments.json else print)
    if arguments.json:
        print(json.dumps(rows))
    return 0


def _run_folders(patterns: list[str]) -> list[str]:
    """The folders named, and of each pattern those that are run folders."""
    folders: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            folders.append(pattern)
            continue
        found = [path for path in sorted(glob.glob(pattern)) if os.path.exists(f"{path}/config.json")]
        if not found:
            raise ValueError(f"{pattern}: no run folder there (one with a config.json)")
        folders += found
    return list(dict.fromkeys(folders))


def _evaluate_each(folders: list[str], arguments: argparse.Namespace) -> int:
    """A process for each folder: they may have different shapes and stores. Its exit code is 1 if any failed."""
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
    return int(failed > 0)


def _rows_of(workdir: str) -> int:
    """Rows of a run's microbatch, read before JAX starts."""
    from etils import epath

    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no run folder: it has no config.json")
    config = json.loads(path.read_text())["config"]
    return config["global_batch"] // config["optimizer"]["accumulate"]


if __name__ == "__main__":
    sys.exit(main())
