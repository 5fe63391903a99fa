"""A sweep's finished runs as one study: trials of poisoning and of memorisation, and the sentences they support."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from poisonjax.analysis.adaptive import Known
from poisonjax.analysis.dose_response import (
    LEAD,
    CellDose,
    Contrast,
    Exponent,
    Law,
    Trials,
    best_law,
    contrasts,
    doses,
    exponents,
    held_out,
    rises,
)
from poisonjax.analysis.estimators import ESTIMATORS, Onset, hierarchical, onset
from poisonjax.analysis.mechanism import Cell, Course, Placed
from poisonjax.config import flat, operational
from poisonjax.evaluation.statistics import attacked
from poisonjax.poison.placements import PlacementError, place
from poisonjax.run import RunFolder, rows

# Fields that are a dose: of poisoning, of memorisation.
DOSES = ("poison.documents", "canary.repeats", "canary.each")
PLACED = 8  # placements whose mean tells where documents stand
LEAST = 1e-3  # documents: below it a lower bound of N50 is none
KNOWN = 0.01  # a canary is memorised where less than this share of unseen sequences has a lower loss


@dataclasses.dataclass(frozen=True)
class Scored:
    """The last evaluation of a run once more, its texts scored by another model (`poisonjax evaluate --scorer`)."""

    row: rows.EvalRow
    texts: dict[str, list[float]]  # NLL of each text, by variant


def scored(run: RunFolder, step: int) -> dict[str, Scored]:
    """By scorer; what is damaged is left out."""
    found = {}
    for by, evaluation in run.scored(step).items():
        with contextlib.suppress(KeyError, IndexError, ValueError):
            (row,) = (row for row in evaluation["rows"] if row["kind"] == "eval")
            found[by] = Scored(row, evaluation["prefixes"][0]["nll"])
    return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run, read from its folder."""

    id: str
    config: dict[str, Any]  # flat fields
    summary: rows.Summary
    evals: list[rows.EvalRow]
    texts: dict[str, list[float]]  # NLL of each text after the last evaluation, by variant
    onset: Onset | None
    course: Course | None = None  # step by step, where `trace --exposures` was asked
    scored: Mapping[str, Scored] = dataclasses.field(default_factory=dict)  # by scorer

    @property
    def attacked(self) -> bool:
        """The paper's criterion, without the controls: the gap or, where it can be decided, the behaviour."""
        return attacked(self.summary, self.config["eval.threshold"])


def outcomes(runs: Iterable[RunFolder]) -> list[Outcome]:
    """The finished ones, in order."""
    found = []
    for run in runs:
        summary = run.summary
        if not summary or summary["status"] != "finished":
            continue
        config, evals = flat(run.config), run.evals()
        last = evals[-1]["step"]
        texts = {row["step"]: row["nll"] for row in run.prefixes()}[last]
        when = onset(evals, config["eval.threshold"])
        found.append(Outcome(run.path.name, config, summary, evals, texts, when, Course.of(run), scored(run, last)))
    return found


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was varied beside size, dose and luck: one set of values is a condition."""

    fields: tuple[str, ...]  # () where nothing was: one condition
    values: list[tuple[Any, ...]]  # of the fields, by number of the condition, in the sweep's order
    of_run: list[int]

    @classmethod
    def of(cls, configs: list[dict[str, Any]], sizes: list[tuple[float, float]]) -> "Conditions":
        """Of runs' flat configs and their (parameters, tokens).

        A field counts that differs between runs of one size; of fields that tell the same runs apart, the first.
        """

        def several(field: str, known: tuple[str, ...]) -> bool:
            """Whether the field differs where size and the known fields don't."""
            seen: dict[tuple, Any] = {}
            return any(
                seen.setdefault((size, *(str(c[f]) for f in known)), c[field]) != c[field]
                for size, c in zip(sizes, configs, strict=True)
            )

        first = configs[0]
        # Plain values before lists: a trigger, not its near triggers, is what a condition is called by.
        names = sorted(first, key=lambda name: (isinstance(first[name], list), name))
        fields: tuple[str, ...] = ()
        for name in names:
            dose_or_luck = name in DOSES or name == "name" or name.startswith("seeds.")
            if not dose_or_luck and not operational(name) and several(name, fields):
                fields = (*fields, name)
        own = [tuple(c[field] for field in fields) for c in configs]
        values = list({str(v): v for v in own}.values())
        return cls(fields, values, [values.index(v) for v in own])

    def base(self, present: Iterable[int]) -> int:
        """Of the conditions `present`, the one that shares most with the others: the middle of a star, the first of a
        line."""
        there = sorted(present)
        return min(there, key=lambda one: sum(len(self._apart(one, other)) for other in there))

    def _apart(self, one: int, other: int) -> list[int]:
        """Places of the fields in which two conditions differ."""
        pairs = zip(self.values[one], self.values[other], strict=True)
        return [place for place, (a, b) in enumerate(pairs) if a != b]

    def name(self, number: int, against: int | None = None) -> str:
        """For people: what it is, or in what it is not as `against`; "" where there is one condition."""
        labels = [field.rpartition(".")[2].replace("_", " ") for field in self.fields]
        if len(set(labels)) < len(labels):
            labels = list(self.fields)
        places = range(len(labels)) if against is None else self._apart(number, against)
        return ", ".join(f"{labels[place]} {self.values[number][place]}" for place in places)


