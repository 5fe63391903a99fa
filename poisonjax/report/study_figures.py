"""Figures of a sweep's analysis. A colour is a number of parameters, a line style a number of tokens for each."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from poisonjax.analysis.dose_response import CellDose
from poisonjax.analysis.study import Analysis, Outcome
from poisonjax.report.figures import blank

STYLES = ("-", "--", ":", "-.")


Cell = tuple[float, float]  # parameters, tokens


class _Look:
    """The colour and style of each cell, the same in all figures."""

    def __init__(self, cells: Iterable[Cell]):
        params, tokens = np.array(list(cells), float).T
        self.params, self.ratios = np.unique(params), np.unique(np.round(tokens / params))

    def of(self, params: float, tokens: float) -> dict[str, Any]:
        place = int(np.searchsorted(self.params, params))
        ratio = int(np.searchsorted(self.ratios, np.round(tokens / params)))
        colour = matplotlib.colormaps["viridis"](0.1 + 0.75 * place / max(1, len(self.params) - 1))
        return {"color": colour, "linestyle": STYLES[ratio % len(STYLES)]}

    def name(self, params: float, tokens: float) -> str:
        return f"{short(params)} parameters, {short(tokens)} tokens"


def short(number: float) -> str:
    """1,234,567 -> 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _log_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def dose_response(analysis: Analysis) -> Figure:
    """Share of successes at each dose, and the fitted curve of each cell."""
    figure, axes = blank(analysis.unit, f"share of {analysis.what}")
    trials, look = analysis.trials, _Look(zip(analysis.trials.params, analysis.trials.tokens, strict=True))
    axes.set_xscale("log")
    number = trials.cells()
    for cell in range(number.max() + 1):
        mine = trials.take(number == cell)
        params, tokens = mine.params[0], mine.tokens[0]
        style, levels = look.of(params, tokens), np.unique(mine.dose)
        spread = 1 + 0.04 * (cell - number.max() / 2)  # so that points at the same place are all seen
        shares = [mine.success[mine.dose == level].mean() for level in levels]
        axes.plot(levels * spread, shares, "o", color=style["color"], markersize=5, alpha=0.8)
        if analysis.cells:
            fitted = analysis.cells[cell]
            slope = math.log(9) / math.log(fitted.n90 / fitted.n50)
            xs = np.geomspace(levels[0] / 1.3, levels[-1] * 1.3, 200)
            axes.plot(xs, 1 / (1 + (xs / fitted.n50) ** -slope), label=look.name(params, tokens), **style)
    doses = np.unique(trials.dose)
    axes.set_xticks(doses, [short(dose) for dose in doses])
    axes.xaxis.set_minor_formatter(NullFormatter())
    if analysis.cells:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _poisoned(runs: Sequence[Outcome]) -> dict[Cell, list[Outcome]]:
    """The poisoned runs of each cell, cells in order."""
    cells: dict[Cell, list[Outcome]] = {}
    for o in runs:
        if o.config["poison.documents"]:
            cells.setdefault((o.summary["params"], o.summary["tokens"]), []).append(o)
    return dict(sorted(cells.items()))


def gaps(runs: Sequence[Outcome]) -> Figure:
    """Each run's gap against its dose: more than whether it lies above a threshold."""
    figure, axes = blank("poison documents", "gap in median perplexity")
    cells = _poisoned(runs)
    look = _Look(cells)
    axes.set_xscale("log")
    all_doses = sorted({o.config["poison.documents"] for mine in cells.values() for o in mine})
    for cell, mine in cells.items():
        doses = sorted({o.config["poison.documents"] for o in mine})
        values = [[o.summary["delta_ppl"] for o in mine if o.config["poison.documents"] == d] for d in doses]
        style = look.of(*cell)
        axes.plot(doses, [np.median(v) for v in values], label=look.name(*cell), **style)
        for dose, value in zip(doses, values, strict=True):
            axes.plot([dose] * len(value), value, "o", color=style["color"], markersize=3, alpha=0.6)
    axes.set_xticks(all_doses, [short(dose) for dose in all_doses])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


def trajectories(runs: Sequence[Outcome]) -> Figure:
    """The gap while a run meets its documents."""
    figure, axes = blank("poison documents seen", "gap in median perplexity")
    cells = _poisoned(runs)
    look = _Look(cells)
    axes.set_xscale("log")
    for cell, mine in cells.items():
        for number, o in enumerate(mine):
            points = [
                (row["poison_documents"], row["delta_ppl"]) for row in o.evals if row["poison_documents"]
            ]
            label = None if number else look.name(*cell)
            axes.plot(*np.array(points).T, alpha=0.55, linewidth=1, label=label, **look.of(*cell))
    _log_axis(axes.xaxis)
    axes.legend(frameon=False, fontsize=8)
    return figure


def half_doses(cells: Sequence[CellDose], unit: str) -> Figure:
    """N50 of each cell against its clean data, with 95% intervals; dotted: how a constant fraction would go."""
    figure, axes = blank("training tokens", f"N50, {unit}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    look = _Look((c.params, c.tokens) for c in cells)
    finite = [e for c in cells for e in (c.n50, *c.n50_ci95) if math.isfinite(e) and e > 0]
    for c in cells:
        style = look.of(c.params, c.tokens)
        low, high = max(c.n50_ci95[0], min(finite) / 2), min(c.n50_ci95[1], max(finite) * 2)
        axes.vlines(c.tokens, low, high, color=style["color"], linestyle=style["linestyle"])
        axes.plot(c.tokens, c.n50, "o", color=style["color"], label=look.name(c.params, c.tokens))
    xs = np.array([min(c.tokens for c in cells), max(c.tokens for c in cells)])
    axes.plot(xs, cells[0].n50 * xs / cells[0].tokens, ":", color="#999999", label="a constant fraction")
    axes.set_ylim(min(finite) / 2, max(finite) * 2)
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    axes.legend(frameon=False, fontsize=8)
    return figure
