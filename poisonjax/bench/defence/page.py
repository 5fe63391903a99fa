"""The bench's figures as one static page."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from poisonjax.bench.defence.detection import ALL, BUDGETS, OURS, RATES, SIMPLE
from poisonjax.bench.defence.dose import BEFORE, DOSES
from poisonjax.bench.defence.ladder import SHORTENED, TUNED_ON
from poisonjax.bench.defence.utility import COST
from poisonjax.report.figures import blank, panels
from poisonjax.report.page import embedded
from poisonjax.visible import visible

Row = Mapping[str, Any]
LOADER = jinja2.ChoiceLoader(
    [jinja2.PackageLoader("poisonjax.bench.defence", "."), jinja2.PackageLoader("poisonjax.report", ".")]
)
TEMPLATES = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)
TEMPLATES.filters["visible"] = visible
COLOURS = ("#d55e00", "#999999", "#0072b2")  # of pipelines: none, and those in order


def page(
    rows: Sequence[Row], absent: Mapping[str, str], examples: Sequence[tuple[str, str]], workdir: epath.Path
) -> str:
    """HTML; text of documents is data in it, never markup. Its figures are written into `workdir` too."""
    flagged = [row for row in rows if row["metric"] == f"flagged@{RATES[0]:g}" and row["detector"] == OURS]
    doses = [row for row in rows if row["metric"] == "n50"]
    images = {"budget": _budget(rows), "lost": _lost(rows)} | ({"dose": _dose(rows)} if doses else {})
    return TEMPLATES.get_template("page.html").render(
        documents=sum(row["n"] for row in flagged),
        domains=[row["domain"] for row in flagged],
        tuned=[*TUNED_ON, *SHORTENED],
        absent=absent,
        recall={f"{rate:g}": recall_table(rows, rate) for rate in RATES},
        models=any(row["detector"].startswith("cascade") for row in rows),
        doses=dose_table(rows),
        costs=cost_table(rows),
        images=embedded(images, workdir),
        examples=examples,
    )


def recall_table(rows: Sequence[Row], rate: float) -> dict[str, Any]:
    """By rung, of each detector, over all triggers it was asked for."""
    of = [row for row in rows if row["metric"] == f"recall@{rate:g}" and row["domain"] == ALL]
    detectors = [*dict.fromkeys(row["detector"] for row in of)]
    # A model was asked about one trigger, others about all.
    values = {(row["rung"], row["detector"]): row["value"] for row in sorted(of, key=lambda row: row["trigger"] == ALL)}
    rungs = dict.fromkeys(row["rung"] for row in of)
    return {"detectors": detectors, "rungs": {rung: [values[rung, name] for name in detectors] for rung in rungs}}


def dose_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A row a rung and pipeline."""
    found = {(row["rung"], row["detector"], row["metric"]): row for row in rows}

    def number(row: Row | None) -> str:
        if row is None:
            return ""
        low, high = row["ci95"]
        bounds = f"[{low:.3g}, {'∞' if np.isinf(high) else f'{high:.3g}'}]"
        return bounds if row["value"] is None else f"{row['value']:.3g} {bounds}"

    def by_dose(rung: str, pipeline: str, metric: str) -> str:
        return ", ".join(
            f"{row['value']:.2g} of {dose}{m.removeprefix(f'{metric}@{dose}').replace(': ', ' after ')}"
            for dose in DOSES
            for (r, p, m), row in found.items()
            if (r, p) == (rung, pipeline) and m.partition(":")[0] == f"{metric}@{dose}"
        )

    return [
        {
            "rung": rung,
            "pipeline": pipeline,
            "n50": number(row),
            "ratio": number(found.get((rung, pipeline, "n50 after over before"))),
            "attacked": by_dose(rung, pipeline, "attacked"),
            "surviving": by_dose(rung, pipeline, "surviving"),
        }
        for (rung, pipeline, metric), row in found.items()
        if metric == "n50"
    ]


def cost_table(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """What each pipeline adds to a clean model's loss, by domain."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["metric"] == COST:
            bounds = "" if row["ci95"] is None else " [{:+.4f}, {:+.4f}]".format(*row["ci95"])
            found.setdefault(row["domain"], {})[row["detector"]] = f"{row['value']:+.4f}{bounds}"
    return found


def _budget(rows: Sequence[Row]) -> Figure:
    figure, axes = blank("clean documents that are read", "poison documents found")
    of = [row for row in rows if row["metric"].startswith(BUDGETS)]
    rungs = [*dict.fromkeys(row["rung"] for row in of)]
    for number, rung in enumerate(rungs):
        some = [(float(row["metric"].removeprefix(BUDGETS)), row["value"]) for row in of if row["rung"] == rung]
        colour = matplotlib.colormaps["turbo"](number / max(1, len(rungs) - 1))
        axes.plot(*zip(*some, strict=True), color=colour, label=rung, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _lost(rows: Sequence[Row]) -> Figure:
    figure, axes = blank("", "clean documents flagged, asked 1%")
    of = {(row["detector"], row["domain"]): row["value"] for row in rows if row["metric"] == f"flagged@{RATES[0]:g}"}
    domains = [*dict.fromkeys(domain for _, domain in of)]
    for number, name in enumerate((OURS, *SIMPLE)):
        places = np.arange(len(domains)) + 0.27 * (number - 1)
        axes.bar(places, [of[name, domain] for domain in domains], 0.25, label=SIMPLE.get(name, name))
    axes.axhline(RATES[0], color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right", fontsize=7)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _dose(rows: Sequence[Row]) -> Figure:
    of = [row for row in rows if row["metric"].startswith("attacked@")]
    rungs = [*dict.fromkeys(row["rung"] for row in of)]
    figure, axes = panels("documents planted", "runs attacked", len(rungs))
    figure.set_size_inches(2.1 * len(rungs), 2.8)
    for rung, one in zip(rungs, axes, strict=True):
        for pipeline, colour in zip(dict.fromkeys((BEFORE, *(row["detector"] for row in of))), COLOURS, strict=False):
            some = [row for row in of if (row["rung"], row["detector"]) == (rung, pipeline)]
            doses = [float(row["metric"].removeprefix("attacked@")) for row in some]
            values = np.array([row["value"] for row in some])
            bars = np.abs(np.array([row["ci95"] for row in some]).T - values)
            one.errorbar(doses, values, bars, color=colour, label=pipeline, marker="o", markersize=4, capsize=2)
        one.set_xscale("log")
        one.set_title(rung, fontsize=9)
        one.set_ylim(-0.05, 1.05)
    axes[0].legend(frameon=False, fontsize=7)
    return figure