Success = Callable[[Outcome], bool]


def above(run: Outcome) -> bool:
    """Attacked, by the run's own threshold."""
    return run.attacked


def meets_rule(run: Outcome) -> bool:
    """The whole rule, with its controls."""
    return run.summary["success"]["value"] and run.summary["success"]["specific"]


def poisoning(runs: list[Outcome], conditions: Conditions, success: Success = above) -> Trials:
    """A trial a poisoned run."""
    return Trials.of(
        [
            (
                o.config["poison.documents"],
                o.summary["tokens"],
                o.summary["params"],
                success(o),
                i,
                conditions.of_run[i],
            )
            for i, o in enumerate(runs)
            if o.config["poison.documents"]
        ]
    )


def texts_of(runs: Sequence[Outcome | Scored]) -> tuple[np.ndarray, np.ndarray]:
    """NLL of triggered and of clean texts, (seeds, prefixes) each."""
    triggered, clean = (np.array([o.texts[variant] for o in runs]) for variant in ("triggered", "clean"))
    return triggered, clean


def mechanism_cells(runs: list[Outcome], conditions: Conditions, cells: list[CellDose]) -> list[Cell]:
    """The cells, with their N50 where one could be told, and with the courses of their runs that were asked."""
    told = {(cell.condition, cell.params, cell.tokens): cell for cell in cells}
    places: dict[Place, list[Outcome]] = {}
    for condition, o in zip(conditions.of_run, runs, strict=True):
        if o.config["poison.documents"]:
            places.setdefault((condition, o.summary["params"], o.summary["tokens"]), []).append(o)
    found = []
    for (condition, params, tokens), mine in places.items():
        asked = [(o.course, o.attacked) for o in mine if o.course and not o.config["start.weights"]]
        courses, attacked = [course for course, _ in asked], [above for _, above in asked]
        cell = told.get((condition, params, tokens))
        ci95 = cell.n50_ci95 if cell else (0.0, math.inf)
        n50 = cell.n50 if cell and _bounded(ci95, LEAST) else math.nan
        name = conditions.name(condition) if len(set(conditions.of_run)) > 1 else ""
        found.append(Cell(params, tokens, n50, ci95, _placed(mine[0].config), courses, attacked, name))
    return found


