"""One tidy table of a sweep: a row a run x evaluation x variant."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from poisonjax import config as config_lib
from poisonjax.files import write_whole
from poisonjax.run import RunFolder
from poisonjax.run.folder import is_run
from poisonjax.sweep.planned import Sweep
from poisonjax.sweep.states import damage, decided, require_own, require_whole


def rows(sweep: Sweep, workdir: Path) -> Iterator[dict[str, Any]]:
    """The table's rows, in the sweep's order; of unfinished runs, what there is. No times, so that a resumed sweep's
    table equals that of an uninterrupted one."""
    for run in sweep.runs:
        flat = config_lib.flat(run.config)
        about = {"run": run.id, **{name: _cell(flat[name]) for name in sweep.varied}}
        if is_run(workdir / run.id) and not damage(workdir / run.id):
            yield from (about | row for row in RunFolder(workdir / run.id).table())


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def write(sweep: Sweep, workdir: Path) -> list[Path]:
    """Writes table.csv, and table.parquet where pyarrow is installed; returns what was written. Damaged runs are left
    out. Raises as `require_own` and `require_whole`."""
    sweep = decided(sweep, workdir)
    require_own(sweep, workdir)
    require_whole(sweep, workdir)
    table = list(rows(sweep, workdir))
    names = list(table[0]) if table else ["run"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    written = [workdir / "table.csv"]
    write_whole(epath.Path(written[0]), text.getvalue())
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return written
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), buffer)
    write_whole(epath.Path(workdir / "table.parquet"), buffer.getvalue())
    return [*written, workdir / "table.parquet"]
