"""A poisoned run beside its clean twin."""

from typing import Any

from etils import epath

from poisonjax.evaluation.statistics import paired
from poisonjax.runfolder import read_lines


def compare(poisoned: epath.Path, twin: epath.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Figures of both after the last step at which both were evaluated, and whether they are twins (I4).

    `config` is the poisoned run's. `figures` is empty where there is no such step; raises ValueError where the two
    were asked different things.
    """
    rows = [{row["step"]: row for row in read_lines(folder / "prefixes.jsonl")} for folder in (poisoned, twin)]
    common = sorted(rows[0].keys() & rows[1].keys())
    evals = [
        [row for row in read_lines(folder / "metrics.jsonl") if row["kind"] == "eval"] for folder in (poisoned, twin)
    ]
    return {
        "poisoned": str(poisoned),
        "twin": str(twin),
        "step": common[-1] if common else None,
        "figures": paired(
            rows[0][common[-1]], rows[1][common[-1]], config["eval"]["bootstrap"], config["seeds"]["eval"]
        )
        if common
        else {},
        "evidence": _evidence(poisoned, twin),
        "evals": evals,
    }


def _evidence(poisoned: epath.Path, twin: epath.Path) -> str:
    """What the digests of both say."""
    digests = [
        {row["step"]: row["digest"] for row in read_lines(folder / "digests.jsonl")} for folder in (poisoned, twin)
    ]
    both = digests[0].keys() & digests[1].keys()
    differing = {step for step in both if digests[0][step] != digests[1][step]}
    planned = {row["step"] for row in read_lines(poisoned / "ledger.jsonl")} & both
    if differing == planned:
        return (
            f"By their digests, both trained on the same rows in the same order: of {len(both):,} steps, the "
            f"{len(differing):,} that hold poison differ and no other."
        )
    strange = sorted(differing ^ planned)
    return (
        f"These runs aren't twins: their digests should differ in the steps that hold poison alone, but step "
        f"{strange[0]:,} ({len(strange):,} such in all) {'differs without' if strange[0] in differing else 'agrees despite'} it."
    )
