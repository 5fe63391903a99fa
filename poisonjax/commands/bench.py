"""`poisonjax bench`."""

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax

NAMES = (
    "train_vs_torch",
    "mfu",
    "pipeline",
    "audit_speed",
    "audit_weights",
    "digest_cost",
    "attention",
    "generate_vs_huggingface",
    "population_speed",
    "startup",
    "corpus_build",
    "growth",
)


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser(
        "bench", help="speed on this machine, as ratios against other programs; what hints of the trace find"
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="speed",
        choices=("speed", "attribution", "defence"),
        help="default: speed; see bench/README.md and bench/defence/README.md",
    )
    parser.add_argument(
        "--config", default="configs/quickstart.py", metavar="FILE[:ARG]", help="shapes that are measured"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="attribution, defence: what they make; the same call goes on there"
    )
    parser.add_argument("--payload", action="append", metavar="NAME", help="attribution: repeatable; default: four")
    parser.add_argument("--seeds", type=int, metavar="N", help="attribution: ranked (3); defence: of each run (5)")
    parser.add_argument("--retrained", type=int, metavar="N", help="attribution: of them, trained again (default: all)")
    parser.add_argument("--subsets", type=int, default=32, metavar="N", help="attribution: random halves; 0: no LDS")
    parser.add_argument("--text", metavar="DIR", help="defence: what `corpus fetch-bench` fetched (default: its cache)")
    parser.add_argument(
        "--model", action="append", default=[], metavar="SPEC", help="defence: detects, too; repeatable"
    )
    parser.add_argument(
        "--sampled", type=int, default=1000, metavar="N", help="defence: documents a domain that it reads"
    )
    parser.add_argument("--no-dose", action="store_true", help="defence: what is found alone, without training")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="defence: runs trained at once (default: 2)"
    )
    parser.add_argument("--only", action="append", choices=NAMES, help="repeatable; default: all that can run")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="begin no further figure after so long"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_bench)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:28} {row['value']:>14,.3f} {row['unit']:9} against {row['baseline']:>14,.3f}   "
        f"ratio {row['ratio']:.3f}"
    )


def _bench(arguments: argparse.Namespace) -> int:
    from poisonjax import config as config_lib

    config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    config_lib.check(config)
    if arguments.what != "speed":
        if not arguments.workdir:
            raise ValueError("--workdir DIR: where the runs of the bench lie")
        start_jax(config.global_batch // config.optimizer.accumulate)
        return {"attribution": _attribution, "defence": _defence}[arguments.what](config, arguments)
    # Both frameworks share an accelerator's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start_jax(config.global_batch // config.optimizer.accumulate)
    from poisonjax.bench import benches, growth, startup  # noqa: F401  (each registers its own)
    from poisonjax.bench.measure import BENCHES
    from poisonjax.run.environment import environment

    results, deadline = [], time.monotonic() + 60 * arguments.minutes
    for name in arguments.only or NAMES:
        if time.monotonic() > deadline:
            print(f"poisonjax bench: {name} left out: --minutes {arguments.minutes:g} are over", file=sys.stderr)
            continue
        try:
            for row in BENCHES[name](config):
                results.append(row)
                print(_line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
                if time.monotonic() > deadline:
                    print(
                        f"poisonjax bench: nothing of {name} after {row['name']}: the minutes are over", file=sys.stderr
                    )
                    break
        except ImportError as error:
            print(f"poisonjax bench: {name} left out: {error}; pip install 'poisonjax[bench]'", file=sys.stderr)
            continue
    if arguments.json:
        print(json.dumps({"environment": environment(), "results": results}))
    return exit_codes.OK if results else exit_codes.FAILED


def _attribution(config: Any, arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from poisonjax.bench import attribution
    from poisonjax.run.environment import environment

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    seeds = 3 if arguments.seeds is None else arguments.seeds
    retrained = seeds if arguments.retrained is None else arguments.retrained
    payloads = arguments.payload or attribution.PAYLOADS
    results = []
    with contextlib.redirect_stdout(sys.stderr):  # what training says
        for row in attribution.rows(
            config, Path(arguments.workdir), payloads, seeds, retrained, arguments.subsets, say
        ):
            results.append(row)
            say(f"{row['rung']:10} seed {row['seed']}  {row['method']:14} {row['metric']:28} {row['value']:.4f}")
    if arguments.json:
        print(json.dumps({"environment": environment(), "results": results}))
    else:
        print(attribution.table(results))
    return exit_codes.OK


def _defence(config: Any, arguments: argparse.Namespace) -> int:
    from pathlib import Path

    try:
        from poisonjax.bench.defence import bench
    except ImportError as error:
        raise ImportError(f"{error}: the bench needs `pip install 'poisonjax[defence]'`") from error
    from poisonjax.corpus.bench_text import Fetched
    from poisonjax.run.environment import environment

    if arguments.model and arguments.sampled < 100:
        raise ValueError(f"--sampled {arguments.sampled}: a model must read 100 clean documents of a domain at least")
    seeds = 5 if arguments.seeds is None else arguments.seeds
    asked = bench.Defence(
        config,
        Fetched.read(Path(arguments.text) if arguments.text else None),
        Path(arguments.workdir),
        arguments.model,
        arguments.sampled,
        0 if arguments.no_dose else seeds,
        arguments.workers,
    )
    with contextlib.redirect_stdout(sys.stderr):  # what training says
        results = asked.rows()
    for domain, why in asked.fetched.absent.items():
        print(f"poisonjax bench: domain {domain} is absent: {why}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"environment": environment(), "absent": asked.fetched.absent, "results": results}))
    else:
        print(bench.table(results))
        print(f"{asked.page}: figures")
    return exit_codes.OK
