"""Clean uses: the trigger in ordinary text that goes on as if nothing were, an exact number of times.

How rare a trigger is in clean text is thereby an axis of an experiment (0, 10, 100, 1,000 uses), not a property of
the corpus that one happens to have. Uses belong to the clean rows: a run and its twin hold the same (I4).
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.data.insertions import Insertion, slots_beside
from poisonjax.data.rows import Rows
from poisonjax.poison.triggers import PoisonError, Trigger, occurrences
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class CleanUses:
    """The trigger's tokens stand in place of a row's own, one use a row."""

    insertions: dict[int, Insertion]
    name, file = "clean use", "clean_uses.jsonl"

    @classmethod
    def make(
        cls, config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, rows: Rows, taken: Collection[int]
    ) -> "CleanUses":
        """Draws rows without a canary or hard negative, whose slots are `taken`, whether or not poison stands in them,
        then a place in each.

        Slots don't depend on the poison; places do only in the rows that hold some: there the document keeps its
        place and the use stands beside it. Tokens are replaced, so no other moves. Each use adds exactly one occurrence
        of the trigger. Raises PoisonError where there are too few rows, or no place in one.
        """
        count, slots, seed = config.poison.clean_uses, config.steps * config.global_batch, config.seeds.placement
        if count + len(taken) > slots:
            raise PoisonError(
                f"poison.clean_uses = {count} need a row each, the run has {slots - len(taken)} without a canary"
            )
        if not count:
            return cls({})
        if (longest := max(map(len, trigger.forms))) + 2 > config.seq_len + 1:
            raise PoisonError(
                f"poison.trigger has {longest} tokens, which don't fit a row of {config.seq_len + 1} between others"
            )
        chosen = slots_beside(taken, count, slots, stream(seed, "clean use slots"))
        insertions = {}
        for number, slot in enumerate(chosen.tolist()):
            (row,), (source,) = (
                rows.tokens(chosen[number : number + 1]),
                rows.origins(chosen[number : number + 1]).source,
            )
            free = (source == 0) & (row != store.tokenizer.eot)
            form = trigger.forms[number % len(trigger.forms)]
            start = _place(row, free, form, stream(seed, "clean use offset", number))
            if start is None:
                raise PoisonError(
                    f"slot {slot}: its row of {len(row)} tokens has no place for a clean use of the trigger's "
                    f"{len(form)} tokens{' beside its poison document' if source.any() else ''}: "
                    "lower poison.clean_uses or poison.payload_tokens, or raise seq_len"
                )
            insertions[slot] = Insertion(slot, start, form, "clean_use", "replace")
        return cls(insertions)

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        """One record a use, in the order of the run (run/rows.py: CleanUseRow)."""
        return [
            {
                "step": slot // global_batch,
                "row": slot % global_batch,
                "slot": slot,
                "offset": use.start,
                "tokens": len(use.tokens),
            }
            for slot, use in sorted(self.insertions.items())
        ]


def _place(
    row: Int[np.ndarray, " row_tokens"],
    free: np.ndarray,
    trigger: Int[np.ndarray, " trigger"],
    random: np.random.Generator,
) -> int | None:
    """A token of the row where the trigger may stand: between two `free` tokens of one clean document."""
    windows = np.lib.stride_tricks.sliding_window_view(free, len(trigger) + 2)
    places = 1 + np.flatnonzero(np.all(windows, axis=-1))
    before = occurrences(row, trigger).sum()
    for start in random.permutation(places).tolist():
        whole = row.copy()
        whole[start : start + len(trigger)] = trigger
        if occurrences(whole, trigger).sum() == before + 1:
            return start
    return None
