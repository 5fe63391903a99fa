"""`poisonjax report WORKDIR`."""

import argparse
from typing import Any

from etils import epath

from poisonjax.report.page import write_report


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("report", help="write report.html and figures of a run folder")
    parser.add_argument("workdir", metavar="WORKDIR", type=epath.Path)
    parser.add_argument(
        "--twin", metavar="WORKDIR", type=epath.Path, help="its clean twin: show both, with paired intervals"
    )
    parser.set_defaults(func=_report)


def _report(arguments: argparse.Namespace) -> int:
    print(write_report(arguments.workdir, arguments.twin))
    return 0
