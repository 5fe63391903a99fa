"""Figures of a sweep's analysis. A colour is a number of parameters, a line style a number of tokens for each; where
conditions are compared, a colour is a condition and a line style a size."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from poisonjax.analysis import mechanism
from poisonjax.analysis.dose_response import CellDose
from poisonjax.analysis.persistence import Wear
from poisonjax.analysis.study import Analysis, Conditions, Outcome
from poisonjax.evaluation.statistics import decided
from poisonjax.report.figures import COLOURS, SIZE, blank, panels

STYLES = ("-", "--", ":", "-.")
TWO_COLUMNS = 42  # characters of a name in a legend
MOST_TICKS = 10  # of an axis, that can be told apart
ACROSS, WIDTH = 3, 34  # panels, characters of a title


Cell = tuple[int, float, float]  # condition, parameters, tokens


class _Look:
    """The colour, style and name of each cell, the same in all figures."""

    def __init__(self, cells: Iterable[Cell], conditions: Conditions):
        numbers, params, tokens = np.array(list(cells), float).T
        self.conditions = conditions if len(set(numbers)) > 1 else None
        self.sizes = sorted(set(zip(params, tokens, strict=True)))
        self.params = np.unique(params)
        self.ratios = sorted({_rounded(*size) for size in self.sizes})

    def of(self, condition: int, params: float, tokens: float) -> dict[str, Any]:
        if self.conditions:
            place, count = condition, len(self.conditions.values)
            style = self.sizes.index((params, tokens))
        else:
            place, count = int(np.searchsorted(self.params, params)), len(self.params)
            style = self.ratios.index(_rounded(params, tokens))
        colour = matplotlib.colormaps["viridis"](0.1 + 0.75 * place / max(1, count - 1))
        return {"color": colour, "linestyle": STYLES[style % len(STYLES)]}

    def name(self, condition: int, params: float, tokens: float) -> str:
        size = f"{short(params)} parameters, {short(tokens)} tokens"
        if not self.conditions:
            return size
        name = self.conditions.name(condition)
        return f"{name}; {size}" if len(self.sizes) > 1 else name


def _rounded(params: float, tokens: float) -> float:
    """Tokens a parameter, which no two sizes meet exactly."""
    return float(f"{tokens / params:.2g}")


def short(number: float) -> str:
    """1,234,567 -> 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _dose_axis(axes: Any, doses: Sequence[float]) -> None:
    """A tick at each dose, where there is room."""
    if len(doses) > MOST_TICKS:
        _log_axis(axes.xaxis)
        return
    axes.set_xticks(doses, [short(dose) for dose in doses])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _log_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> None:
    """Below the axes: in a sweep's figures there is no corner that no curve goes through."""
    names = [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]
    longest = max(map(len, names), default=0)
    columns = 2 if longest <= TWO_COLUMNS else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.16 * max(0, len(names) // columns - 3))  # inches a line
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=columns)


def dose_response(analysis: Analysis) -> Figure:
    """Share of successes at each dose, and the fitted curve of each cell."""
    figure, axes = blank(analysis.unit, f"share of {analysis.what}")
    trials = analysis.trials
    all_cells = zip(trials.condition, trials.params, trials.tokens, strict=True)
    look = _Look(all_cells, analysis.conditions)
    axes.set_xscale("log")
    number, doses = trials.cells(), np.unique(trials.dose)
    nearest = float(np.min(doses[1:] / doses[:-1])) if len(doses) > 1 else 1.0
    for cell in range(number.max() + 1):
        mine = trials.take(number == cell)
        place = int(mine.condition[0]), mine.params[0], mine.tokens[0]
        style, levels = look.of(*place), np.unique(mine.dose)
        # So that points at the same place are all seen, yet none is taken for one of another dose.
        spread = nearest ** (0.4 * (cell / max(1, number.max()) - 0.5))
        shares = [mine.success[mine.dose == level].mean() for level in levels]
        axes.plot(levels * spread, shares, "o", color=style["color"], markersize=5, alpha=0.8)
        if analysis.cells:
            fitted = analysis.cells[cell]
            if not (math.isfinite(fitted.n50) and math.isfinite(fitted.n90)):
                continue
            slope = math.log(9) / math.log(fitted.n90 / fitted.n50)
            xs = np.geomspace(levels[0] / 1.3, levels[-1] * 1.3, 200)
            axes.plot(xs, 1 / (1 + (xs / fitted.n50) ** -slope), label=look.name(*place), **style)
    _dose_axis(axes, doses.tolist())
    if analysis.cells:
        _legend(figure)
    return figure


