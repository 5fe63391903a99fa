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
    parser = commands.add_parser("evaluate", help="evaluate the checkpoints of a run folder, or any model")
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR|SPEC",
        help="run folders, or patterns such as 'runs/*'; with --config or --lm-eval a model: runs/a@400, hf:FOLDER, "
        "gguf:FILE",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE[:ARG]", help="ask the model what a run of this config is asked")
    what.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness (extra lm-eval), by commas")
    parser.add_argument("--include-path", metavar="DIR", help="of --lm-eval: a folder of tasks of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="of --lm-eval: so many documents a task")
    parser.add_argument("--chat", action="store_true", help="of --lm-eval: prompts by the model's chat template")
    parser.add_argument("--max-parallel", type=int, default=1, metavar="N", help="of several folders, so many at once")
    parser.add_argument("--steps", default="all", metavar="all|last|N,N", help="which checkpoints (default: all)")
    parser.add_argument(
        "--scorer",
        metavar="SPEC",
        help='another model scores what is generated ("": the model itself); kept apart, for a study\'s report',
    )
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if it was moved")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(func=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.config or arguments.lm_eval:
        if arguments.scorer is not None:
            raise ValueError("--scorer is of run folders; with --config give --config.eval.scorer=SPEC")
        return _evaluate_model(arguments)
    try:
        named: dict[str, Any] = {"all": None, "last": "last"}
        asked = arguments.steps
        steps = named[asked] if asked in named else [int(step) for step in asked.split(",")]
    except ValueError:
        raise ValueError(f"--steps {arguments.steps!r}: give all, last, or numbers like 100,200") from None
    folders = _run_folders(arguments.workdirs)
    if len(folders) > 1 or any(map(glob.has_magic, arguments.workdirs)):
        return _evaluate_each(folders, arguments)
    from poisonjax.run import RunFolder

    config = RunFolder(folders[0]).config
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.evaluation.offline import evaluate_run

    say = (lambda line: None) if arguments.json else print
    rows = evaluate_run(folders[0], steps, say=say, store=arguments.store, scorer=arguments.scorer)
    if arguments.json:
        print(json.dumps(rows))
    return exit_codes.OK


def _evaluate_model(arguments: argparse.Namespace) -> int:
    if len(arguments.workdirs) > 1:
        raise ValueError(f"--config and --lm-eval take one model, not {len(arguments.workdirs)}")
    (spec,) = arguments.workdirs
    if arguments.lm_eval:
        start_jax(rows=1)
        try:
            from poisonjax.evaluation.harness import evaluate_tasks
        except ImportError as error:
            raise ValueError(f"--lm-eval needs `pip install 'poisonjax[lm-eval]'` ({error})") from None
        from lm_eval.utils import make_table

        from poisonjax.weights import open_weights

        tasks = arguments.lm_eval.split(",")
        found = evaluate_tasks(open_weights(spec), tasks, arguments.include_path, arguments.limit, chat=arguments.chat)
        print(json.dumps(found, default=str) if arguments.json else make_table(found))
        return exit_codes.OK
    from poisonjax import config as config_lib

    config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    config_lib.check(config)
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.evaluation.offline import evaluate_model
    from poisonjax.evaluation.words import perplexities

    row = evaluate_model(spec, config)
    print(json.dumps(row) if arguments.json else f"{spec}  {perplexities(row)}")
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
        command += ["--store", arguments.store] if arguments.store else []
        command += ["--scorer", arguments.scorer] if arguments.scorer is not None else []
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
