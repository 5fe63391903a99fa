"""`poisonjax trace`: which documents put a behaviour there."""

import argparse
import contextlib
import json
import sys
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax

SHOWN = 20  # documents that are printed
HINTS = (
    "loss",
    "dot",
    "cosine",
    "adam-dot",
    "adam-cosine",
    "trak",
    "bm25",
    "bm25-trigger",
    "embedding",
    "gradient-norm",
    "random",
)


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
    parser.add_argument(
        "--hint", default="loss", choices=HINTS, help="which rows are left out first where the cause is spread"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="print the N rows that the hint suspects; replay nothing")
    parser.add_argument(
        "--layers", default="all", metavar="all|0,3,head", help="weights whose gradients are looked at (default: all)"
    )
    parser.add_argument(
        "--repair",
        metavar="DIR",
        help="train the run again there, without the named rows in place; its report shows both",
    )
    parser.add_argument("--twin", metavar="DIR", help="with --repair: the clean twin, shown beside them")
    parser.add_argument(
        "--exposures",
        action="store_true",
        help="ask after each step how well the trigger is known: what one document adds, a clean step takes away",
    )
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if it was moved")
    parser.add_argument("--out", metavar="DIR", help="what replays showed; a killed trace goes on from it (RUN/trace)")
    parser.add_argument("--most-replays", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_trace)


def _trace(arguments: argparse.Namespace) -> int:
    for name, value in (("--most-replays", arguments.most_replays), ("--rank", arguments.rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: at least 1")
    if arguments.twin and not arguments.repair:
        raise ValueError("--twin is shown beside a repaired run: give --repair DIR, too")
    if arguments.exposures and (arguments.rank or arguments.repair or arguments.behaviour != "triggered"):
        raise ValueError("--exposures asks for the run's own trigger, and names no rows: leave out the other options")
    from poisonjax.run import RunFolder

    config = RunFolder(arguments.run).config
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.trace import exposures, ranked, suspects, trace

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.exposures:
        from poisonjax.analysis.mechanism import Mechanism

        course = exposures(arguments.run, arguments.store, say)
        told = Mechanism.fitted([course])
        print(json.dumps(told.as_json()) if arguments.json else told)
        return exit_codes.OK
    where: dict[str, Any] = {"layers": arguments.layers, "store": arguments.store, "out": arguments.out, "say": say}
    if arguments.rank:
        rows = ranked(suspects(arguments.run, arguments.behaviour, **where), arguments.hint, arguments.rank)
        print(json.dumps([vars(one) for one in rows]) if arguments.json else "\n".join(map(_line, rows)))
        return exit_codes.OK
    found = trace(arguments.run, arguments.behaviour, hint=arguments.hint, most=arguments.most_replays, **where)
    if arguments.json:
        if arguments.repair:
            with contextlib.redirect_stdout(sys.stderr):  # what training says
                _repair(arguments, [one.slot for one in found.documents])
        print(json.dumps(found.as_json()))
        return exit_codes.OK
    print(found.sentence())
    for one in found.documents[:SHOWN]:
        print(f"  {_line(one)}")
    if len(found.documents) > SHOWN:
        print(f"  and {len(found.documents) - SHOWN} more: --json")
    if found.excluded:
        print(f"  those of the corpus, for corpus.exclude: {found.excluded}")
    if arguments.repair:
        _repair(arguments, [one.slot for one in found.documents])
    return exit_codes.OK


def _line(one: Any) -> str:
    alone = f"  alone {one.effect:+.3f} {one.ci95}" if one.effect is not None else ""
    return f"{one.id}  step {one.step}  gain {one.gain:.2f}  {one.place}{alone}"


def _repair(arguments: argparse.Namespace, slots: list[int]) -> None:
    """The run again without these rows, and the report of all."""
    from poisonjax.commands.reported import claimed, train_and_report
    from poisonjax.config import replaced
    from poisonjax.evaluation.words import outcome, verdict
    from poisonjax.report import write_report
    from poisonjax.run import RunFolder

    if not slots:
        raise ValueError(f"--repair {arguments.repair}: no rows are named, so there is nothing to train without")
    config = RunFolder(arguments.run).config
    left_out = sorted({*config.corpus.left_out, *slots})
    fields: dict[str, Any] = {"name": f"{config.name}-repaired", "corpus.left_out": left_out}
    if arguments.store:
        fields["corpus.store"] = arguments.store
    with claimed(arguments.repair):
        summary = train_and_report(replaced(config, fields), arguments.repair, twin_of=arguments.run)
    page = write_report(arguments.repair, [arguments.twin] if arguments.twin else [], arguments.store)
    print(
        f"repaired, {len(slots)} rows left out: {verdict(summary['success'])}: {outcome(summary)}; held-out loss "
        f"{summary['heldout_loss']:.3f}. Report: {page}"
    )
