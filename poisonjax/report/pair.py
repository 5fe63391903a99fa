"""A poisoned run beside its clean twin."""

from typing import Any

from poisonjax.evaluation.statistics import paired
from poisonjax.run import RunFolder


def compare(poisoned: RunFolder, twin: RunFolder) -> dict[str, Any]:
    """Figures of both after the last step at which both were evaluated, and whether they are twins (I4).

    `figures` is empty where there is no such step; raises ValueError where the two were asked different things.
    """
    prefixes = [{row["step"]: row for row in run.prefixes()} for run in (poisoned, twin)]
    common = sorted(prefixes[0].keys() & prefixes[1].keys())
    config, figures = poisoned.config, {}
    if common:
        one, other = (rows[common[-1]] for rows in prefixes)
        figures = paired(one, other, config.eval.bootstrap, config.seeds.eval)
    return {
        "poisoned": str(poisoned.path),
        "twin": str(twin.path),
        "step": common[-1] if common else None,
        "figures": figures,
        "evidence": _evidence(poisoned, twin),
        "evals": [poisoned.evals(), twin.evals()],
    }


def _evidence(poisoned: RunFolder, twin: RunFolder) -> str:
    """What the digests of both say."""
    digests = [{row["step"]: row["digest"] for row in run.digests()} for run in (poisoned, twin)]
    both = digests[0].keys() & digests[1].keys()
    differing = {step for step in both if digests[0][step] != digests[1][step]}
    planned = {row["step"] for row in poisoned.ledger()} & both
    if differing == planned:
        return (
            f"By their digests, both trained on the same rows in the same order: of {len(both):,} steps, the "
            f"{len(differing):,} that hold poison differ and no other."
        )
    strange = sorted(differing ^ planned)
    return (
        f"These runs aren't twins: their digests should differ in the steps that hold poison alone, but step "
        f"{strange[0]:,} ({len(strange):,} such in all) "
        f"{'differs without' if strange[0] in differing else 'agrees despite'} it."
    )
