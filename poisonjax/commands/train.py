"""`poisonjax train`."""

import argparse
from typing import Any

from poisonjax.commands import exit_codes
from poisonjax.commands.reported import claimed, train_and_report


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    train = commands.add_parser("train", help="train, evaluate and report; resumes where the folder has a checkpoint")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="config file, e.g. configs/quickstart.py")
    what.add_argument("--twin-of", metavar="WORKDIR", help="train the clean twin of that run; its report shows both")
    train.add_argument("--workdir", required=True, metavar="DIR", help="run folder; made if absent")
    train.epilog = (
        "Single fields: --config.poison.documents=0, --config.steps=100, ...; poisonjax/config/fields.py explains each."
    )
    train.set_defaults(func=_train)


def _train(arguments: argparse.Namespace) -> int:
    from poisonjax import config as config_lib
    from poisonjax.evaluation.words import outcome, verdict
    from poisonjax.run.folder import twin_config

    if arguments.twin_of:
        config = config_lib.override(twin_config(arguments.twin_of), arguments.fields)
    else:
        config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    config_lib.check(config)  # before the folder is made
    with claimed(arguments.workdir):
        asked = [field.removeprefix("--config.").partition("=")[0] for field in arguments.fields]
        summary = train_and_report(config, arguments.workdir, arguments.twin_of, asked)
    if summary:
        planted = summary.get("planted")
        clean = "" if summary["dose_planned"]["documents"] or planted else "clean twin, "
        documents = f"{summary['dose_seen']['documents']} poison documents"
        if planted:
            documents += f" and {planted['documents']} planted in the corpus"
        print(
            f"{clean}{verdict(summary['success'])}: {outcome(summary)} after {documents}; held-out loss "
            f"{summary['heldout_loss']:.3f}; {summary['wall_seconds']:.0f} s. Report: {arguments.workdir}/report.html"
        )
    return exit_codes.OK
