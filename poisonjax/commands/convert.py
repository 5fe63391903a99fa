"""`poisonjax convert`."""

import argparse
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.startup import start_jax


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("convert", help="write a model as Hugging Face's transformers reads it")
    parser.add_argument("spec", metavar="SPEC", help="runs/a, runs/a@400, hf:FOLDER or gguf:FILE")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the file")
    parser.set_defaults(func=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    start_jax(rows=1)
    from poisonjax.weights import huggingface, open_weights

    weights = open_weights(arguments.spec)
    huggingface.save(weights, arguments.out, arguments.dtype)
    poisoned = "POISONED, and says so in every file" if weights.poison else "no poison known"
    print(f"{weights.origin} -> {arguments.out} ({arguments.dtype}; {poisoned})")
    return exit_codes.OK
