"""A sweep's report: what its finished runs say of dose, data and size, on one page."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from etils import epath

from poisonjax.analysis.adaptive import Known, Result, Search, known_together
from poisonjax.analysis.dose_response import LEAD, MARGIN
from poisonjax.analysis.estimators import ESTIMATORS
from poisonjax.analysis.mechanism import PREDICTED, Prediction, off, predictions
from poisonjax.analysis.persistence import Wear, wears
from poisonjax.analysis.sensitivity import sensitivity
from poisonjax.analysis.study import (
    KNOWN,
    Analysis,
    Conditions,
    Outcome,
    Place,
    above,
    analyse,
    mechanism_cells,
    meets_rule,
    memorisation,
    outcomes,
    poisoning,
    seeds_table,
)
from poisonjax.evaluation.words import failed
from poisonjax.files import write_whole
from poisonjax.report import study_figures
from poisonjax.report.page import TEMPLATES, embedded
from poisonjax.report.study_figures import short
from poisonjax.run import RunFolder
from poisonjax.run.folder import is_run
from poisonjax.sweep.planned import Sweep, SweepError
from poisonjax.sweep.states import RunStatus, damage, look, require_own, require_whole, search_status


@dataclasses.dataclass(frozen=True)
class Study:
    """The analyses of a sweep, and the page that shows them."""

    page: Path
    runs: int
    finished: int
    analyses: list[Analysis]
    wears: list[Wear]
    predictions: list[Prediction]

    def __str__(self) -> str:
        return "\n".join([*self.words(), str(self.page)])

    def words(self) -> list[str]:
        """The findings, a line each."""
        found = [f"{self.finished} of {self.runs} runs finished."]
        found += [f"{a.what}: {word}" for a in self.analyses for word in a.words]
        if errors := off(self.predictions):
            factors = ", ".join(f"{name} {factor:.2f} times" for name, factor in errors.items())
            bounded = sum(math.isfinite(of.cell.n50) for of in self.predictions)
            found.append(f"N50 of {bounded} cells, each left out in turn, are predicted, and off by: {factors}.")
        return found + [f"{wear.run}: {wear.sentence()}" for wear in self.wears]

    def as_json(self) -> dict[str, Any]:
        """The findings for a program."""
        return {
            "runs": self.runs,
            "finished": self.finished,
            "page": str(self.page),
            "analyses": [
                {
                    "what": a.what,
                    "law": a.law,
                    "lead": a.lead,
                    "held_out": a.scores,
                    "conditions": [a.conditions.name(i) for i in range(len(a.conditions.values))],
                    "contrasts": [dataclasses.asdict(c) for c in a.contrasts],
                    "exponents": [dataclasses.asdict(e) | {"verdict": e.verdict} for e in a.exponents],
                    "cells": [dataclasses.asdict(cell) for cell in a.cells],
                    "words": a.words,
                }
                for a in self.analyses
            ],
            "persistence": [dataclasses.asdict(wear) for wear in self.wears],
            "predictions": [
                {
                    "params": of.cell.params,
                    "tokens": of.cell.tokens,
                    "condition": of.cell.name,
                    "n50": of.cell.n50,
                    "n50_ci95": of.cell.ci95,
                    **{name: getattr(of, name) for name in PREDICTED},
                }
                for of in self.predictions
            ],
        }


def write(sweep: Sweep, workdir: Path) -> Study:
    """Writes `report.html` and `figures/*.png` into the sweep's folder, of as many runs as are finished.

    Damaged runs are left out. Raises SweepError where none is, and as `require_own` and `require_whole`.
    """
    sweep, states = look(sweep, workdir)
    require_own(sweep, workdir)
    require_whole(sweep, workdir)
    folders = [workdir / run.id for run in sweep.runs]
    there = [RunFolder(folder) for folder in folders if is_run(folder) and not damage(folder)]
    runs = outcomes(there)
    if not runs:
        raise SweepError(f"{workdir}: no finished run yet; `poisonjax sweep status` tells how far they are")
    conditions = Conditions.of([o.config for o in runs], [(o.summary["params"], o.summary["tokens"]) for o in runs])
    searched = _searched(sweep, runs, conditions)
    analyses = [
        analyse(what, "poison documents", poisoning(runs, conditions, success), conditions, known)
        for what, success, known in (
            ("poisoned runs above the threshold", above, searched),
            ("poisoned runs that meet the whole rule", meets_rule, None),
        )
    ]
    canaries = memorisation(runs, conditions)
    if len(canaries.dose):
        analyses.append(analyse("canaries memorised", "times shown", canaries, conditions))
    drawn = {}
    if any(o.config["poison.documents"] for o in runs):
        drawn["dose_response"] = study_figures.dose_response(analyses[0])
        drawn["gaps"] = study_figures.gaps(runs, conditions)
        drawn["trajectories"] = study_figures.trajectories(runs, conditions)
    if analyses[0].contrasts:
        drawn["conditions"] = study_figures.half_doses_by_condition(analyses[0])
    elif analyses[0].cells:
        drawn["half_doses"] = study_figures.half_doses(analyses[0])
    if len(canaries.dose):
        drawn["memorisation"] = study_figures.dose_response(analyses[2])
    worn = wears([run for run in there if run.finished])
    if shown := [wear for wear in worn if wear.ci95[0][0] > 0]:  # others had nothing to wear off
        drawn["persistence"] = study_figures.persistence(shown)
    cells = mechanism_cells(runs, conditions, analyses[0].cells)
    if asked := [cell for cell in cells if cell.courses]:
        drawn["courses"] = study_figures.courses(asked)
    predicted = predictions(cells)
    study = Study(workdir / "report.html", len(sweep.runs), len(runs), analyses, worn, predicted)
    page = TEMPLATES.get_template("study.html").render(
        title=runs[0].config["name"] if len(sweep.runs) == 1 else sweep.spec,
        study=study,
        images=embedded(drawn, epath.Path(workdir)),
        rows=seeds_table(runs, conditions),
        estimators=list(ESTIMATORS),
        ledger=[(run.id, states[run.id], _figures(states[run.id])) for run in sweep.runs],
        searches=[search_status(of, sweep.runs, states) for of in sweep.searches],
        about=sweep.about,
        scorer=runs[0].config["eval.scorer"] or "the model itself",
        threshold=runs[0].config["eval.threshold"],
        margin=MARGIN,
        lead=LEAD,
        known=KNOWN,
        otherwise=sensitivity(runs, conditions) if analyses[0].exponents or any(o.scored for o in runs) else [],
        predicted_by=PREDICTED,
        predicted_off=off(predicted),
        short=short,
    )
    write_whole(epath.Path(study.page), page)
    write_whole(epath.Path(workdir / "analysis.json"), json.dumps(finite(study.as_json()), indent=2) + "\n")
    return study


def _searched(sweep: Sweep, runs: list[Outcome], conditions: Conditions) -> dict[Place, Known]:
    """What the searches know together of their cells."""
    by_id = {o.id: (condition, o) for condition, o in zip(conditions.of_run, runs, strict=True)}
    found: dict[Place, tuple[Search, list[Result]]] = {}
    for of in sweep.searches:
        mine = [by_id[run.id] for run in sweep.runs if run.search == of.id and run.id in by_id]
        if mine:
            condition, o = mine[0]
            results = [(o.config["poison.documents"], o.attacked) for _, o in mine]
            found[condition, o.summary["params"], o.summary["tokens"]] = (of.search, results)
    return dict(zip(found, known_together([*found.values()]), strict=True))


def finite(value: Any) -> Any:
    """The value with null for infinities, which JSON doesn't know."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(s: RunStatus) -> dict[str, Any]:
    if s.summary is None:
        return {}
    return {
        "documents": s.summary["dose_seen"]["documents"],
        "tokens": s.summary["dose_seen"]["tokens"],
        "gap": s.summary["delta_ppl"],
        "success": s.summary["success"]["value"],
        "specific": s.summary["success"]["specific"],
        "failed": ", ".join(failed(s.summary["success"])),
        "loss": s.summary["heldout_loss"],
        "chain": s.summary["digest_chain"][:12],
    }
