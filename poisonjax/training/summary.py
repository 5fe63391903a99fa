"""The last word on a run, derived from its evidence: the audit derives it again."""

from typing import Any, cast

import ml_collections

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batches
from poisonjax.evaluation.statistics import judge
from poisonjax.poison.ledger import dose
from poisonjax.run import rows

CLOCKS = ("tokens_per_second", "wall_seconds")  # fields that nothing else tells
PLACE = ("step", "kind", "tokens", "poison_documents", "poison_rows")  # of an evaluation's row; the rest are figures


def summarize(
    config: ml_collections.ConfigDict,
    batches: Batches,
    done: int,
    last: rows.EvalRow | None,
    *,
    status: str,
    parameters: tuple[int, int],
    unigram_nll: float,
    tokens_per_second: float,
    wall_seconds: float,
    digest_chain: str,
    parent: rows.Parent | None = None,
) -> rows.Summary:
    """What summary.json holds after `done` steps, whose `last` evaluation that is; `parameters` are all, and those
    outside embedding and head, `parent` the weights that it began from."""
    ledger = batches.schedule.ledger()
    summary: dict[str, Any] = {
        "status": status,
        "name": config.name,
        "fingerprint": config_lib.fingerprint(config),
        "steps": done,
        "tokens": done * config.global_batch * config.seq_len,
        "params": parameters[0],
        "params_non_embedding": parameters[1],
        "dose_planned": dose(ledger, config.steps),
        "dose_seen": dose(ledger, done),
        "trigger_tokens": len(batches.trigger.tokens),
        "clean_uses_seen": sum(slot < done * config.global_batch for slot in batches.uses()),
        "unigram_nll": unigram_nll,
        "tokens_per_second": tokens_per_second,
        "wall_seconds": wall_seconds,
        "digest_chain": digest_chain,
        **_left(batches.store),
        **_conversations(batches),
        **({"parent": parent} if parent else {}),
    }
    if last:
        summary |= {"eval_step": last["step"]} | {name: value for name, value in last.items() if name not in PLACE}
        summary["success"] = judge(last, unigram_nll, config.eval.threshold)
    return cast(rows.Summary, summary)


def _conversations(batches: Batches) -> dict[str, Any]:
    """How many are read, and how many don't fit a row."""
    clean = batches.clean
    return {"conversations": {"used": clean.windows, "too_long": clean.skipped}} if batches.store.template else {}


def _left(store: TokenStore) -> dict[str, Any]:
    """What was left out of the corpus by a list, and the dose that stands in it, restated without that."""
    planted, train = store.planted, store.split("train")
    left: dict[str, Any] = {"planted": planted} if planted else {}
    if store.exclusions:
        left["excluded"] = {"documents": train.excluded_documents, "tokens": train.excluded_tokens}
    return left
