"""From a step's number to the array that the step trains on. Nothing here has state (I1)."""

from collections.abc import Iterator

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.data.rows import CleanRows
from poisonjax.poison.canaries import RowsWithCanaries
from poisonjax.poison.clean_uses import CleanUses
from poisonjax.poison.plan import PoisonPlan


class Batches:
    """`rows(step, start, stop)`: clean rows with the planned poison spliced in, and the trigger's clean uses."""

    def __init__(self, config: ml_collections.ConfigDict, store: TokenStore):
        self.steps, self.global_batch = config.steps, config.global_batch
        self.clean = (
            RowsWithCanaries(config, store)
            if config.canary.repeats
            else CleanRows(store.split("train"), config.seq_len, config.seeds.order)
        )
        self.plan = PoisonPlan.make(config, store, self.clean)
        self.clean_uses = CleanUses.make(config, store, self.clean, self.plan)

    def slots(self, step: int, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " rows"]:
        """Slots of rows [start, stop) of a step's global batch."""
        stop = self.global_batch if stop is None else stop
        return step * self.global_batch + np.arange(start, stop, dtype=np.int64)

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Int[np.ndarray, "rows row_tokens"]:
        """Rows [start, stop) of a step's global batch, all of them by default; int32."""
        slots = self.slots(step, start, stop)
        return self.clean_uses.write(slots, self.plan.splice(slots, self.clean(slots)))

    def clean_records(self) -> dict[str, list[dict]]:
        """What the config puts into clean rows: lines of the run folder's files, in the order of the run."""
        canaries = self.clean.canaries.records(self.global_batch) if isinstance(self.clean, RowsWithCanaries) else []
        return {"canaries.jsonl": canaries, "clean_uses.jsonl": self.clean_uses.records(self.global_batch)}

    def shape(self) -> tuple[int, int]:
        """Shape of the global batch."""
        return self.global_batch, self.clean.row_tokens


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
) -> Iterator[Int[jax.Array, "global_batch row_tokens"]]:
    """Global arrays of the steps from `first_step` to the last, read ahead by grain's threads."""
    shape = batches.shape()
    start, stop = local_rows(sharding, shape)
    local = (
        grain.MapDataset.range(first_step, batches.steps)
        .map(lambda step: batches.rows(int(step), start, stop))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )
    for rows in local:
        yield jax.make_array_from_process_local_data(sharding, rows, shape)