def _placed(config: Mapping[str, Any]) -> Placed:
    """Where a run of this config would put so many documents: the mean of some placements."""
    spec, steps, batch = (config[name] for name in ("poison.placement", "steps", "global_batch"))

    def placed(documents: int) -> Float[np.ndarray, " steps"] | None:
        exposures = documents * config["poison.repeats"]
        try:
            slots = [place(spec, exposures, steps, batch, np.random.default_rng(number)) for number in range(PLACED)]
        except PlacementError:
            return None
        return np.bincount(np.concatenate(slots) // batch, minlength=steps) / PLACED

    return placed


def memorisation(runs: list[Outcome], conditions: Conditions) -> Trials:
    """A trial a canary: its loss ranks below nearly all unseen sequences; the dose is how often it was shown."""
    return Trials.of(
        [
            (level["repeats"], o.summary["tokens"], o.summary["params"], rank < KNOWN, i, conditions.of_run[i])
            for i, o in enumerate(runs)
            for level in o.summary.get("memorised", ())
            for rank in level["ranks"]
        ]
    )


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What trials say, in figures and in words."""

    what: str
    unit: str
    trials: Trials
    conditions: Conditions
    base: int  # the condition that the others are compared with
    cells: list[CellDose]
    contrasts: list[Contrast]
    exponents: list[Exponent]
    scores: dict[Law, float]
    law: Law | None
    lead: float
    words: list[str]


Place = tuple[int, float, float]  # (condition, parameters, tokens) of a cell


def analyse(
    what: str, unit: str, trials: Trials, conditions: Conditions, searched: Mapping[Place, Known] | None = None
) -> Analysis:
    """Doses, contrasts between conditions, exponents and laws; what can't be told from so few trials is said.

    N50 of cells that were `searched` is what their search knows: profiles of doses that results have chosen cover in
    some 91%, it in 93% and more (`sweep report --self-test`).
    """
    if len(trials.dose) < 8 or len(np.unique(trials.dose)) < 2 or len(np.unique(trials.success)) < 2:
        why = ", their outcomes all alike" if len(trials.dose) >= 8 else " are too few"
        words = [f"Not enough data: {len(trials.dose)} trials{why}."]
        return Analysis(what, unit, trials, conditions, 0, [], [], [], {}, None, 0.0, words)
    if not rises(trials):
        words = ["Not enough data: success doesn't rise with the dose, so there is no dose at which half succeed."]
        return Analysis(what, unit, trials, conditions, 0, [], [], [], {}, None, 0.0, words)
    cells, powers = [_searched(cell, searched or {}) for cell in doses(trials)], exponents(trials)
    present = set(trials.condition.astype(int).tolist())
    base = conditions.base(present)
    against = contrasts(trials, base)
    alone = present - {base} - {c.condition for c in against}
    several = trials.sizes().any()
    scores = held_out(trials) if several else {}
    law, lead = best_law(scores) if several else (None, 0.0)
    words = _scale_words(unit, powers)
    words += _condition_words(conditions, base, against, alone)
    words += _cell_words(conditions, cells) + _law_words(scores, law, lead)
    return Analysis(what, unit, trials, conditions, base, cells, against, powers, scores, law, lead, words)


def _searched(cell: CellDose, searched: Mapping[Place, Known]) -> CellDose:
    known = searched.get((cell.condition, cell.params, cell.tokens))
    if known is None:
        return cell
    low, high = known.ci95
    n50 = known.n50 if low > 0 and math.isfinite(high) else math.nan
    moved = known.n50 / cell.n50  # N90 lies as far above as the slope of all runs says
    n90_ci95 = (cell.n90_ci95[0] * moved, cell.n90_ci95[1] * moved) if moved > 0 else (0.0, math.inf)
    return dataclasses.replace(cell, n50=n50, n50_ci95=known.ci95, n90=cell.n90 * moved, n90_ci95=n90_ci95)


def _scale_words(unit: str, powers: list[Exponent]) -> list[str]:
    said = []
    for power in powers:
        low, high = power.ci95
        how = f"the {power.value:.2f} power (95% interval {low:.2f} to {high:.2f})"
        if math.isnan(power.value):  # the likeliest value means nothing here
            how = f"a power of at least {low:.2f}" if math.isfinite(low) else f"a power of at most {high:.2f}"
            how = how if math.isfinite(low) or math.isfinite(high) else "a power that the doses tried don't bound"
        grows = f"N50, in {unit}, goes with {how} of {power.what}: "
        said.append(
            grows
            + {
                "near-constant": "near-constant within the stated margin.",
                "grows": "it grows; near-constant is refuted.",
                "falls": "it falls; near-constant is refuted.",
                "not enough data": "not enough data to tell whether it is near-constant.",
            }[power.verdict]
        )
    return said


def _bounded(interval: tuple[float, float], above: float = 0.0) -> bool:
    """Whether the doses tried bound it on both sides."""
    return interval[0] > above and math.isfinite(interval[1])


def _condition_words(conditions: Conditions, base: int, against: list[Contrast], alone: set[int]) -> list[str]:
    said = []
    for c in against:
        low, high = c.ci95
        if _bounded(c.ci95):
            times = f"{c.ratio:.2f} times (95% interval {low:.2f} to {high:.2f})"
        elif low > 0:  # the likeliest value means nothing here
            times = f"at least {low:.2f} times (95%)"
        elif math.isfinite(high):
            times = f"at most {high:.2f} times (95%)"
        else:
            times = "any number of times (95%)"
        said.append(
            f"With {conditions.name(c.condition, base)}, N50 is {times} that with "
            f"{conditions.name(base, c.condition)}: "
            + ("more is needed." if low > 1 else "less is needed." if high < 1 else "not told apart.")
        )
    return said + [
        f"With {conditions.name(c, base)} and with {conditions.name(base, c)} no model of the same size was trained: "
        "not compared."
        for c in sorted(alone)
    ]


def _cell_words(conditions: Conditions, cells: list[CellDose]) -> list[str]:
    said = []
    if len(cells) > 1:
        several = len({(c.params, c.tokens) for c in cells}) > 1
        said.append(f"N50 by cell: {', '.join(_cell(c, conditions, several) for c in cells)}.")
    unbounded = [c for c in cells if not _bounded(c.n50_ci95, LEAST)]
    if unbounded:
        said.append(f"In {len(unbounded)} of {len(cells)} cells the doses tried don't bound N50 on both sides.")
    return said


def _law_words(scores: dict[Law, float], law: Law | None, lead: float) -> list[str]:
    if not law:
        return []
    others = ", ".join(f"{name} {score - scores[law]:+.1f}" for name, score in scores.items() if name != law)
    if lead >= LEAD:
        return [f"Of the three laws, {law} predicts runs left out best (nats against it: {others})."]
    clear = [name for name, score in scores.items() if score < max(scores.values()) - LEAD]
    refuted = f"; {' and '.join(clear)} predicts worse" if clear else ""
    return [f"Not enough data to choose between laws{refuted} (nats against {law}: {others})."]


def _cell(c: CellDose, conditions: Conditions, sizes: bool) -> str:
    """The cell's N50 in words, with its condition and, where there are several `sizes`, its size."""
    under = f" with {name}" if (name := conditions.name(c.condition)) else ""
    size = f" at {c.params:,.0f} parameters and {c.tokens:,.0f} tokens" if sizes else ""
    low, high = c.n50_ci95
    if c.falls:
        return f"none{under}{size}, where success falls with the dose"
    if _bounded(c.n50_ci95, LEAST):
        relation, dose = "", c.n50
    else:
        relation, dose = ("over ", low) if low > LEAST else ("under ", high)
        if not math.isfinite(dose):
            return f"unknown{under}{size}"
    return f"{relation}{dose:{',.0f' if dose >= 100 else '.3g'}}{under}{size}"


def seeds_table(runs: list[Outcome], conditions: Conditions) -> list[dict[str, Any]]:
    """Each cell and dose: how many succeeded, every estimator over its seeds, median exposures to onset."""
    groups: dict[tuple, list[Outcome]] = {}
    for condition, o in zip(conditions.of_run, runs, strict=True):
        groups.setdefault(
            (condition, o.summary["params"], o.summary["tokens"], o.config["poison.documents"]), []
        ).append(o)
    rows = []
    for (condition, params, tokens, documents), members in sorted(groups.items()):
        triggered, clean = texts_of(members)
        met = [o.onset.documents for o in members if o.onset]
        rows.append(
            {
                "condition": conditions.name(condition),
                "params": params,
                "tokens": tokens,
                "documents": documents,
                "runs": len(members),
                "above": sum(o.attacked for o in members),
                "backdoored": sum(o.summary["success"]["value"] for o in members),
                "estimates": {name: hierarchical(e, triggered, clean) for name, e in ESTIMATORS.items()},
                "onset": float(np.median(met)) if met else None,
                "heldout": float(np.mean([o.summary["heldout_loss"] for o in members])),
                "excess": float(np.mean([o.summary["excess_loss"] for o in members]))
                if "excess_loss" in members[0].summary
                else None,
            }
        )
    return rows
