"""A run made again from one of its checkpoints, as it was or with rows left out in place.

A run is a pure function of config, store and step (I1), so that leaving out is exact: not what a method believes that
the weights would be, but what they would have been. A row that is left out gives its place to what would stand there
without poison, or, where the run planned none there, to the row that many places past the run's end: no other row
moves (I4).
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from poisonjax.config import replaced
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batch, Batches, load
from poisonjax.data.digest import as_hex
from poisonjax.data.insertions import Insertion
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.run import RunFolder
from poisonjax.training.start import Beginning, from_weights, restored, scratch
from poisonjax.training.step import TrainState, make_init, make_train_step
from poisonjax.weights import open_weights
from poisonjax.weights.checkpoints import Checkpoints, checksum

NOTHING = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Whole rows in place of others, as a layer over all that a run's config puts there."""

    insertions: dict[int, Insertion]
    name, file = "row left out", ""  # of no run folder

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        return []


class Replay:
    """Of one run, its steps again."""

    def __init__(self, run: RunFolder, store: TokenStore):
        self.config, self.fingerprint = run.placed, run.record["fingerprint"]
        config = self.config
        self.mesh, self.checkpoints = make_mesh(config), Checkpoints(run.path)
        self.batches = Batches(config, store)
        self._clean = Batches(replaced(config, {"poison.documents": 0}), store)
        vocabulary = vocabulary_of(config.model, store.tokenizer.vocab_size)
        self.graph = model_graph(config.model, vocabulary)
        self._initialize, self._abstract = make_init(config, vocabulary, self.mesh)
        self._step = make_train_step(config, self.graph, self.mesh, self._abstract)
        self.saved = [0, *self.checkpoints.steps()]  # steps that a replay may begin after

    @property
    def slots(self) -> int:
        """Rows that the run trains on."""
        return self.batches.steps * self.batches.global_batch

    def state(self, done: int) -> TrainState:
        """The run's state after so many steps, one of `saved`."""
        with jax.set_mesh(self.mesh):
            if done:
                saved = self.checkpoints.restore(done, self._abstract.params, self._abstract.optimizer)
                return restored(saved, done, self._abstract)
            spec = self.config.start.weights
            weights = open_weights(spec, self.mesh) if spec else None
            beginning = Beginning(self.config, self.checkpoints, self._initialize, self._abstract, weights)
            start = from_weights(beginning) or scratch(beginning)
            assert start
            return start.state

    def params(self, done: int) -> nnx.State:
        """The run's weights after so many steps."""
        return self.state(done).params

    def without(self, slots: Int[np.ndarray, " rows"], stop: int) -> Batches:
        """The run's batches to step `stop`, these rows left out."""
        planned = np.isin(slots, [*self.batches.poison.insertions])
        tokens = np.where(
            planned[:, None], self._clean.rows.tokens(slots), self.batches.clean.tokens(slots + ~planned * self.slots)
        )
        weights = self._clean.rows.weights(slots)
        left_out = {
            slot: Insertion(slot, 0, row, "left out", "replace", weights=of)
            for slot, row, of in zip(
                slots.tolist(),
                tokens,
                [None] * len(slots) if weights is None else np.where(planned[:, None], weights, np.float32(1)),
                strict=True,
            )
        }
        batches = copy.copy(self.batches)
        batches.rows, batches.steps = batches.rows.under(LeftOut(left_out)), stop
        return batches

    def run(
        self,
        start: int,
        stop: int,
        left_out: Int[np.ndarray, " rows"] = NOTHING,
        watch: Callable[[nnx.State, Batch], object] | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> nnx.State:
        """The weights after `stop` steps, from the state after `start`; `watch` is shown the weights before each step
        and its batch, both on the devices, `progress` the steps done."""
        state = self.state(start)
        with jax.set_mesh(self.mesh):
            for done, batch in enumerate(
                load(self.without(left_out, stop), batch_sharding(self.mesh), start), start + 1
            ):
                if watch:
                    watch(state.params, batch)
                state, metrics = self._step(state, batch)
                # Programs of several devices, queued without end, wait for each other.
                jax.block_until_ready(metrics.loss)
                progress(done)
        return state.params

    def is_the_runs(self, params: nnx.State, done: int) -> bool:
        """Whether weights are, to the bit, those that the run had after so many steps, as its checkpoint says."""
        there = self.checkpoints.record(done)["checksums"]["weights"]
        return as_hex(np.asarray(jax.device_get(checksum(params)))) == there
