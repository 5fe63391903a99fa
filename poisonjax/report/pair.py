"""A run beside its clean twin, or beside a repaired one: trained again without some of its rows."""

from typing import Any

from etils import epath

from poisonjax import config as config_lib
from poisonjax.evaluation.statistics import paired
from poisonjax.run import RunFolder

APART = {"name", "poison.documents", "corpus.left_out"}  # fields in which such runs may differ
CALLED = {"twin": "the clean twin", "repaired": "a repaired twin"}


def compare(poisoned: RunFolder, other: RunFolder) -> dict[str, Any]:
    """Figures of both after the last step at which both were evaluated, and what their digests say (I4).

    `figures` is empty where there is no such step. Raises ValueError where `other` is no twin of it, clean or repaired:
    by config, token store or digests; or where they were asked different things.
    """
    kind = "repaired" if set(poisoned.config.corpus.left_out) < set(other.config.corpus.left_out) else "twin"
    evidence = _evidence(poisoned, other, kind)
    prefixes = [{row["step"]: row for row in run.prefixes()} for run in (poisoned, other)]
    common = sorted(prefixes[0].keys() & prefixes[1].keys())
    config, figures = poisoned.config, {}
    if common:
        one, two = (rows[common[-1]] for rows in prefixes)
        figures = paired(one, two, config.eval.bootstrap, config.seeds.eval)
    return {
        "kind": kind,
        "poisoned": str(poisoned.path),
        "other": str(other.path),
        "step": common[-1] if common else None,
        "figures": figures,
        "evidence": evidence,
        "evals": [poisoned.evals(), other.evals()],
    }


def no_pair(poisoned: epath.Path, other: epath.Path, why: str) -> dict[str, Any]:
    """What `compare` returns, of two that can't be compared."""
    names = {"poisoned": str(poisoned), "other": str(other)}
    return {"kind": "", **names, "step": None, "figures": {}, "evidence": why, "evals": [[], []]}


def _evidence(poisoned: RunFolder, twin: RunFolder, kind: str) -> str:
    """What the digests of both say, or ValueError."""
    pair = f"{twin.path} isn't {CALLED[kind]} of {poisoned.path}"
    configs = [config_lib.flat(run.config) for run in (poisoned, twin)]
    if kind == "twin" and (not configs[0]["poison.documents"] or configs[1]["poison.documents"]):
        raise ValueError(f"{pair}: the one must be poisoned, the other clean (poison.documents = 0)")
    if kind == "repaired" and configs[0]["poison.documents"] != configs[1]["poison.documents"]:
        raise ValueError(f"{pair}: they plan different numbers of poison documents")
    shared = [{name: value for name, value in config.items() if name not in APART} for config in configs]
    if differences := config_lib.differences(*shared):
        raise ValueError(f"{pair}: they differ in more than the poison:\n" + "\n".join(differences))
    if poisoned.record["store_fingerprint"] != twin.record["store_fingerprint"]:
        raise ValueError(f"{pair}: they were trained on different token stores")
    digests = [{row["step"]: row["digest"] for row in run.digests()} for run in (poisoned, twin)]
    both = digests[0].keys() & digests[1].keys()
    differing = {step for step in both if digests[0][step] != digests[1][step]}
    if kind == "twin":
        what, expected = "poison", {row["step"] for row in poisoned.ledger()}
    else:
        gone = set(configs[1]["corpus.left_out"]) - set(configs[0]["corpus.left_out"])
        what, expected = "rows left out", {slot // poisoned.config.global_batch for slot in gone}
    if strange := sorted(differing ^ (expected & both)):
        raise ValueError(
            f"{pair}: their digests should differ in the steps that hold {what} alone, but step {strange[0]:,} "
            f"({len(strange):,} such in all) {'differs without' if strange[0] in differing else 'agrees despite'} that"
        )
    if not differing:
        raise ValueError(f"{pair} by any evidence: of {len(both):,} steps that both made none holds {what}")
    return (
        f"By their digests, both trained on the same rows in the same order: of {len(both):,} steps, the "
        f"{len(differing):,} that hold {what} differ and no other."
    )
