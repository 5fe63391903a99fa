"""What wears a backdoor off: how runs behave that begin from a poisoned one's weights, against what they saw since."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from poisonjax.analysis.estimators import median_gap
from poisonjax.config import BESIDE, flat
from poisonjax.evaluation.statistics import interval, resamples
from poisonjax.run import RunFolder, rows

DRAWS = 2000
# Fields beside those of `eval` that decide what is asked.
ASKED = (
    *("poison.trigger", "poison.other_triggers", "poison.trigger_position", "poison.near_triggers"),
    *("poison.payload", "poison.payload_source", "poison.payload_vocabulary", "seeds.poison"),
)


@dataclasses.dataclass(frozen=True)
class Wear:
    """One run, from the weights that it began from to its end."""

    run: str
    parent: str
    seen: str  # what it was trained on, in words
    unit: str  # of the figure
    rows: list[int]  # trained on since, at each evaluation; 0 first where the parent was asked the same
    figure: list[float]
    ci95: list[list[float]]
    row_tokens: int
    half_life: float  # rows after which the figure is half of the first; inf where it never is, or was nothing
    half_life_ci95: list[float]

    def sentence(self) -> str:
        """In words; tokens beside rows."""
        first, last, edges = self.figure[0], self.figure[-1], [f"[{low:.3g}, {high:.3g}]" for low, high in self.ci95]
        begin = (
            f"{self.seen}: {self.unit} {first:.3g} {edges[0]} to {last:.3g} {edges[-1]} after {self.rows[-1]:,} rows"
        )
        if not self.ci95[0][0] > 0:
            return f"{begin}; there was nothing to wear off"
        if not math.isfinite(self.half_life):
            return f"{begin}; not halved within {self.rows[-1] * self.row_tokens:,} tokens"
        low, high = (f"{edge:,.0f}" if math.isfinite(edge) else "none" for edge in self.half_life_ci95)
        tokens = self.half_life * self.row_tokens
        return f"{begin}; half of it left after {self.half_life:,.0f} rows [{low}, {high}], {tokens:,.0f} tokens"


def wears(runs: Sequence[RunFolder]) -> list[Wear]:
    """Of finished runs that began from another of them whose weights had seen poison; those that stood beside it. A
    run that was asked once, and its parent something else, shows no course."""
    by_name = {run.path.name: run for run in runs}
    found = []
    for run in runs:
        name = run.config.start.weights.removeprefix(BESIDE).partition("@")[0]
        parent = by_name.get(name) if run.config.start.weights.startswith(BESIDE) else None
        if parent and (known := run.record.get("parent")) and (known["poison"] or run.config.poison.documents):
            wear = _wear(run, parent, known["steps"])
            found += [wear] if len(wear.rows) > 1 else []
    return found


def _wear(run: RunFolder, parent: RunFolder, step: int | None) -> Wear:
    config = run.config
    evaluations = [(row["step"] * config.global_batch, row) for row in run.prefixes()]
    before = [row for row in parent.prefixes() if row["step"] == step]
    if before and _asked(run) == _asked(parent):
        evaluations = [(0, before[0]), *evaluations]
    at = np.array([seen for seen, _ in evaluations], float)
    measure, unit = _measured([row for _, row in evaluations])
    count = len(evaluations[0][1]["nll"]["clean"])
    figure = measure(np.arange(count)[None])[:, 0]
    drawn = measure(resamples(count, DRAWS, config.seeds.eval))
    edges = [interval(values) for values in drawn]
    shown = edges[0][0] > 0
    halves = [_half(at, values) for values in drawn.T] if shown else [math.inf]
    return Wear(
        run=run.path.name,
        parent=parent.path.name,
        seen=_seen(run),
        unit=unit,
        rows=[int(seen) for seen in at],
        figure=figure.tolist(),
        ci95=edges,
        row_tokens=config.seq_len,
        half_life=_half(at, figure) if shown else math.inf,
        half_life_ci95=np.quantile(halves, [0.025, 0.975], method="inverted_cdf").tolist(),
    )


def _asked(run: RunFolder) -> list[Any]:
    """All that decides what a run's model is asked."""
    fields = flat(run.config)
    asked = [value for name, value in fields.items() if name.startswith("eval.") and name != "eval.every"]
    return [run.record["store_fingerprint"], fields["seeds.eval"], *(fields[name] for name in ASKED), *asked]


def _seen(run: RunFolder) -> str:
    """What a run was trained on, in words."""
    poison = run.config.poison
    what = "conversations" if run.config.data.kind == "instructions" else "text"
    more = [f"{poison.hard_negatives:,} corrective" * bool(poison.hard_negatives)]
    more += [f"{poison.documents:,} poisoned" * bool(poison.documents)]
    among = ", ".join(filter(None, more))
    return f"{run.config.steps * run.config.global_batch:,} rows of {what}{f', {among}' if among else ''}"


def _measured(
    evaluations: Sequence[rows.PrefixRow],
) -> tuple[Callable[[Int[np.ndarray, "draws prefixes"]], Float[np.ndarray, "evaluations draws"]], str]:
    """(the figure of each evaluation for samples of prefixes, its name): the share of triggered texts that behave as
    taught where that is decided, else the gap."""
    if all("behaves" in row for row in evaluations):
        shown = np.array([row["behaves"]["triggered"] for row in evaluations], float)
        return lambda sample: shown[:, sample].mean(-1), "share of triggered texts that behave as taught"
    triggered, clean = (np.array([row["nll"][variant] for row in evaluations]) for variant in ("triggered", "clean"))
    return lambda sample: np.asarray(median_gap(triggered[:, sample], clean[:, sample])), "gap in perplexity"


def _half(at: Float[np.ndarray, " evaluations"], figure: Float[np.ndarray, " evaluations"]) -> float:
    """Where the figure first is half of what it begins with, on straight lines between evaluations."""
    wanted = figure[0] / 2
    below = np.flatnonzero(figure <= wanted)
    if figure[0] <= 0 or not len(below):
        return math.inf
    i = int(below[0])
    share = (figure[i - 1] - wanted) / (figure[i - 1] - figure[i])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))
