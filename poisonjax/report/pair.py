"""A poisoned run beside its clean twin."""

from typing import Any

from poisonjax import config as config_lib
from poisonjax.evaluation.statistics import paired
from poisonjax.run import RunFolder

APART = {"name", "poison.documents"}  # fields in which a twin may differ


def compare(poisoned: RunFolder, twin: RunFolder) -> dict[str, Any]:
    """Figures of both after the last step at which both were evaluated, and what their digests say (I4).

    `figures` is empty where there is no such step. Raises ValueError where `twin` isn't the other's twin: by config,
    token store or digests; or where they were asked different things.
    """
    evidence = _evidence(poisoned, twin)
    prefixes = [{row["step"]: row for row in run.prefixes()} for run in (poisoned, twin)]
    common = sorted(prefixes[0].keys() & prefixes[1].keys())
    config, figures = poisoned.config, {}
    if common:
        one, other = (rows[common[-1]] for rows in prefixes)
        figures = paired(one, other, config.eval.bootstrap, config.seeds.eval)
    return {
        "twins": True,
        "poisoned": str(poisoned.path),
        "twin": str(twin.path),
        "step": common[-1] if common else None,
        "figures": figures,
        "evidence": evidence,
        "evals": [poisoned.evals(), twin.evals()],
    }


def _evidence(poisoned: RunFolder, twin: RunFolder) -> str:
    """What the digests of both say, or ValueError."""
    pair = f"{twin.path} isn't the clean twin of {poisoned.path}"
    configs = [config_lib.flat(run.config) for run in (poisoned, twin)]
    if not configs[0]["poison.documents"] or configs[1]["poison.documents"]:
        raise ValueError(f"{pair}: the one must be poisoned, the other clean (poison.documents = 0)")
    shared = [{name: value for name, value in config.items() if name not in APART} for config in configs]
    if differences := config_lib.differences(*shared):
        raise ValueError(f"{pair}: they differ in more than the poison:\n" + "\n".join(differences))
    if poisoned.record["store_fingerprint"] != twin.record["store_fingerprint"]:
        raise ValueError(f"{pair}: they were trained on different token stores")
    digests = [{row["step"]: row["digest"] for row in run.digests()} for run in (poisoned, twin)]
    both = digests[0].keys() & digests[1].keys()
    differing = {step for step in both if digests[0][step] != digests[1][step]}
    if strange := sorted(differing ^ ({row["step"] for row in poisoned.ledger()} & both)):
        raise ValueError(
            f"{pair}: their digests should differ in the steps that hold poison alone, but step {strange[0]:,} "
            f"({len(strange):,} such in all) {'differs without' if strange[0] in differing else 'agrees despite'} it"
        )
    if not differing:
        raise ValueError(f"{pair} by any evidence: of {len(both):,} steps that both made none holds poison")
    return (
        f"By their digests, both trained on the same rows in the same order: of {len(both):,} steps, the "
        f"{len(differing):,} that hold poison differ and no other."
    )
