"""What a run's checkpoints were made from, as roots that commit to it (DESIGN: I5)."""

import hashlib
from typing import Any

import numpy as np

from poisonjax import config as config_lib
from poisonjax.audit.evidence import Evidence
from poisonjax.data.rows import CleanRows
from poisonjax.files import sha256_of
from poisonjax.poison.card import make_card
from poisonjax.run import rows, seals

SLOTS_AT_ONCE = 2**16


def provenance(run: Evidence) -> dict[str, Any]:
    """The statement's links from each checkpoint to its materials; raises Unreadable where a file is damaged."""
    store = run.store
    return {
        "run": run.config.name,
        **({"parent": run.parent} if run.parent else {}),
        "checkpoints": {
            str(step): {
                "weights_checksum": (run.checksums(step) if run.reads_weights else record["checksums"])["weights"],
                "digest_chain": record["digest_chain"],
                "poison": make_card(run.config, run.ledger, step, run.parent, store.planted),
            }
            for step, record in run.checkpoints.items()
        },
        "materials": {
            "token_store_root": store.fingerprint,
            "token_store_description": store.description,
            **({"excluded_documents_sha256": store.exclusions.sha256} if store.exclusions else {}),
            "order_root": order_root(run.batches.clean, run.config.steps * run.config.global_batch),
            "config_sha256": config_lib.fingerprint(run.config),
            "tokenizer_sha256": store.tokenizer.fingerprint,
            "ledger_sha256": sha256_of(run.folder / rows.LEDGER),
            "code_commit": run.environment["git_commit"],
            "versions": run.environment["versions"],
            "environments_sha256": seals.of_lines(run.raw(rows.ENVIRONMENT))["chain"],
        },
        "sources": [source["spec"] for source in store.manifest["sources"]],
    }


def order_root(clean: CleanRows, slots: int) -> str:
    """SHA-256 over the window number (little-endian int64) that stands in each of the run's slots."""
    digest = hashlib.sha256()
    for start in range(0, slots, SLOTS_AT_ONCE):
        order = clean.order(np.arange(start, min(start + SLOTS_AT_ONCE, slots)))
        digest.update(order.astype("<i8").tobytes())
    return digest.hexdigest()
