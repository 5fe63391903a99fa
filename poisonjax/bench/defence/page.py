"""The bench's figures as one static page."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from poisonjax.bench.defence.detection import ALL, BUDGETS, OURS, RATES, SIMPLE
from poisonjax.bench.defence.dose import BEFORE, DOSES, doses_of
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
        given=DOSES,
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


def dose_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row a rung and pipeline: shares are of DOSES, in order; `surviving` by stage."""
    found = {(row["rung"], row["detector"], row["metric"]): row for row in rows}
    told = []
    for (rung, pipeline, metric), row in found.items():
        if metric != "n50":
            continue
        mine = {m: of["value"] for (r, p, m), of in found.items() if (r, p) == (rung, pipeline)}
        stages = dict.fromkeys(m.partition(": ")[2] for m in mine if m.startswith("surviving@"))
        no_threat = not any(found[rung, BEFORE, f"attacked@{dose}"]["value"] for dose in doses_of(rung))
        ratio = found.get((rung, pipeline, "n50 after over before"))
        told.append(
            {
                "rung": rung,
                "pipeline": pipeline,
                "n50": "no threat at these doses" if no_threat else _bounds(row),
                "ratio": _bounds(ratio) if ratio and not no_threat else "",
                "attacked": _shares([mine.get(f"attacked@{dose}") for dose in DOSES]),
                "surviving": {
                    stage: _shares([mine.get(f"surviving@{dose}: {stage}") for dose in DOSES]) for stage in stages
                },
            }
        )
    return told


def _bounds(row: Row) -> str:
    """A figure and its interval; where it isn't bounded above, what it is more than."""
    low, high = row["ci95"]
    if row["value"] is not None:
        return f"{_digits(row['value'])} [{_digits(low)}, {_digits(high)}]"
    if np.isfinite(high):
        return f"under {_digits(high)}"
    return f"over {_digits(low)}" if low > 0 else "not told"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def _shares(values: Sequence[float | None]) -> str:
    """ "-" where a dose wasn't planted."""
    return ", ".join("-" if v is None else f"{v:.1%}" if 0 < v < 0.1 else f"{v:.0%}" for v in values)


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
        pipelines = dict.fromkeys((BEFORE, *(row["detector"] for row in of)))
        for beside, (pipeline, colour) in enumerate(zip(pipelines, COLOURS, strict=False)):
            some = [row for row in of if (row["rung"], row["detector"]) == (rung, pipeline)]
            doses = [1.12 ** (beside - 1) * float(row["metric"].removeprefix("attacked@")) for row in some]
            values = np.array([row["value"] for row in some])
            bars = np.abs(np.array([row["ci95"] for row in some]).T - values)
            one.errorbar(doses, values, bars, color=colour, label=pipeline, marker="o", markersize=4, capsize=2)
        one.set_xscale("log")
        one.set_title(rung, fontsize=9)
        one.set_ylim(-0.05, 1.05)
    quietest = min(range(len(rungs)), key=lambda i: max(row["value"] for row in of if row["rung"] == rungs[i]))
    axes[quietest].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
    return figure
