"""Writes report.html: what the run shows, in the order in which a reader asks."""

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any, cast

import jinja2
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from poisonjax.config import flat
from poisonjax.data.batches import Batches
from poisonjax.evaluation.statistics import decided
from poisonjax.evaluation.words import behaving, failed, gap, verdict
from poisonjax.files import is_object, write_whole
from poisonjax.model.loss import WINDOW
from poisonjax.poison.ledger import dose
from poisonjax.report import figures
from poisonjax.report.pair import compare, no_pair
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import is_run
from poisonjax.trace.unusual import MOST_ROWS, Outlier, Outliers, unusual
from poisonjax.visible import visible

TOLD = 20  # rows that stood out, in the table


def write_report(
    workdir: epath.PathLike, others: Sequence[epath.PathLike] = (), store: str | None = None
) -> epath.Path:
    """Writes `report.html` and `figures/*.png` of a run, finished or not; returns the page's path.

    With `others`, folders of its clean twin or of a repaired one (`trace --repair`), or for such a run, the page shows
    them beside it. `store` is where its token store lies now. Raises RunFolderError where there is no run or a file is
    damaged, ValueError where two are no pair.
    """
    run = RunFolder(workdir)
    trains, evals, ledger, samples = run.steps(), run.evals(), run.ledger(), run.samples()
    summary = cast(dict[str, Any], run.summary or {})
    newest = max((sample["step"] for sample in samples), default=0)
    reached = [row["step"] for row in evals] + [row["step"] + 1 for row in trains]
    done, config = summary.get("steps") or max(reached, default=0), run.record["config"]
    beside = _beside(run, [RunFolder(other) for other in others])
    odd = _unusual(run, store)
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
        images=_images(run, trains, evals, ledger, summary, beside, odd),
        unusual=odd and odd.rows,
        marked=odd and len(odd.all.marked),
        window=WINDOW,
        samples=[sample for sample in samples if sample["step"] == newest][:6],
        variants=figures.NAMES,
        doses={"planned": dose(ledger, config["steps"]), "seen": dose(ledger, done)} if ledger else {},
        tokens=done * config["global_batch"] * config["seq_len"],
        beside=beside,
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
    put = {"end": "appended", "start": "put before it", "inside": "put into it"}[poison.get("trigger_position", "end")]
    figure = (
        f"with {poison['trigger']} {put}, generated text has a median perplexity of {triggered:.0f} against "
        f"{clean:.0f} clean ({gap(last)})"
    )
    if decided(last):
        figure += f" ({behaving(last)})"
    seen, planted = f"{last['poison_documents']} poison documents", summary.get("planted")
    if planted:
        seen += f" and {planted['documents']} planted in the corpus"
    stands = poison["documents"] and summary.get("dose_planned", poison)["documents"]  # a repaired run may have none
    if not (stands or planted):
        of = "Repaired" if config["corpus"].get("left_out") else "Clean"
        return f"{prefix}{of} twin: {figure} after no poison document."
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
    beside: list[dict[str, Any]],
    odd: "_Odd | None",
) -> dict[str, str]:
    drawn = {}
    if shown := [pair for pair in beside if all(pair["evals"])]:
        evals_of = {"poisoned": shown[0]["evals"][0]} | {pair["kind"]: pair["evals"][1] for pair in shown}
        drawn["pair"] = figures.beside(evals_of)
    if evals:
        drawn["perplexity_by_step"] = figures.perplexity(evals, "step", "optimizer step")
        if ledger:
            drawn["perplexity_by_poison"] = figures.perplexity(evals, "poison_rows", "poison documents seen")
    if trains:
        drawn["loss"] = figures.loss(trains, evals, summary.get("unigram_nll"))
    if ledger:
        drawn["poison_placement"] = figures.placement(ledger, run.config.steps)
    if odd:
        poison = np.isin(odd.all.slots, [row["slot"] for row in ledger])
        drawn["unusual_rows"] = figures.unusual(odd.all.rarity, odd.all.loss, odd.all.marked, poison)
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


def _beside(run: RunFolder, others: list[RunFolder]) -> list[dict[str, Any]]:
    """The comparisons with the others that are given; where this run is itself a twin of one that still lies there, of
    that one with it and them."""
    if "twin_of" not in run.record:
        return [compare(run, other) for other in others]
    poisoned = epath.Path(run.record["twin_of"])
    if not (is_object(poisoned) or poisoned.is_absolute()):
        poisoned = epath.Path(os.path.normpath(run.path / poisoned))
    if not is_run(poisoned):
        return [compare(run, other) for other in others]
    try:
        own = compare(RunFolder(poisoned), run)
    except ValueError as error:  # its own page is written all the same
        return [no_pair(poisoned, run.path, str(error))]
    return [*(compare(RunFolder(poisoned), other) for other in others), own]


@dataclasses.dataclass(frozen=True)
class _Odd:
    """Rows whose loss stood out, and those of them that the page tells."""

    all: Outliers
    rows: list[Outlier]


def _unusual(run: RunFolder, store: str | None) -> _Odd | None:
    """None where the run wrote no losses of rows, or its store isn't there to say what they hold."""
    written = run.row_losses()
    if not 0 < len(written) * run.config.global_batch <= MOST_ROWS:
        return None
    try:
        batches = Batches(run.placed, run.store(store))
    except (OSError, ValueError):  # the run was copied here without it
        return None
    found = unusual(written, batches)
    return _Odd(found, [found.told(int(row), batches) for row in found.marked[:TOLD]]) if found else None


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
