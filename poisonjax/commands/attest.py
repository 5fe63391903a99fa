"""`poisonjax attest`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from poisonjax.commands import exit_codes

KEY = Path.home() / ".config" / "poisonjax" / "signing-key.pem"


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("attest", help="sign what a run's checkpoints were made from, for others to verify")
    parser.add_argument("workdir", metavar="WORKDIR", help="a run folder")
    parser.add_argument("--verify", action="store_true", help="check an attestation instead of writing one")
    parser.add_argument(
        "--key", type=Path, default=KEY, help=f"private key, PEM, P-256; made where it is absent (default: {KEY})"
    )
    parser.add_argument("--public-key", type=Path, help="the signer's public key, for --verify (default: KEY.pub)")
    parser.add_argument("--no-weights", action="store_true", help="don't read the checkpoints' arrays; it is said so")
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if it was moved")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_attest)


def _attest(arguments: argparse.Namespace) -> int:
    from poisonjax.files import is_object
    from poisonjax.run import RunFolder

    os.environ["JAX_PLATFORMS"] = "cpu"  # as `audit`
    if is_object(arguments.workdir):
        raise ValueError(f"{arguments.workdir}: files to sign must lie on a disk; copy the run folder to one")
    RunFolder(arguments.workdir)  # or it raises
    try:
        from poisonjax.attest import statement
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'poisonjax[attest]'") from None
    if arguments.verify:
        public = arguments.public_key or statement.public_path(arguments.key)
        if not public.exists():
            raise ValueError(f"no public key {public}: name the signer's with --public-key")
        problems = statement.verify(arguments.workdir, public, weights=not arguments.no_weights, store=arguments.store)
        if arguments.json:
            print(json.dumps({"ok": not problems, "problems": problems}))
        else:
            print("\n".join(problems) or f"{arguments.workdir}: signature, files, provenance and documents verified")
        return exit_codes.FAILED if problems else exit_codes.OK
    if not arguments.key.exists():
        print(f"poisonjax attest: made {arguments.key} and {statement.make_key(arguments.key)}", file=sys.stderr)
    try:
        value = statement.attest(
            arguments.workdir, arguments.key, weights=not arguments.no_weights, store=arguments.store
        )
    except statement.AttestError as error:
        print(f"poisonjax attest: {error}", file=sys.stderr)
        return exit_codes.FAILED
    if arguments.json:
        print(json.dumps(value))
    else:
        links = value["predicate"]["provenance"]
        print(f"{links['audit']}")
        print(
            f"signed: checkpoints {', '.join(sorted(links['checkpoints'], key=int))} in "
            f"{arguments.workdir}/{statement.SIGNATURE}"
        )
    return exit_codes.OK
