"""`poisonjax COMMAND`. Bad input ends with exit code 2 and a message that teaches."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from poisonjax.commands import (
    attest,
    audit,
    bench,
    convert,
    corpus,
    evaluate,
    exit_codes,
    guard,
    plan,
    report,
    scan,
    serve,
    sweep,
    trace,
    train,
)
from poisonjax.visible import visible

COMMANDS = (corpus, train, evaluate, sweep, plan, audit, attest, report, convert, scan, guard, serve, trace, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs a command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    arguments = _parsed(list(sys.argv[1:] if argv is None else argv))
    try:
        code = arguments.func(arguments)
        sys.stdout.flush()
        return code
    except ImportError as error:
        told = "gs:// needs `pip install 'poisonjax[gcs]'`" if "gcsfs" in str(error) else str(error)
        if "pip install 'poisonjax[" not in told:  # an extra that isn't installed; all else is a fault
            raise
        print(f"poisonjax {arguments.command}: {told}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return exit_codes.BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        if (code := exit_codes.of(error)) is None:
            raise
        if code != exit_codes.INTERRUPTED:
            told = "\n".join(map(visible, str(error).split("\n")))  # file names and texts may hold terminal codes
            print(f"poisonjax {arguments.command}: {told}", file=sys.stderr, flush=True)
        if _among_others(error):
            os._exit(code)  # without the usual end, which would wait for the others
        return code


def _among_others(error: BaseException) -> bool:
    return type(error).__name__ == "LostProcess"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from poisonjax.run.environment import version

        print(", ".join(f"{name} {version(name)}" for name in ("poisonjax", "jax")))
        parser.exit()


def _describe(commands: Any) -> None:
    """What the list of commands says of each, its own help says first."""
    for named in commands._choices_actions:
        parser = commands.choices[named.dest]
        parser.description = parser.description or named.help
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                _describe(action)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="poisonjax", description="Study pretraining data poisoning on your own language models."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of this program and of JAX")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_arguments(commands)
    _describe(commands)
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(exit_codes.BAD_INPUT)
    # Config fields (`--config.a.b=c`) aren't argparse's: they go to ml_collections.
    fields: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        (fields if word.startswith("--config.") else rest).append(word)
        if word.startswith("--config.") and "=" not in word:
            value = next(words, "--")
            if value.startswith("--"):
                parser.error(f"{word} needs a value: {word}=VALUE")
            fields[-1] += f"={value}"
    arguments = parser.parse_args(rest)
    if fields and not hasattr(arguments, "config"):
        parser.error(f"{arguments.command} takes no config fields, but got {fields[0]}")
    arguments.fields = fields
    return arguments
