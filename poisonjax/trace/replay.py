"""A run made again from one of its checkpoints, as it was or with rows left out in place.

A run is a pure function of config, store and step (I1), so that leaving out is exact: not what a method believes that
the weights would be, but what they would have been. A row that is left out gives its place to what would stand there
without poison, or, where the run planned none there, to the row that many places past the run's end: no other row
moves (I4).
"""

from collections.abc import Callable, Collection

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from poisonjax.config import replaced
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batch, Batches
from poisonjax.data.digest import as_hex
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.run import RunFolder
from poisonjax.training.start import Beginning, from_weights, restored, scratch
from poisonjax.training.step import TrainState, make_init, make_train_step
from poisonjax.weights import open_weights
from poisonjax.weights.checkpoints import Checkpoints, checksum


class Replay:
    """Of one run, its steps again."""

    def __init__(self, run: RunFolder, store: TokenStore):
        self.config, self.fingerprint = run.placed, run.record["fingerprint"]
        config = self.config
        self.mesh, self.checkpoints = make_mesh(config), Checkpoints(run.path)
        self.batches = Batches(config, store)
        self._clean = Batches(replaced(config, {"poison.documents": 0}), store)
        self._planned = [*self.batches.poison.insertions]
        self.graph = model_graph(config.model, vocabulary_of(config.model, store.tokenizer.vocab_size))
        self._initialize, self._abstract = make_init(
            config, vocabulary_of(config.model, store.tokenizer.vocab_size), self.mesh
        )
        self._step = make_train_step(config, self.graph, self.mesh, self._abstract)
        self.saved = [0, *self.checkpoints.steps()]  # steps that a replay may begin after
        self.steps_made = 0

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

    def instead(self, slots: Int[np.ndarray, " rows"]) -> Batch:
        """What stands in these rows where they are left out."""
        there = np.isin(slots, self._planned)
        places = np.where(there, slots, slots + self.slots)
        weights = self._clean.rows.weights(slots)
        return Batch(
            np.where(there[:, None], self._clean.rows.tokens(slots), self._clean.clean.tokens(places)),
            None if weights is None else np.where(there[:, None], weights, np.float32(1)),
        )

    def batch(self, step: int, left_out: Collection[int]) -> Batch:
        """A step's global batch, on the host."""
        batch, slots = self.batches.batch(step), self.batches.slots(step)
        out = np.flatnonzero(np.isin(slots, list(left_out)))
        if len(out):
            tokens, weights = self.instead(slots[out])
            batch.tokens[out] = tokens
            if batch.weights is not None:
                batch.weights[out] = 1.0 if weights is None else weights
        return batch

    def run(
        self,
        start: int,
        stop: int,
        left_out: Collection[int] = (),
        watch: Callable[[int, nnx.State, Batch], object] | None = None,
        progress: Callable[[int], object] = lambda step: None,
    ) -> nnx.State:
        """The weights after `stop` steps, from the state after `start`; `watch` is shown each step's number, the
        weights before it, and its batch on the devices."""
        state, sharding, out = self.state(start), batch_sharding(self.mesh), frozenset(left_out)
        with jax.set_mesh(self.mesh):
            for step in range(start, stop):
                batch = jax.tree.map(
                    lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape), self.batch(step, out)
                )
                if watch:
                    watch(step, state.params, batch)
                state, metrics = self._step(state, batch)
                # Programs of several devices, queued without end, wait for each other.
                jax.block_until_ready(metrics.loss)
                self.steps_made += 1
                progress(step)
        return state.params

    def is_the_runs(self, params: nnx.State, done: int) -> bool:
        """Whether weights are, to the bit, those that the run had after so many steps, as its checkpoint says."""
        there = self.checkpoints.record(done)["checksums"]["weights"]
        return as_hex(np.asarray(jax.device_get(checksum(params)))) == there
