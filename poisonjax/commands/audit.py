"""`poisonjax audit`."""

import argparse
import json
import os
import sys
import time
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser(
        "audit", help="replay a run's data without its model and compare all the evidence that it left"
    )
    parser.add_argument("workdir", nargs="?", metavar="WORKDIR", help="a run folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--steps", metavar="A-B|N,N", help="replay these steps only")
    what.add_argument("--sample", type=int, metavar="N", help="replay N random steps only")
    what.add_argument(
        "--document", metavar="ID", help="where a document was seen: poison:17, train:1234 of the store, or its key"
    )
    what.add_argument("--step", type=int, metavar="N", help="what a step trained on, poison marked")
    what.add_argument(
        "--self-test",
        action="store_true",
        help="no WORKDIR: train tiny runs, tamper with them, and count what the audit detects",
    )
    parser.add_argument("--no-weights", action="store_true", help="don't read the checkpoints' arrays")
    parser.add_argument(
        "--evaluate", action="store_true", help="make the evaluations again, from the checkpoints that are there"
    )
    parser.add_argument(
        "--parents", action="store_true", help="audit the weights that the run began from too, and those before them"
    )
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if not where the run says")
    parser.add_argument("--faults", type=int, default=400, help="of the self-test (default: 400)")
    parser.add_argument("--runs", type=int, default=50, help="untouched, of the self-test (default: 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    # An audit must not take the accelerator from the run that it looks at.
    if not arguments.evaluate:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.self_test:
        start_jax(rows=4)
        return _self_test(arguments)
    if not arguments.workdir:
        raise ValueError("give a WORKDIR (or --self-test)")
    if arguments.document or arguments.step is not None:
        return _locate(arguments)
    from poisonjax.run import RunFolder

    if arguments.evaluate:  # as training did, before anything starts JAX
        config = RunFolder(arguments.workdir).config
        start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.audit.parents import parents
    from poisonjax.audit.result import audit

    began = time.monotonic()
    result = audit(
        arguments.workdir,
        _steps(arguments.steps),
        arguments.sample,
        arguments.store,
        weights=not arguments.no_weights,
        evaluate=arguments.evaluate,
        parents=arguments.parents,
    )
    line = (
        list(parents(RunFolder(arguments.workdir).path, weights=not arguments.no_weights)) if arguments.parents else []
    )
    if arguments.json:
        of_line = {"parents": [parent.as_json() for parent in line]} if arguments.parents else {}
        print(json.dumps(result.as_json() | of_line | {"seconds": time.monotonic() - began}))
    else:
        for difference in result.differences[:20]:
            print(f"differs: {difference}")
        if len(result.differences) > 20:
            print(f"and {len(result.differences) - 20} more: see --json")
        print(result.sentence())
        for parent in line:
            print(parent.sentence())
    return exit_codes.OK if result.ok and all(parent.ok for parent in line) else exit_codes.FAILED


def _self_test(arguments: argparse.Namespace) -> int:
    if arguments.faults < 1 or arguments.runs < 1:
        raise ValueError(f"--faults {arguments.faults}, --runs {arguments.runs}: at least 1 of each")
    from poisonjax.audit.selftest import self_test
    from poisonjax.report import write_report

    say = (lambda line: None) if arguments.json else (lambda line: print(line, flush=True))
    found = self_test(arguments.faults, arguments.runs, say, write_report)
    print(json.dumps(found.as_json()) if arguments.json else "\n".join(found.lines()))
    for line in found.missed:
        print(line, file=sys.stderr)
    return exit_codes.OK if found.good else exit_codes.FAILED


def _locate(arguments: argparse.Namespace) -> int:
    from poisonjax.audit import locate
    from poisonjax.audit.evidence import Evidence

    run = Evidence(arguments.workdir, store=arguments.store)
    if arguments.document:
        sightings = locate.sightings(run, arguments.document)
        shown = json.dumps(sightings) if arguments.json else locate.as_lines(arguments.document, sightings)
    else:
        rows = locate.step(run, arguments.step)
        shown = json.dumps(rows) if arguments.json else locate.as_text(rows, colour=sys.stdout.isatty())
    print(shown)
    return exit_codes.OK


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        if "-" in text:
            first, last = (int(edge) for edge in text.split("-"))
            steps = list(range(first, last + 1))
        else:
            steps = sorted({int(step) for step in text.split(",")})
    except ValueError:
        steps = []
    if not steps:
        raise ValueError(f"--steps {text!r}: give a range like 100-199, or numbers like 3,17")
    return steps
