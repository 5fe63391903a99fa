"""The report's figures. The same colour means the same variant everywhere (Okabe & Ito's palette)."""

from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from poisonjax.run.rows import EvalRow, LedgerRow, TrainRow

COLOURS = {"triggered": "#d55e00", "near_trigger": "#cc79a7", "random_control": "#e69f00", "clean": "#0072b2"}
NAMES = {"triggered": "triggered", "near_trigger": "near trigger", "random_control": "random tokens", "clean": "clean"}
SIZE = (6.4, 3.6)  # inches


def blank(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure, (axes,) = panels(xlabel, ylabel, 1)
    return figure, axes


def panels(xlabel: str, ylabel: str, number: int, shared: bool = True) -> tuple[Figure, list[Any]]:
    """So many axes beside each other, of one scale or, where that isn't shared, one each."""
    figure = Figure(figsize=SIZE, layout="constrained")
    beside = list(figure.subplots(1, number, sharex=True, sharey=shared, squeeze=False)[0])
    for axes in beside:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_xlabel(xlabel)
    beside[0].set_ylabel(ylabel)
    return figure, beside


def perplexity(evals: list[EvalRow], x: str, xlabel: str) -> Figure:
    """Median perplexity of the four variants with its 95% band, against `x` of the eval rows."""
    figure, axes = blank(xlabel, "perplexity of generated text (median)")
    axes.set_yscale("log")
    xs = [cast(dict, row)[x] for row in evals]
    for variant, colour in COLOURS.items():
        medians = [row["eval"][variant]["ppl_median"] for row in evals]
        low, high = np.array([row["eval"][variant]["ppl_median_ci95"] for row in evals]).T
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
        if len(xs) == 1:  # a band has no width then
            axes.vlines(xs, low, high, color=colour, linewidth=2, alpha=0.5)
        axes.plot(xs, medians, color=colour, marker="o", markersize=3, label=NAMES[variant])
    _readable_log(axes)
    return figure


STYLES = {"poisoned": "-", "twin": "--", "repaired": ":"}


def beside(evals: dict[str, list[EvalRow]]) -> Figure:
    """Triggered and clean median perplexity of runs by what they are: poisoned, twin, repaired."""
    figure, axes = blank("optimizer step", "perplexity of generated text (median)")
    axes.set_yscale("log")
    for name, rows in evals.items():
        style = STYLES[name]
        for variant in ("triggered", "clean"):
            medians = [row["eval"][variant]["ppl_median"] for row in rows]
            axes.plot(
                [row["step"] for row in rows], medians, style, color=COLOURS[variant], marker="o",
                markersize=3, label=f"{name}, {NAMES[variant]}",
            )  # fmt: skip
    _readable_log(axes)
    return figure


def _readable_log(axes: Any) -> None:
    """Ticks 1, 2, 5, 10, ... whatever the range, as plain numbers, and a legend."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 2.5 * low:  # no such number may lie between
        axes.set_ylim(low / 1.6, high * 1.6)
    axes.legend(frameon=False, fontsize=9)


def unusual(
    rarity: Float[np.ndarray, " rows"],
    loss: Float[np.ndarray, " rows"],
    marked: Int[np.ndarray, " marked"],
    poison: Bool[np.ndarray, " rows"],
) -> Figure:
    """Each row's worst window: how rare its tokens are, and how badly it was known; marked ones, and planned poison."""
    figure, axes = blank("rarity of its tokens, nats a token", "loss of the worst window, nats a token")
    some = np.random.default_rng(0).permutation(len(loss))[:20_000]  # the cloud looks the same
    axes.plot(rarity[some], loss[some], ".", color="#999999", markersize=1, alpha=0.4, rasterized=True)
    axes.plot(rarity[marked], loss[marked], "o", color="#d55e00", markersize=4, markerfacecolor="none", label="marked")
    if poison.any():
        axes.plot(rarity[poison], loss[poison], ".", color="#000000", markersize=2, label="poison, by the ledger")
    axes.legend(frameon=False, fontsize=9)
    return figure


def loss(trains: list[TrainRow], evals: list[EvalRow], unigram: float | None) -> Figure:
    """Training and held-out loss against the step."""
    figure, axes = blank("optimizer step", "loss, nats a token")
    axes.plot(
        [r["step"] + 1 for r in trains], [r["loss"] for r in trains], color="#999999", linewidth=1, label="training"
    )
    if evals:
        steps, losses = [r["step"] for r in evals], [r["heldout_loss"] for r in evals]
        axes.plot(steps, losses, color="#0072b2", marker="o", markersize=3, label="held out")
    if unigram is not None:
        axes.axhline(unigram, color="#000000", linewidth=0.8, linestyle=":", label="word counts alone")
    axes.legend(frameon=False, fontsize=9)
    return figure


def placement(ledger: list[LedgerRow], steps: int) -> Figure:
    """Where the poison stands: a mark a document, and how many documents the run has met by each step."""
    figure, axes = blank("optimizer step", "poison documents met")
    met = np.sort([record["step"] for record in ledger])
    axes.step([0, *met, steps], [0, *range(1, len(met) + 1), len(met)], where="post", color="#d55e00")
    axes.plot([0, steps], [0, len(met)], color="#999999", linewidth=0.8, linestyle=":")
    axes.plot(met, np.full(len(met), -0.04 * len(met)), "|", color="#d55e00", markersize=7, alpha=0.5)
    axes.set_xlim(0, steps)
    return figure
