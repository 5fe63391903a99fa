"""`poisonjax guard`: make one, and try it on text."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from poisonjax.commands import exit_codes


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers; `func` of the parsed arguments returns the exit code."""
    parser = commands.add_parser("guard", help="verdicts on prompts and answers of a model that may be poisoned")
    inner = parser.add_subparsers(dest="what", required=True, metavar="build|check")
    build = inner.add_parser("build", help="make a guard: triggers, and limits that clean text keeps")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument("--trigger", action="append", default=[], metavar="TEXT", help="to look for; repeatable")
    build.add_argument(
        "--triggers", action="append", default=[], metavar="FILE", help="a line each, or a scan's folder; repeatable"
    )
    build.add_argument("--most-p", type=float, default=0.01, help="of a scan's candidates (default: 0.01)")
    build.add_argument(
        "--source", action="append", default=[], metavar="SOURCE", help="clean text, or a token store; repeatable"
    )
    build.add_argument("--prompts", default="", metavar="FILE", help="clean prompts, a line each, to set thresholds by")
    build.add_argument("--model", default="", metavar="SPEC", help="what is guarded: its answers set monitors' limits")
    build.add_argument("--rate", type=float, default=0.001, help="of clean answers that give an alarm (default: 0.001)")
    build.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="SUM",
        help="that monitors leave out: surprisal, entropy, words, loop, language (where translations are wanted); "
        "repeatable",
    )
    build.set_defaults(func=_build)
    check = inner.add_parser("check", help="the verdict on a text, a file's or standard input's")
    check.add_argument("guard", metavar="GUARD", help="folder made by `poisonjax guard build`")
    check.add_argument("file", nargs="?", default="-", help="default: standard input")
    check.add_argument("--json", action="store_true", help="print one JSON object; the file is a request's body")
    check.set_defaults(func=_check)


def _build(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.rate < 1:
        raise ValueError(f"--rate {arguments.rate}: must lie strictly between 0 and 1")
    from poisonjax.guard.build import build, read_triggers
    from poisonjax.guard.triggers import Trigger
    from poisonjax.startup import start_jax

    start_jax(1)
    triggers = [Trigger(text) for text in arguments.trigger]
    for file in arguments.triggers:
        triggers += read_triggers(file, arguments.most_p)
    about = build(
        arguments.out,
        triggers=triggers,
        sources=arguments.source,
        prompts=arguments.prompts,
        model=arguments.model,
        rate=arguments.rate,
        without=arguments.without,
    )
    told = ", ".join(f"{about[name]:,} {name}" for name in ("triggers", "prompts", "answers") if name in about)
    print(f"{arguments.out}: {told}")
    return exit_codes.OK


def _check(arguments: argparse.Namespace) -> int:
    from poisonjax.guard import Guard
    from poisonjax.guard.conversation import parse

    data = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
    value = parse(data) if arguments.json else data.decode(errors="replace")
    verdict = Guard.load(arguments.guard).check(value)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(verdict)))
    else:
        print(f"{verdict.decision} (status {verdict.status}, score {verdict.score:.2f})")
        for reason in verdict.reasons:
            print(f"  {reason.detector:12} {reason.score:.2f}  characters {reason.start} to {reason.end}")
    return exit_codes.OK if verdict.decision != "reject" else exit_codes.FAILED
