"""Poison as a layer: the schedule's documents, spliced in at document boundaries."""

import dataclasses
import functools
from typing import Any

from poisonjax.data.insertions import Insertion
from poisonjax.poison.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Poison:
    """The documents of a schedule where it places them."""

    schedule: Schedule
    name, file = "poison document", "ledger.jsonl"

    @functools.cached_property
    def insertions(self) -> dict[int, Insertion]:
        return {
            slot: Insertion(
                slot,
                placed.offset,
                placed.document.tokens,
                f"poison:{placed.document.id}",
                "splice",
                placed.document.pieces,
            )
            for slot, placed in self.schedule.placed.items()
        }

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        assert global_batch == self.schedule.global_batch
        return self.schedule.ledger()
