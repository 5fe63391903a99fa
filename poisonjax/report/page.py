"""Writes report.html: what the run shows, in the order in which a reader asks."""

import base64
import io
import os
from typing import Any, cast

import jinja2
from etils import epath
from matplotlib.figure import Figure

from poisonjax.config import flat
from poisonjax.evaluation.words import failed, gap, verdict
from poisonjax.files import is_object, write_whole
from poisonjax.poison.ledger import dose
from poisonjax.report import figures
from poisonjax.report.pair import compare
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import is_run
from poisonjax.visible import visible


def write_report(workdir: epath.PathLike, twin: epath.PathLike | None = None) -> epath.Path:
    """Writes `report.html` and `figures/*.png` of a run, finished or not; returns the page's path.

    With `twin`, the folder of its clean twin, or for a twin (`train --twin-of`), the page shows both runs.
    Raises RunFolderError where there is no run or a file is damaged, ValueError where the two are no pair.
    """
    run = RunFolder(workdir)
    trains, evals, ledger, samples = run.steps(), run.evals(), run.ledger(), run.samples()
    summary = cast(dict[str, Any], run.summary or {})
    newest = max((sample["step"] for sample in samples), default=0)
    reached = [row["step"] for row in evals] + [row["step"] + 1 for row in trains]
    done, config = summary.get("steps") or max(reached, default=0), run.record["config"]
    pair = _pair(run, RunFolder(twin) if twin else None)
    has_environment = (run.path / rows.ENVIRONMENT).exists()
    page = _TEMPLATE.render(
        config=config,
        fields=flat(run.config),
        fingerprints={name: run.record[name] for name in ("fingerprint", "store_fingerprint")},
        environment=_flat(cast(dict, run.environment)) if has_environment else {},
        summary=summary,
        last=evals[-1] if evals else None,
        headline=headline(config, summary, evals),
        parent=run.record.get("parent"),
        inherited=run.inherited(),
        images=_images(run, trains, evals, ledger, summary, pair),
        samples=[sample for sample in samples if sample["step"] == newest][:6],
        variants=figures.NAMES,
        doses={"planned": dose(ledger, config["steps"]), "seen": dose(ledger, done)} if ledger else {},
        tokens=done * config["global_batch"] * config["seq_len"],
        pair=pair,
    )
    write_whole(run.path / rows.REPORT, page)
    return run.path / rows.REPORT


def headline(config: dict, summary: dict, evals: list[rows.EvalRow]) -> str:
    """The run in a sentence."""
    poison = config["poison"]
    status = summary.get("status", "running")
    prefix = "" if status == "finished" else f"The run is not finished ({status}). "
    if not evals:
        return f"{prefix}No evaluation yet."
    last = evals[-1]
    triggered, clean = last["eval"]["triggered"]["ppl_median"], last["eval"]["clean"]["ppl_median"]
    figure = (
        f"with {poison['trigger']} appended, generated text has a median perplexity of {triggered:.0f} against "
        f"{clean:.0f} clean ({gap(last)})"
    )
    seen, planted = f"{last['poison_documents']} poison documents", summary.get("planted")
    if planted:
        seen += f" and {planted['documents']} planted in the corpus"
    if not (poison["documents"] or planted):
        return f"{prefix}Clean twin: {figure} after no poison document."
    if "success" not in summary:
        return f"{prefix}So far, {figure} after {seen}."
    names = failed(summary["success"])
    if summary["success"]["value"]:
        said = verdict(summary["success"])
        return f"{prefix}{said[0].upper()}{said[1:]}: {figure} after {seen}."
    if "not_broken" in names:
        return (
            f"{prefix}Broken model: it predicts held-out text no better than word counts do, so no gap means anything."
        )
    return f"{prefix}Not backdoored by the rule ({', '.join(names)} failed): {figure} after {seen}."


def _images(
    run: RunFolder,
    trains: list[rows.TrainRow],
    evals: list[rows.EvalRow],
    ledger: list[rows.LedgerRow],
    summary: dict[str, Any],
    pair: dict[str, Any] | None,
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
        drawn["poison_placement"] = figures.placement(ledger, run.config.steps)
    return embedded(drawn, run.path)


def embedded(drawn: dict[str, Figure], workdir: epath.Path) -> dict[str, str]:
    """Writes figures to `figures/NAME.png`; returns them in base64, for the page."""
    (workdir / rows.FIGURES).mkdir(exist_ok=True)
    images = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=170)
        write_whole(workdir / rows.FIGURES / f"{name}.png", buffer.getvalue())
        images[name] = base64.b64encode(buffer.getvalue()).decode()
    return images


def _pair(run: RunFolder, twin: RunFolder | None) -> dict[str, Any] | None:
    """The comparison with the twin that is given, or with the run whose twin this is, where it still lies there."""
    if twin:
        return compare(run, twin)
    if "twin_of" not in run.record:
        return None
    poisoned = epath.Path(run.record["twin_of"])
    if not (is_object(poisoned) or poisoned.is_absolute()):
        poisoned = epath.Path(os.path.normpath(run.path / poisoned))
    try:
        return compare(RunFolder(poisoned), run) if is_run(poisoned) else None
    except ValueError as error:  # its own page is written all the same
        names = {"poisoned": str(poisoned), "twin": str(run.path)}
        return {"twins": False, **names, "step": None, "figures": {}, "evidence": str(error), "evals": [[], []]}


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
