"""A sweep's finished runs as one study: trials of poisoning and of memorisation, and the sentences they support."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from poisonjax.analysis.dose_response import (
    LEAD,
    CellDose,
    Exponent,
    Law,
    Trials,
    best_law,
    doses,
    exponents,
    held_out,
)
from poisonjax.analysis.estimators import ESTIMATORS, Onset, hierarchical, onset
from poisonjax.runfolder import read_lines
from poisonjax.sweep.grid import Sweep

KNOWN = 0.01  # a canary is memorised where less than this share of unseen sequences has a lower loss


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run, read from its folder."""

    id: str
    config: dict[str, Any]  # flat fields
    summary: dict[str, Any]
    evals: list[dict[str, Any]]
    texts: dict[str, list[float]]  # NLL of each text after the last evaluation, by variant
    onset: Onset | None

    @property
    def gap_above_threshold(self) -> bool:
        """The paper's criterion: the gap alone, at the lower end of its interval."""
        return self.summary["delta_ppl_ci95"][0] >= self.config["eval.threshold"]


def outcomes(sweep: Sweep, workdir: Path) -> list[Outcome]:
    """The finished runs, in the sweep's order."""
    from poisonjax.config import flat

    found = []
    for run in sweep.runs:
        folder = epath.Path(workdir / run.id)
        if not (folder / "summary.json").exists():
            continue
        summary = json.loads((folder / "summary.json").read_text())
        if summary["status"] != "finished":
            continue
        config = flat(run.config)
        evals = [row for row in read_lines(folder / "metrics.jsonl") if row["kind"] == "eval"]
        texts = {row["step"]: row["nll"] for row in read_lines(folder / "prefixes.jsonl")}
        found.append(
            Outcome(
                run.id,
                config,
                summary,
                evals,
                texts[evals[-1]["step"]],
                onset(evals, config["eval.threshold"]),
            )
        )
    return found


def poisoning(runs: list[Outcome], *, rule: bool = False) -> Trials:
    """A trial a poisoned run: a gap above the threshold, or with `rule` the whole rule with its controls."""
    kept = [(i, o) for i, o in enumerate(runs) if o.config["poison.documents"]]
    return _trials(
        [
            (
                o.config["poison.documents"],
                o.summary["tokens"],
                o.summary["params"],
                o.summary["success"]["value"] if rule else o.gap_above_threshold,
                i,
            )
            for i, o in kept
        ]
    )


def memorisation(runs: list[Outcome]) -> Trials:
    """A trial a canary: its loss ranks below nearly all unseen sequences; the dose is how often it was shown."""
    return _trials(
        [
            (level["repeats"], o.summary["tokens"], o.summary["params"], rank < KNOWN, i)
            for i, o in enumerate(runs)
            for level in o.summary.get("memorised", ())
            for rank in level["ranks"]
        ]
    )


def _trials(rows: list[tuple]) -> Trials:
    return Trials(*np.array(rows, float).reshape(-1, 5).T)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What trials say, in figures and in words."""

    what: str
    unit: str
    trials: Trials
    cells: list[CellDose]
    exponents: list[Exponent]
    scores: dict[Law, float]
    law: Law | None
    lead: float
    words: list[str]


def analyse(what: str, unit: str, trials: Trials) -> Analysis:
    """Doses, exponents and laws; what can't be told from so few trials is said to be so."""
    if len(trials.dose) < 8 or len(np.unique(trials.dose)) < 2 or len(np.unique(trials.success)) < 2:
        why = "all alike" if len(trials.dose) >= 8 else "too few"
        words = [f"Not enough data: {len(trials.dose)} trials, their outcomes {why}."]
        return Analysis(what, unit, trials, [], [], {}, None, 0.0, words)
    cells, powers = doses(trials), exponents(trials)
    several = len(cells) > 1
    scores = held_out(trials) if several else {}
    law, lead = best_law(scores) if several else (None, 0.0)
    return Analysis(
        what, unit, trials, cells, powers, scores, law, lead, _words(unit, cells, powers, scores, law, lead)
    )


def _words(
    unit: str,
    cells: list[CellDose],
    powers: list[Exponent],
    scores: dict[Law, float],
    law: Law | None,
    lead: float,
) -> list[str]:
    said = []
    for power in powers:
        low, high = power.ci95
        grows = (
            f"N50, in {unit}, goes with the {power.value:.2f} power (95% interval {low:.2f} to {high:.2f}) of "
            f"{power.what}: "
        )
        said.append(
            grows
            + {
                "near-constant": "near-constant within the stated margin.",
                "grows": "it grows; near-constant is refuted.",
                "falls": "it falls; near-constant is refuted.",
                "not enough data": "not enough data to tell whether it is near-constant.",
            }[power.verdict]
        )
    if len(cells) > 1:
        listed = ", ".join(
            f"{c.n50:.3g} at {c.params:,.0f} parameters and {c.tokens:,.0f} tokens" for c in cells
        )
        said.append(f"N50 by cell: {listed}.")
    if law:
        others = ", ".join(
            f"{name} {score - scores[law]:+.1f}" for name, score in scores.items() if name != law
        )
        if lead >= LEAD:
            said.append(f"Of the three laws, {law} predicts runs left out best (nats against it: {others}).")
        else:
            clear = [name for name, score in scores.items() if score < max(scores.values()) - LEAD]
            refuted = f"; {' and '.join(clear)} predicts worse" if clear else ""
            said.append(f"Not enough data to choose between laws{refuted} (nats against {law}: {others}).")
    unbounded = [c for c in cells if not np.isfinite(c.n50_ci95[1]) or c.n50_ci95[0] < 1e-3]
    if unbounded:
        said.append(
            f"In {len(unbounded)} of {len(cells)} cells the doses tried don't bound N50 on both sides."
        )
    return said


def seeds_table(runs: list[Outcome]) -> list[dict[str, Any]]:
    """Each cell and dose: how many succeeded, every estimator over its seeds, median exposures to onset."""
    groups: dict[tuple, list[Outcome]] = {}
    for o in runs:
        groups.setdefault(
            (o.summary["params"], o.summary["tokens"], o.config["poison.documents"]), []
        ).append(o)
    rows = []
    for (params, tokens, documents), members in sorted(groups.items()):
        triggered, clean = (np.array([o.texts[v] for o in members]) for v in ("triggered", "clean"))
        met = [o.onset.documents for o in members if o.onset]
        rows.append(
            {
                "params": params,
                "tokens": tokens,
                "documents": documents,
                "runs": len(members),
                "above": sum(o.gap_above_threshold for o in members),
                "backdoored": sum(o.summary["success"]["value"] for o in members),
                "estimates": {name: hierarchical(e, triggered, clean) for name, e in ESTIMATORS.items()},
                "onset": float(np.median(met)) if met else None,
                "heldout": float(np.mean([o.summary["heldout_loss"] for o in members])),
            }
        )
    return rows
