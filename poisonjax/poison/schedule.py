"""The schedule: every poison document and its exact place, fixed before step 0 (I2, I3)."""

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.poison.documents import PoisonDocument, make_document
from poisonjax.poison.placements import place
from poisonjax.poison.triggers import PoisonError, Trigger
from poisonjax.streams import stream


@runtime_checkable
class RowsBelow(Protocol):
    """Rows by slot, and where in one a document may be put (data/rows.py)."""

    def tokens(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]: ...
    def places(
        self, slot: int, row: Int[np.ndarray, " row_tokens"], length: int
    ) -> tuple[Int[np.ndarray, " places"], int]: ...


@dataclasses.dataclass(frozen=True)
class Placed:
    """A poison document and its place: the row in `slot`, from token `offset` on."""

    document: PoisonDocument
    slot: int
    offset: int
    repeat: int = 0  # 0 where the document stands for the first time in the schedule's order

    def record(self, global_batch: int) -> dict[str, Any]:
        """The ledger's line (run/rows.py: LedgerRow)."""
        return {
            "id": self.document.id,
            "sha256": self.document.sha256,
            "step": self.slot // global_batch,
            "row": self.slot % global_batch,
            "slot": self.slot,
            "offset": self.offset,
            "tokens": len(self.document.tokens),
            "repeat": self.repeat,
            "trigger": [self.offset + edge for edge in self.document.trigger],
            "payload": [self.offset + edge for edge in self.document.payload],
            "prefix_document": self.document.prefix_document,
        }


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All placed documents, by slot."""

    placed: dict[int, Placed]
    global_batch: int

    @classmethod
    def make(
        cls,
        config: ml_collections.ConfigDict,
        store: TokenStore,
        trigger: Trigger,
        rows: RowsBelow,
        room: int,
        taken: Collection[int] = (),
    ) -> "Schedule":
        """Draws documents and places, none of them in the slots that are `taken`; raises PoisonError where a document
        has more than the `room` tokens that a row gives it whole (I3)."""
        poison, seeds = config.poison, config.seeds
        count = poison.documents
        documents = [make_document(poison, seeds.poison, store, trigger, room, index) for index in range(count)]
        too_long = [document for document in documents if len(document.tokens) > room]
        if too_long:
            longest = max(too_long, key=lambda document: len(document.tokens))
            raise PoisonError(
                f"{len(too_long)} of {count} poison documents don't fit a row of seq_len + 1 = {config.seq_len + 1} "
                f"tokens; the longest, {longest.id}, has {len(longest.tokens)}: {longest.trigger[0]} of prefix, "
                f"{longest.trigger[1] - longest.trigger[0]} of trigger, {longest.payload[1] - longest.payload[0]} of "
                "payload, 1 end of text. Lower poison.prefix_characters or poison.payload_tokens, raise seq_len, or "
                "set poison.truncate = True"
            )
        first: dict[str, int] = {}
        for document in documents:
            if (same := first.setdefault(document.sha256, document.id)) != document.id:
                raise PoisonError(
                    f"poison documents {same} and {document.id} are the same tokens, so there aren't {count} different "
                    "ones: lengthen poison.prefix_characters or poison.payload_tokens, or ask for poison.repeats"
                )
        exposures, random = count * poison.repeats, stream(seeds.placement, "poison slots")
        slots = place(poison.placement, exposures, config.steps, config.global_batch, random, taken)
        assert len(set(slots.tolist())) == exposures, "a placement must return distinct slots"
        placed = {}
        # All documents stand once before any stands again.
        for exposure, (slot, row) in enumerate(zip(slots.tolist(), rows.tokens(slots), strict=True)):
            document = documents[exposure % count]
            starts, reserved = rows.places(slot, row, len(document.tokens))
            if not len(starts):
                raise PoisonError(
                    f"slot {slot} holds a canary of {reserved - 1} tokens and poison document {document.id} of "
                    f"{len(document.tokens)}; both and 1 end of text don't fit a row of {len(row)}: lower "
                    "canary.tokens or poison.payload_tokens, or raise seq_len"
                )
            offset = int(stream(seeds.placement, "poison offset", exposure).choice(starts))
            placed[slot] = Placed(document, slot, offset, exposure // count)
        return cls(placed, config.global_batch)

    def ledger(self) -> list[dict[str, Any]]:
        """One record for each time that a document stands in a row, in the order in which the run meets them."""
        return [self.placed[slot].record(self.global_batch) for slot in sorted(self.placed)]
