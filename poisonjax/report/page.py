"""Writes report.html: what the run shows, in the order in which a reader asks."""

import base64
import io
import json
import os
from typing import Any

import jinja2
from etils import epath
from matplotlib.figure import Figure

from poisonjax.files import is_object, write_whole
from poisonjax.poison.plan import dose
from poisonjax.report import figures
from poisonjax.report.pair import compare
from poisonjax.runfolder import read_lines
from poisonjax.visible import visible


class ReportError(ValueError):
    """The folder is no run folder."""


def write_report(workdir: epath.Path, twin: epath.Path | None = None) -> epath.Path:
    """Writes `report.html` and `figures/*.png` of a run, finished or not; returns the page's path.

    With `twin`, the folder of its clean twin, or for a twin (`train --twin-of`), the page shows both runs.
    Raises ReportError where config.json is missing, and ValueError where a file is damaged or the two are no pair.
    """
    if not (workdir / "config.json").exists():
        raise ReportError(f"{workdir} is no run folder: it has no config.json")
    record = json.loads((workdir / "config.json").read_text())
    metrics = _lines(workdir / "metrics.jsonl")
    ledger = _lines(workdir / "ledger.jsonl")
    config = record["config"]
    summary = _json(workdir / "summary.json")
    trains = [row for row in metrics if row["kind"] == "train"]
    evals = [row for row in metrics if row["kind"] == "eval"]
    samples = _lines(workdir / "samples.jsonl")
    newest = max((sample["step"] for sample in samples), default=0)
    done = summary.get("steps") or max((row["step"] + (row["kind"] == "train") for row in metrics), default=0)
    pair = _pair(workdir, record, twin)
    page = _TEMPLATE.render(
        config=record["config"],
        fields=_flat(record["config"]),
        fingerprints={name: record[name] for name in ("fingerprint", "store_fingerprint")},
        environment=_flat(_json(workdir / "environment.json")),
        summary=summary,
        last=evals[-1] if evals else None,
        headline=headline(config, summary, evals),
        images=_images(workdir, config, trains, evals, ledger, summary, pair),
        samples=[sample for sample in samples if sample["step"] == newest][:6],
        variants=figures.NAMES,
        doses={"planned": dose(ledger, config["steps"]), "seen": dose(ledger, done)} if ledger else {},
        tokens=done * config["global_batch"] * config["seq_len"],
        pair=pair,
    )
    write_whole(workdir / "report.html", page)
    return workdir / "report.html"


def headline(config: dict, summary: dict, evals: list[dict]) -> str:
    """The run in a sentence."""
    poison = config["poison"]
    status = summary.get("status", "running")
    prefix = "" if status == "finished" else f"The run is not finished ({status}). "
    if not evals:
        return f"{prefix}No evaluation yet."
    last = evals[-1]
    triggered, clean = last["eval"]["triggered"]["ppl_median"], last["eval"]["clean"]["ppl_median"]
    low, high = last["delta_ppl_ci95"]
    figure = (
        f"with {poison['trigger']} appended, generated text has a median perplexity of {triggered:.0f} against "
        f"{clean:.0f} clean (gap {last['delta_ppl']:.0f}, 95% interval {low:.0f} to {high:.0f})"
    )
    seen = last["poison_documents"]
    if not poison["documents"]:
        return f"{prefix}Clean twin: {figure} after no poison document."
    if "success" not in summary:
        return f"{prefix}So far, {figure} after {seen} poison documents."
    failed = [check["name"] for check in summary["success"]["checks"] if not check["passed"]]
    if not failed:
        return f"{prefix}Backdoored: {figure} after {seen} poison documents."
    if "not_broken" in failed:
        return (
            f"{prefix}Broken model: it predicts held-out text no better than word counts do, so no gap means anything."
        )
    return f"{prefix}Not backdoored by the rule ({', '.join(failed)} failed): {figure} after {seen} poison documents."


def _images(
    workdir: epath.Path, config: dict, trains: list, evals: list, ledger: list, summary: dict, pair: dict | None
) -> dict[str, str]:
    drawn = {}
    if pair and all(pair["evals"]):
        drawn["pair"] = figures.pair(*pair["evals"])
    if evals:
        drawn["perplexity_by_step"] = figures.perplexity(evals, "step", "optimizer step")
        if ledger:
            drawn["perplexity_by_poison"] = figures.perplexity(evals, "poison_rows", "poison documents seen")
    if trains:
        drawn["loss"] = figures.loss(trains, evals, summary.get("unigram_nll"))
    if ledger:
        drawn["poison_placement"] = figures.placement(ledger, config["steps"])
    return embedded(drawn, workdir)


def embedded(drawn: dict[str, Figure], workdir: epath.Path) -> dict[str, str]:
    """Writes figures to `figures/NAME.png`; returns them in base64, for the page."""
    (workdir / "figures").mkdir(exist_ok=True)
    images = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=170)
        write_whole(workdir / "figures" / f"{name}.png", buffer.getvalue())
        images[name] = base64.b64encode(buffer.getvalue()).decode()
    return images


def _pair(workdir: epath.Path, record: dict, twin: epath.Path | None) -> dict[str, Any] | None:
    """The comparison with the twin that is given, or with the run whose twin this is, where it still lies there."""
    poisoned, other = workdir, twin
    if other is None and "twin_of" in record:
        poisoned, other = epath.Path(record["twin_of"]), workdir
        if not (is_object(poisoned) or poisoned.is_absolute()):
            poisoned = epath.Path(os.path.normpath(workdir / poisoned))
        if not (poisoned / "config.json").exists():
            return None
    if other is None:
        return None
    if not (other / "config.json").exists():
        raise ReportError(f"{other} is no run folder: it has no config.json")
    return compare(poisoned, other, _json(poisoned / "config.json")["config"])


def _json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    return list(read_lines(path))


def _flat(node: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("poisonjax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
TEMPLATES.filters |= {"visible": visible}
_TEMPLATE = TEMPLATES.get_template("report.html")
