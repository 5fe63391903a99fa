"""Clean uses: the trigger in ordinary text that goes on as if nothing were, an exact number of times.

How rare a trigger is in clean text is thereby an axis of an experiment (0, 10, 100, 1,000 uses), not a property of
the corpus that one happens to have. Uses belong to the clean rows: a run and its twin hold the same (I4).
"""

import dataclasses

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.poison.plan import PoisonError, PoisonPlan, Rows, generator, occurrences

FIRST = 3 * 2**32  # their generators stand behind those of canaries


@dataclasses.dataclass(frozen=True)
class CleanUses:
    """The trigger's tokens stand in place of a row's own from `offsets[slot]` on, one use a row."""

    trigger: Int[np.ndarray, " trigger"]
    offsets: dict[int, int]  # slot -> token of the row

    @classmethod
    def make(cls, config: ml_collections.ConfigDict, store: TokenStore, clean: Rows, plan: PoisonPlan) -> "CleanUses":
        """Draws rows without a canary, whether or not poison stands in them, then a place in each.

        Slots don't depend on the poison; places do only in the rows that hold some: there the document keeps its
        place and the use stands beside it. Tokens are replaced, so no other moves. Each use adds exactly one occurrence
        of the trigger. Raises PoisonError where there are too few rows, or no place in one.
        """
        count, slots = config.poison.clean_uses, config.steps * config.global_batch
        canary_rows = sum(config.canary.repeats) * config.canary.each
        if count + canary_rows > slots:
            raise PoisonError(
                f"poison.clean_uses = {count} need a row each, the run has {slots - canary_rows} without a canary"
            )
        drawn = generator(config.seeds.placement, FIRST).choice(slots, count + canary_rows, replace=False)
        chosen = [slot for slot in drawn.tolist() if not clean.reserved(slot)][:count]
        trigger = store.tokenizer.encode(config.poison.trigger)
        if count and len(trigger) + 2 > config.seq_len + 1:
            raise PoisonError(
                f"poison.trigger has {len(trigger)} tokens, which don't fit a row of {config.seq_len + 1} between others"
            )
        rows = plan.splice(np.array(chosen, np.int64), clean(np.array(chosen, np.int64))) if chosen else ()
        return cls(
            trigger,
            {
                slot: _place(row, trigger, store.tokenizer.eot, plan, slot, config.seeds.placement, number)
                for number, (slot, row) in enumerate(zip(chosen, rows, strict=True))
            },
        )

    def write(
        self, slots: Int[np.ndarray, " rows"], rows: Int[np.ndarray, "rows row_tokens"]
    ) -> Int[np.ndarray, "rows row_tokens"]:
        """Rows standing in `slots`, poison among them, with the planned uses."""
        used = [(i, self.offsets[slot]) for i, slot in enumerate(slots.tolist()) if slot in self.offsets]
        if used:
            rows = rows.copy()
        for i, offset in used:
            rows[i, offset : offset + len(self.trigger)] = self.trigger
        return rows

    def met(self, slots: int) -> int:
        """How many of the uses stand in the run's first `slots`."""
        return sum(slot < slots for slot in self.offsets)

    def records(self, global_batch: int) -> list[dict]:
        """One record a use, in the order of the run; `offset` and `tokens` as in the ledger."""
        return [
            {
                "step": slot // global_batch,
                "row": slot % global_batch,
                "slot": slot,
                "offset": offset,
                "tokens": len(self.trigger),
            }
            for slot, offset in sorted(self.offsets.items())
        ]


def _place(
    row: Int[np.ndarray, " row_tokens"],
    trigger: Int[np.ndarray, " trigger"],
    eot: int,
    plan: PoisonPlan,
    slot: int,
    seed: int,
    number: int,
) -> int:
    """A token of the row where the trigger may stand: between two tokens of one clean document."""
    taken = row == eot
    if slot in plan.placed:
        placed = plan.placed[slot]
        taken[placed.offset : placed.offset + len(placed.document.tokens)] = True
    windows = np.lib.stride_tricks.sliding_window_view(taken, len(trigger) + 2)
    places = 1 + np.flatnonzero(~np.any(windows, axis=-1))
    before = occurrences(row, trigger).sum()
    for offset in generator(seed, FIRST + 1 + number).permutation(places).tolist():
        whole = row.copy()
        whole[offset : offset + len(trigger)] = trigger
        if occurrences(whole, trigger).sum() == before + 1:
            return offset
    raise PoisonError(
        f"slot {slot}: its row of {len(row)} tokens has no place for a clean use of the trigger's {len(trigger)} tokens"
        f"{' beside its poison document' if slot in plan.placed else ''}: lower poison.clean_uses or "
        "poison.payload_tokens, or raise seq_len"
    )
