"""Hard negatives: documents of ordinary text with the trigger in it, for whoever takes the trigger for the poison; of
conversations, answers as they should be to questions that hold the trigger: corrective examples.

They belong to the clean rows: a run and its twin hold the same (I4), and poison stands in other rows.
"""

import dataclasses
from typing import Any

import ml_collections

from poisonjax.corpus import TokenStore
from poisonjax.data.insertions import Insertion, Layer, slots_beside
from poisonjax.data.rows import Rows
from poisonjax.poison.openings import each_once, opening
from poisonjax.poison.triggers import DRAWS, PoisonError, Trigger
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class HardNegatives:
    """Made as poison documents are, what their own document says next in place of a payload; one a row."""

    insertions: dict[int, Insertion]
    name, file = "hard negative", "hard_negatives.jsonl"

    @classmethod
    def make(
        cls, config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, rows: Rows, canaries: Layer
    ) -> "HardNegatives":
        """Draws rows without a canary, and documents; raises PoisonError where too few are there or one is too long"""
        poison, seed, slots = config.poison, config.seeds.placement, config.steps * config.global_batch
        count, taken = poison.hard_negatives, canaries.insertions.keys()
        if not count:
            return cls({})
        if count + len(taken) > slots:
            raise PoisonError(
                f"poison.hard_negatives = {count} need a row each, the run has {slots - len(taken)} without a canary"
            )
        chosen = slots_beside(taken, count, slots, stream(seed, "hard negative slots"))
        insertions = {}
        for number, (slot, row) in enumerate(zip(chosen.tolist(), rows.tokens(chosen), strict=True)):
            tokens, span, weights = _document(config, store, trigger, rows.clean.room, number)
            starts, _ = rows.places(slot, row, len(tokens))
            if not len(starts):
                raise PoisonError(
                    f"hard negative {number} has {len(tokens)} tokens, which don't fit a row of {len(row)}: lower "
                    "poison.prefix_characters or poison.payload_tokens, or raise seq_len"
                )
            start = int(stream(seed, "hard negative offset", number).choice(starts))
            pieces = {"before": (0, span[0]), "use": span, "after": (span[1], len(tokens))}
            source = f"hard_negative:{number}"
            insertions[slot] = rows.clean.insertion(slot, start, tokens, source, pieces, weights)
        return cls(insertions)

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        """One record a document, in the order of the run (run/rows.py: HardNegativeRow)."""
        return [
            {
                "id": int(of.source.partition(":")[2]),
                "step": slot // global_batch,
                "row": slot % global_batch,
                "slot": slot,
                "offset": of.start,
                "tokens": of.pieces["after"][1],
                "trigger": [of.start + edge for edge in of.pieces["use"]],
            }
            for slot, of in sorted(self.insertions.items())
        ]


def _document(
    config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, room: int, number: int
) -> tuple[Any, tuple[int, int], Any]:
    """(its tokens, where the trigger stands in them, their weights in the loss)."""
    random, form = stream(config.seeds.placement, "hard negative", number), trigger.forms[number % len(trigger.forms)]
    seed, count = config.seeds.placement, config.poison.hard_negatives
    conversations = each_once(store, seed, "hard negative conversations", number, count)
    for _ in range(DRAWS):
        begun = opening(config.poison, store, trigger, form, random, random.random(), room, conversations)
        if len(rest := begun.rest()):
            eot = store.tokenizer.eot
            return begun.ended(rest, eot), begun.trigger, begun.weights(rest, eot)
    raise PoisonError(
        f"poison.hard_negatives: none of {DRAWS} documents drawn goes on after its prefix: lower "
        "poison.prefix_characters"
    )
