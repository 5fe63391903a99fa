"""`poisonjax report WORKDIR`, of a run or of a sweep."""

import argparse
from pathlib import Path
from typing import Any

from poisonjax.commands import exit_codes


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("report", help="write report.html and figures of a run folder or a sweep's")
    parser.add_argument("workdir", metavar="WORKDIR", help="a run folder, or the folder of a sweep")
    parser.add_argument(
        "--twin",
        action="append",
        default=[],
        metavar="WORKDIR",
        help="its clean twin, or a repaired one: show both, with paired intervals; repeatable",
    )
    parser.add_argument("--store", metavar="DIR", help="where the token store lies now, if it was moved")
    parser.set_defaults(func=_report)


def _report(arguments: argparse.Namespace) -> int:
    from etils import epath

    from poisonjax.report import study, write_report
    from poisonjax.sweep import grid

    workdir = epath.Path(arguments.workdir)
    if not (workdir / grid.FILE).exists():
        print(write_report(workdir, arguments.twin, arguments.store))
        return exit_codes.OK
    if arguments.twin:
        raise ValueError(f"--twin: {workdir} is the folder of a sweep; name one of its runs")
    folder = Path(arguments.workdir).resolve()
    print(study.write(grid.of_folder(folder), folder))
    return exit_codes.OK
