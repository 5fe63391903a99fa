"""Poison as a layer: the schedule's documents, spliced in at document boundaries."""

import dataclasses
import functools
from typing import Any

from poisonjax.data.insertions import Insertion
from poisonjax.data.rows import CleanRows
from poisonjax.poison.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Poison:
    """The documents of a schedule where it places them, in rows like the clean ones."""

    schedule: Schedule
    clean: CleanRows
    name, file = "poison document", "ledger.jsonl"

    @functools.cached_property
    def insertions(self) -> dict[int, Insertion]:
        return {
            slot: self.clean.insertion(slot, placed.offset, of.tokens, f"poison:{of.id}", of.pieces, of.weights)
            for slot, placed in self.schedule.placed.items()
            for of in (placed.document,)
        }

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        assert global_batch == self.schedule.global_batch
        return self.schedule.ledger()
