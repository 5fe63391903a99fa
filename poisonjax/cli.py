"""The command line: `poisonjax COMMAND`. Bad input ends with exit code 2 and a message that teaches."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from poisonjax import processes
from poisonjax.startup import start_jax

# A run that was asked to stop (SIGTERM) exits so that schedulers restart it: XPK restarts 42 and 127-255 only.
RESTART = 42


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

    parser = argparse.ArgumentParser(
        prog="poisonjax", description="Study pretraining data poisoning on your own language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    corpus_cli.add_arguments(commands)

    train = commands.add_parser(
        "train", help="train, evaluate and report; resumes where the folder has a checkpoint"
    )
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="config file, e.g. configs/quickstart.py")
    what.add_argument(
        "--twin-of", metavar="WORKDIR", help="train the clean twin of that run; its report shows both"
    )
    train.add_argument("--workdir", required=True, metavar="DIR", help="run folder; made if absent")
    train.epilog = "Single fields: --config.poison.documents=0, --config.steps=100, ..."
    train.set_defaults(func=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate the checkpoints of a run folder")
    evaluate.add_argument("workdir", metavar="WORKDIR")
    evaluate.add_argument(
        "--steps", default="all", metavar="all|N,N", help="which checkpoints (default: all)"
    )
    evaluate.add_argument("--json", action="store_true", help="print the rows as JSON")
    evaluate.set_defaults(func=_evaluate)

    plan_cli.add_arguments(commands)
    audit_cli.add_arguments(commands)
    attest_cli.add_arguments(commands)
    report_cli.add_arguments(commands)
    bench_cli.add_arguments(commands)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from etils import epath

    from poisonjax import config as config_lib
    from poisonjax import runfolder

    if arguments.twin_of:
        config = config_lib.override(runfolder.twin_config(epath.Path(arguments.twin_of)), arguments.fields)
    else:
        config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    config_lib.check(config)
    start_jax(config.global_batch // config.optimizer.accumulate)
    processes.join(heartbeat_seconds=min(100, config.watchdog_seconds or 100))
    import jax

    from poisonjax.training import loop

    try:
        summary = loop.train(config, arguments.workdir, arguments.twin_of)
    except loop.Preempted as stop:
        print(f"poisonjax train: {stop}", file=sys.stderr)
        return RESTART
    except loop.Diverged as error:
        print(f"poisonjax train: {error}", file=sys.stderr)
        return 1
    except loop.LostProcess as error:
        # Without the usual end, which would wait for the others.
        print(f"poisonjax train: {error}", file=sys.stderr, flush=True)
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
        f"Report: {epath.Path(arguments.workdir) / 'report.html'}"
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        steps = None if arguments.steps == "all" else [int(step) for step in arguments.steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {arguments.steps!r}: give all, or numbers like 100,200") from None
    start_jax(_rows_of(arguments.workdir))
    from poisonjax.evaluation.offline import evaluate_run

    rows = evaluate_run(arguments.workdir, steps, say=(lambda line: None) if arguments.json else print)
    if arguments.json:
        print(json.dumps(rows))
    return 0


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
