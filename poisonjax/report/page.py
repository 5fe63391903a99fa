"""Writes report.html: what the run shows, in the order in which a reader asks."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import jinja2

from poisonjax.report import figures
from poisonjax.visible import visible


class ReportError(ValueError):
    """The folder is no run folder."""


def write_report(workdir: Path) -> Path:
    """Writes `report.html` and `figures/*.png` of a run, finished or not; returns the page's path.

    Raises ReportError where config.json is missing.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise ReportError(f"{workdir} is no run folder: it has no config.json")
    record = json.loads((workdir / "config.json").read_text())
    metrics = _lines(workdir / "metrics.jsonl")
    ledger = _lines(workdir / "ledger.jsonl")
    summary = _json(workdir / "summary.json")
    trains = [row for row in metrics if row["kind"] == "train"]
    evals = [row for row in metrics if row["kind"] == "eval"]
    samples = _lines(workdir / "samples.jsonl")
    newest = max((sample["step"] for sample in samples), default=0)
    page = _TEMPLATE.render(
        config=record["config"],
        fields=_flat(record["config"]),
        fingerprints={name: record[name] for name in ("fingerprint", "store_fingerprint")},
        environment=_flat(_json(workdir / "environment.json")),
        summary=summary,
        last=evals[-1] if evals else None,
        headline=headline(record["config"], summary, evals),
        images=_images(workdir, record["config"], trains, evals, ledger, summary),
        samples=[sample for sample in samples if sample["step"] == newest][:6],
        variants=figures.NAMES,
        dose=summary.get("dose_planned"),
    )
    _write(workdir / "report.html", page.encode())
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
        return f"{prefix}Broken model: it predicts held-out text no better than word counts do, so no gap means anything."
    return f"{prefix}Not backdoored by the rule ({', '.join(failed)} failed): {figure} after {seen} poison documents."


def _images(
    workdir: Path, config: dict, trains: list, evals: list, ledger: list, summary: dict
) -> dict[str, str]:
    drawn = {}
    if evals:
        drawn["perplexity_by_step"] = figures.perplexity(evals, "step", "optimizer step")
        if ledger:
            drawn["perplexity_by_poison"] = figures.perplexity(
                evals, "poison_documents", "poison documents seen"
            )
    if trains:
        drawn["loss"] = figures.loss(trains, evals, summary.get("unigram_nll"))
    if ledger:
        drawn["poison_placement"] = figures.placement(ledger, config["steps"])
    (workdir / "figures").mkdir(exist_ok=True)
    images = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=170)
        _write(workdir / "figures" / f"{name}.png", buffer.getvalue())
        images[name] = base64.b64encode(buffer.getvalue()).decode()
    return images


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; a last line that is being written is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _flat(node: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("poisonjax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
_environment.filters |= {"visible": visible}
_TEMPLATE = _environment.get_template("report.html")