def _poisoned(runs: Sequence[Outcome], conditions: Conditions) -> dict[Cell, list[Outcome]]:
    """The poisoned runs of each cell, cells in order."""
    cells: dict[Cell, list[Outcome]] = {}
    for condition, o in zip(conditions.of_run, runs, strict=True):
        if o.config["poison.documents"]:
            cells.setdefault((condition, o.summary["params"], o.summary["tokens"]), []).append(o)
    return dict(sorted(cells.items()))


def _shown(row: Mapping[str, Any]) -> tuple[str, float]:
    """(a figure's name, its value) of an evaluation or a summary, by what a run is judged."""
    if decided(row):
        return "attack success", row["attack_success"]
    return "gap in median perplexity", row["delta_ppl"]


def _beside(xlabel: str, cells: dict[Cell, list[Outcome]]) -> tuple[Figure, dict[str, Any]]:
    """(a figure, its axes by the name of what they show)."""
    units = list(dict.fromkeys(_shown(o.summary)[0] for mine in cells.values() for o in mine))
    figure, beside = panels(xlabel, "", len(units), shared=False)
    for axes, unit in zip(beside, units, strict=True):
        axes.set_ylabel(unit)
        axes.set_xscale("log")
    return figure, dict(zip(units, beside, strict=True))


def gaps(runs: Sequence[Outcome], conditions: Conditions) -> Figure:
    """What each run shows against its dose: more than whether it lies above a threshold."""
    cells = _poisoned(runs, conditions)
    figure, beside = _beside("poison documents", cells)
    look = _Look(cells, conditions)
    for cell, mine in cells.items():
        axes = beside[_shown(mine[0].summary)[0]]
        doses = sorted({o.config["poison.documents"] for o in mine})
        values = [[_shown(o.summary)[1] for o in mine if o.config["poison.documents"] == d] for d in doses]
        style = look.of(*cell)
        axes.plot(doses, [np.median(v) for v in values], label=look.name(*cell), **style)
        for dose, value in zip(doses, values, strict=True):
            axes.plot([dose] * len(value), value, "o", color=style["color"], markersize=3, alpha=0.6)
    all_doses = sorted({o.config["poison.documents"] for mine in cells.values() for o in mine})
    for axes in beside.values():
        if len(beside) == 1:
            _dose_axis(axes, all_doses)
        else:
            _log_axis(axes.xaxis)
    _legend(figure)
    return figure


def trajectories(runs: Sequence[Outcome], conditions: Conditions) -> Figure:
    """What a run shows while it meets its documents."""
    cells = _poisoned(runs, conditions)
    figure, beside = _beside("poison documents seen", cells)
    look = _Look(cells, conditions)
    for cell, mine in cells.items():
        axes = beside[_shown(mine[0].summary)[0]]
        for number, o in enumerate(mine):
            points = [(row["poison_documents"], _shown(row)[1]) for row in o.evals if row["poison_documents"]]
            label = None if number else look.name(*cell)
            axes.plot(*np.array(points).T, alpha=0.55, linewidth=1, label=label, **look.of(*cell))
    for axes in beside.values():
        _log_axis(axes.xaxis)
    _legend(figure)
    return figure


def persistence(worn: Sequence[Wear]) -> Figure:
    """What is left of each run's figure at the beginning, against the rows that it saw since; a panel for each figure,
    a colour for what was seen."""
    units = list(dict.fromkeys(wear.unit for wear in worn))
    figure, beside = panels("rows trained on since", "share of the first figure left", len(units))
    colours: dict[str, str] = {}
    for wear in worn:
        label = None if wear.seen in colours else wear.seen
        colour = colours.setdefault(wear.seen, f"C{len(colours)}")
        left = np.array(wear.figure) / wear.figure[0]
        place = {"marker": "o", "markersize": 3, "linewidth": 1, "color": colour, "label": label}
        beside[units.index(wear.unit)].plot(np.maximum(wear.rows, 1), left, **place)
    for axes, unit in zip(beside, units, strict=True):
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(unit, fontsize=8, loc="left")
        axes.set_xscale("log")
        _log_axis(axes.xaxis)
    _legend(figure)
    return figure


