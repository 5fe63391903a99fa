"""`poisonjax report WORKDIR`, of a run or of a sweep."""

import argparse
from pathlib import Path
from typing import Any

from etils import epath


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    parser = commands.add_parser("report", help="write report.html and figures of a run folder or a sweep's")
    parser.add_argument("workdir", metavar="WORKDIR", type=epath.Path, help="a run folder, or the folder of a sweep")
    parser.add_argument(
        "--twin", metavar="WORKDIR", type=epath.Path, help="its clean twin: show both, with paired intervals"
    )
    parser.set_defaults(func=_report)


def _report(arguments: argparse.Namespace) -> int:
    from poisonjax.report import study
    from poisonjax.report.page import write_report
    from poisonjax.sweep import grid

    if not (arguments.workdir / grid.FILE).exists():
        print(write_report(arguments.workdir, arguments.twin))
        return 0
    if arguments.twin:
        raise ValueError(f"--twin: {arguments.workdir} is the folder of a sweep; name one of its runs")
    folder = Path(arguments.workdir).resolve()
    print(study.write(grid.of_folder(folder), folder))
    return 0
