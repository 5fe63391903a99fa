"""From a step's number to the arrays that the step trains on. Nothing here has state (I1)."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.data.canaries import Canaries
from poisonjax.data.clean_uses import CleanUses
from poisonjax.data.conversations import Conversations
from poisonjax.data.hard_negatives import HardNegatives
from poisonjax.data.poison import Poison
from poisonjax.data.rows import CleanRows, Rows
from poisonjax.poison.schedule import Schedule
from poisonjax.poison.triggers import Trigger


class Batch(NamedTuple):
    """What a step trains on."""

    tokens: Int[Any, "batch row_tokens"]
    weights: Float[Any, "batch row_tokens"] | None = None  # of each token in the loss; None: 1 each


_Planted = TypeVar("_Planted")


class Batches:
    """A run's batches: clean rows, and over them canaries, hard negatives, the poison, and clean uses."""

    def __init__(self, config: ml_collections.ConfigDict, store: TokenStore):
        self.store, self.steps, self.global_batch = store, config.steps, config.global_batch
        self.trigger = Trigger.of(config.poison, store.tokenizer)
        self.clean = clean_rows(config, store, "train")
        self.canaries = Canaries.make(config, store, self.trigger)
        rows = Rows(self.clean).under(self.canaries)
        self.hard_negatives = HardNegatives.make(config, store, self.trigger, rows, self.canaries)
        rows, hard = rows.under(self.hard_negatives), self.hard_negatives.insertions.keys()
        self.schedule = Schedule.make(config, store, self.trigger, rows, self.clean.room, hard)
        self.poison = Poison(self.schedule, self.clean)
        rows, taken = rows.under(self.poison), hard | self.canaries.insertions.keys()
        self.clean_uses = CleanUses.make(config, store, self.trigger, rows, taken)
        self.rows = rows.under(self.clean_uses)
        if config.corpus.left_out:
            self._leave_out(np.array(config.corpus.left_out))

    def without(self, slots: Int[np.ndarray, " left_out"]) -> "Batches":
        """The same with these rows left out in place: each loses what the config planted in it or, where that is
        nothing, makes way for another row (CleanRows.without). No other row moves (I4)."""
        batches = copy.copy(self)
        batches._leave_out(slots)
        return batches

    def _leave_out(self, slots: Int[np.ndarray, " left_out"]) -> None:
        gone = set(slots.tolist())
        clean = sorted(gone.difference(*(layer.insertions for layer in self.rows.layers)))

        def kept(by_slot: dict[int, _Planted]) -> dict[int, _Planted]:
            return {slot: one for slot, one in by_slot.items() if slot not in gone}

        self.clean = self.clean.without(np.array(clean, np.int64), self.steps * self.global_batch)
        self.canaries = dataclasses.replace(self.canaries, insertions=kept(self.canaries.insertions))
        self.hard_negatives = HardNegatives(kept(self.hard_negatives.insertions))
        self.schedule = dataclasses.replace(self.schedule, placed=kept(self.schedule.placed))
        self.poison = Poison(self.schedule, self.clean)
        self.clean_uses = CleanUses(kept(self.clean_uses.insertions))
        self.rows = Rows(self.clean, (self.canaries, self.hard_negatives, self.poison, self.clean_uses))

    def slots(self, step: int, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " rows"]:
        """Slots of rows [start, stop) of a step's global batch."""
        stop = self.global_batch if stop is None else stop
        return step * self.global_batch + np.arange(start, stop, dtype=np.int64)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step's global batch, all of them by default."""
        slots = self.slots(step, start, stop)
        return Batch(self.rows.tokens(slots), self.rows.weights(slots))

    def tokens(self, step: int) -> Int[np.ndarray, "batch row_tokens"]:
        """The tokens of a step's global batch, int32."""
        return self.rows.tokens(self.slots(step))

    def uses(self) -> dict[int, int]:
        """Where the trigger stands in ordinary text because the config says so: token of the row, by slot."""
        hard = {slot: of.start + of.pieces["use"][0] for slot, of in self.hard_negatives.insertions.items()}
        return hard | {slot: use.start for slot, use in self.clean_uses.insertions.items()}

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """What the config puts into the rows: lines of the run folder's files, in the order of the run."""
        return {layer.file: layer.records(self.global_batch) for layer in self.rows.layers}

    def shape(self) -> tuple[int, int]:
        """Shape of the global batch."""
        return self.global_batch, self.rows.row_tokens


def clean_rows(config: ml_collections.ConfigDict, store: TokenStore, split: str) -> CleanRows:
    """Rows of a split as the run takes them, in an order of seeds.order, or seeds.eval where they are held out (I8);
    raises ValueError where it has too little text, or conversations that don't fit a row (of those held out, such are
    always skipped)."""
    heldout = split == "heldout"
    seed = config.seeds.eval if heldout else config.seeds.order
    if store.template is None:
        return CleanRows(store.split(split), config.seq_len, seed)
    return Conversations(store.split(split), config.seq_len, seed, skip=heldout or config.data.too_long == "skip")


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """The range of rows that this process's devices hold of a batch sharded by `sharding`."""
    indices = sharding.devices_indices_map(shape)
    bounds = [indices[device][0].indices(shape[0])[:2] for device in sharding.addressable_devices]
    start, stop = min(low for low, _ in bounds), max(high for _, high in bounds)
    held = set().union(*(range(low, high) for low, high in bounds))
    if len(held) != stop - start:
        raise ValueError("this process's devices hold rows that don't adjoin: order the mesh by process")
    return start, stop


def load(
    batches: Batches, sharding: NamedSharding, first_step: int = 0, *, threads: int = 2, prefetch: int = 8
) -> Iterator[Batch]:
    """Global arrays of the steps from `first_step` to the last, read ahead by grain's threads."""
    shape = batches.shape()
    start, stop = local_rows(sharding, shape)
    local = (
        grain.MapDataset.range(first_step, batches.steps)
        .map(lambda step: batches.batch(int(step), start, stop))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )
    for batch in local:
        yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, shape), batch)