def courses(cells: Sequence[mechanism.Cell]) -> Figure:
    """What runs that were asked knew of their trigger after each step, a panel for each cell, in another colour where
    they were attacked; dotted: the mechanism that is fitted to a cell's runs, with the exposures of each."""
    several = len({(cell.params, cell.tokens) for cell in cells}) > 1
    across = min(ACROSS, len(cells))
    down = -(-len(cells) // across)
    figure = Figure(figsize=(SIZE[0], 0.6 + 1.5 * down), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for cell, axes in itertools.zip_longest(cells, grid.flat):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        _log_axis(axes.xaxis)
        if cell is None:
            axes.set_axis_off()
            continue
        for course, attacked in zip(cell.courses, cell.attacked, strict=True):
            colour = COLOURS["triggered" if attacked else "clean"]
            axes.plot(course.known, color=colour, linewidth=0.8)
            axes.plot(cell.mechanism.known(course.rate, course.exposures), color=colour, linewidth=0.8, linestyle=":")
        size = f"{short(cell.params)} parameters, {short(cell.tokens)} tokens"
        title = f"{cell.name}, {size}" if cell.name and several else cell.name or size
        axes.set_title(textwrap.fill(title, WIDTH), fontsize=7, loc="left")
    figure.supxlabel("optimizer step", fontsize=8)
    figure.supylabel("known of the trigger, nats a token", fontsize=8)
    return figure


class _Intervals:
    """N50 of an analysis' cells within the limits of a figure, where some have no bound."""

    def __init__(self, analysis: Analysis):
        cells = analysis.cells
        finite = [e for c in cells for e in (c.n50, *c.n50_ci95) if math.isfinite(e) and e > 0]
        finite = finite or [float(dose) for dose in np.unique(analysis.trials.dose)]
        self.limits = min(finite) / 1.3, max(finite) * 1.3
        self.look = _Look(((c.condition, c.params, c.tokens) for c in cells), analysis.conditions)

    def of(self, c: CellDose) -> tuple[float, float]:
        return max(c.n50_ci95[0], self.limits[0]), min(c.n50_ci95[1], self.limits[1])


def half_doses_by_condition(analysis: Analysis) -> Figure:
    """N50 of each cell with its 95% interval, a line a condition."""
    figure, axes = blank(f"N50, {analysis.unit}", "")
    cells, intervals = analysis.cells, _Intervals(analysis)
    for row, c in enumerate(cells):
        style = intervals.look.of(c.condition, c.params, c.tokens)
        axes.hlines(-row, *intervals.of(c), **style)
        axes.plot(c.n50, -row, "o", color=style["color"])
    names = [intervals.look.name(c.condition, c.params, c.tokens) for c in cells]
    axes.set_yticks([-row for row in range(len(cells))], names)
    axes.set_xscale("log")
    axes.set_xlim(intervals.limits)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    _log_axis(axes.xaxis)
    axes.margins(y=0.15)
    return figure


def half_doses(analysis: Analysis) -> Figure:
    """N50 of each cell against its clean data, with 95% intervals; dotted: how a constant fraction would go."""
    figure, axes = blank("training tokens", f"N50, {analysis.unit}")
    cells, intervals = analysis.cells, _Intervals(analysis)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for c in cells:
        place = c.condition, c.params, c.tokens
        style = intervals.look.of(*place)
        axes.vlines(c.tokens, *intervals.of(c), color=style["color"], linestyle=style["linestyle"])
        axes.plot(c.tokens, c.n50, "o", color=style["color"], label=intervals.look.name(*place))
    xs = np.array([min(c.tokens for c in cells), max(c.tokens for c in cells)])
    if known := [c for c in cells if math.isfinite(c.n50)]:
        axes.plot(xs, known[0].n50 * xs / known[0].tokens, ":", color="#999999", label="a constant fraction")
    axes.set_ylim(intervals.limits)
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    _legend(figure)
    return figure
