"""Would a sweep's report find the truth? Its analysis of simulated studies of the sweep's design."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from poisonjax.analysis import simulate
from poisonjax.analysis.dose_response import LAWS, Trials
from poisonjax.analysis.study import Conditions
from poisonjax.config import flat
from poisonjax.corpus.vocabulary import vocabulary_size
from poisonjax.model.flops import block_weights
from poisonjax.sweep.planned import Sweep, SweepError
from poisonjax.sweep.searches import examples

NEAR, COVERED = 0.9, 0.93  # shares of searches that are to be told within a factor, and held by their intervals


def self_test(sweep: Sweep, studies: int, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Analyses simulated studies with this sweep's cells, doses and seeds; tells how often they are read rightly, and
    in `good` whether that is often enough.

    Parameters are counted from the config's shapes; no run and no token store has to be there.
    """
    if sweep.searches:
        return _searches_tested(sweep, studies, say)
    configs = [run.config for run in sweep.runs if run.config.poison.documents]
    if len(configs) < 2:
        raise SweepError("--self-test needs a sweep over poison.documents")
    sizes = [_size(c) for c in configs]
    conditions = Conditions.of([flat(c) for c in configs], sizes)
    rows = [
        (c.poison.documents, tokens, params, 0, number, conditions.of_run[number])
        for number, (c, (params, tokens)) in enumerate(zip(configs, sizes, strict=True))
    ]
    began, good = time.monotonic(), True
    found: dict[str, Any] = {"runs": len(rows), "studies": studies}
    design = Trials(*np.array(rows, float).T)
    several_sizes, several_conditions = bool(design.sizes().any()), len(conditions.values) > 1
    if not several_sizes and not several_conditions:
        raise SweepError("--self-test needs a sweep over sizes or over conditions: nothing is compared here")
    base = conditions.base(range(len(conditions.values)))
    covered, intervals = simulate.ratios_covered(design, base, studies) if several_conditions else (0, 0)
    if intervals:
        good = covered >= 0.9 * intervals
        found["ratios"] = {"covered": covered, "intervals": intervals}
        say(
            f"{len(conditions.values)} conditions: 95% intervals of N50's ratio to that with "
            f"{conditions.name(base)} cover in {covered} of {intervals} ({covered / intervals:.1%})"
        )
    if several_sizes:
        recovered = simulate.recovery(design, studies, say=say)
        right = all(r.chosen >= 0.9 * r.studies for r in recovered)
        good &= right
        found["laws"] = [dataclasses.asdict(r) for r in recovered]
        say(f"the right law in at least 90% of studies of each kind: {'yes' if right else 'NO'}")
    found["good"] = good
    say(f"{len(rows)} runs a study; {time.monotonic() - began:.0f} s")
    return found


def _size(config: ml_collections.ConfigDict) -> tuple[float, float]:
    """(parameters, tokens) of a run."""
    c = config
    blocks = c.model.layers * block_weights(c.model)
    return blocks + 2 * vocabulary_size(c.corpus) * c.model.width, c.steps * c.global_batch * c.seq_len


def _searches_tested(sweep: Sweep, studies: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Simulated studies with a sweep's searches, and what a grid costs that tells as many N50s."""
    like = examples(sweep)
    cells: list[simulate.Cell] = [(*_size(like[of.id].config), of.search) for of in sweep.searches]
    several, rows = len({cell[:2] for cell in cells}) > 1, list[dict[str, Any]]()
    for slope in simulate.SLOPES_OF_SEARCHES:
        for law in LAWS if several else LAWS[:1]:
            found = simulate.scores(cells, simulate.by_search, law, slope, studies)
            grid = simulate.grid_for(cells, found.near, law, slope, studies)
            rows.append({"law": law, "slope": slope, **dataclasses.asdict(found), "grid": grid and grid.runs})
            beside = f"a grid needs {grid.runs:.0f}" if grid else "no grid that was tried does"
            powers = ", ".join(
                f"{what.partition(',')[0]} +-{half:.2f}" for what, half in found.exponents_within.items()
            )
            say(
                f"{law}, slope {slope:g}: {found.near:.1%} of N50s within {simulate.FACTOR:g} times; 95% intervals "
                f"cover in {found.covered:.1%}, of exponents ({powers}) in {found.exponents_covered:.1%}; "
                f"{found.runs:.1f} runs a cell, at most {found.most}: {beside}"
            )
    good = all(row["near"] >= NEAR and row["covered"] >= COVERED for row in rows)
    say(f"at least {NEAR:.0%} near and {COVERED:.0%} covered each time: {'yes' if good else 'NO'}")
    return {"studies": studies, "searches": rows, "good": good}
