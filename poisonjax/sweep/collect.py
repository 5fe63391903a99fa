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
from poisonjax.runfolder import read_lines
from poisonjax.sweep.grid import Sweep


def rows(sweep: Sweep, workdir: Path) -> Iterator[dict[str, Any]]:
    """The table's rows, in the sweep's order; of unfinished runs, what there is. No times: a resumed sweep's is equal."""
    for run in sweep.runs:
        folder = epath.Path(workdir / run.id)
        flat = config_lib.flat(run.config)
        summary = json.loads(path.read_text()) if (path := folder / "summary.json").exists() else {}
        about = {
            "run": run.id,
            **{name: _cell(flat[name]) for name in sweep.varied},
            "params": summary.get("params"),
            "params_non_embedding": summary.get("params_non_embedding"),
            "trigger_tokens": summary.get("trigger_tokens"),
        }
        for row in read_lines(folder / "metrics.jsonl"):
            if row["kind"] != "eval":
                continue
            last = row["step"] == run.config.steps
            for variant, figures in row["eval"].items():
                yield {
                    **about,
                    "step": row["step"],
                    "tokens": row["tokens"],
                    "poison_documents": row["poison_documents"],
                    "poison_rows": row["poison_rows"],
                    "heldout_loss": row["heldout_loss"],
                    "excess_loss": row.get("excess_loss"),
                    "success": summary["success"]["value"] if last and "success" in summary else None,
                    "variant": variant,
                    **{
                        f"{name}{suffix}": value
                        for name in ("ppl_median", "ppl_mean", "nll_mean", "delta_ppl")
                        for suffix, value in _with_interval(figures, name)
                    },
                }


def _with_interval(figures: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    low, high = figures.get(f"{name}_ci95", (None, None))
    yield from (("", figures.get(name)), ("_low", low), ("_high", high))


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def write(sweep: Sweep, workdir: Path) -> list[Path]:
    """Writes table.csv, and table.parquet where pyarrow is installed; returns what was written."""
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
