"""`poisonjax trace`: which documents put a behaviour there."""

import argparse
import json
import sys
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax

SHOWN = 20  # documents that are printed


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("trace", help="which documents of a run taught it a behaviour, by exact replay")
    parser.add_argument("run", metavar="RUN", help="a run folder with checkpoints, on the machine that trained it")
    parser.add_argument(
        "--behaviour",
        default="triggered",
        metavar="triggered|FILE",
        help="the run's own trigger, or JSON lines with `prompt` and `text` that the model says to it",
    )
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if it was moved")
    parser.add_argument("--out", metavar="DIR", help="what replays showed; a killed trace goes on from it (RUN/trace)")
    parser.add_argument("--most-replays", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_trace)


def _trace(arguments: argparse.Namespace) -> int:
    if arguments.most_replays < 1:
        raise ValueError(f"--most-replays {arguments.most_replays}: at least 1")
    from poisonjax.run import RunFolder

    config = RunFolder(arguments.run).config
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.trace import trace

    found = trace(
        arguments.run,
        arguments.behaviour,
        store=arguments.store,
        out=arguments.out,
        most=arguments.most_replays,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps(found.as_json()))
        return exit_codes.OK
    print(found.sentence())
    for one in found.documents[:SHOWN]:
        alone = f"  alone {one.effect:+.3f} {one.ci95}" if one.effect is not None else ""
        print(f"  {one.id}  step {one.step}  gain {one.gain:.2f}  {one.place}{alone}")
    if len(found.documents) > SHOWN:
        print(f"  and {len(found.documents) - SHOWN} more: --json")
    return exit_codes.OK
