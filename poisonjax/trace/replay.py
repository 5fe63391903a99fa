"""A run made again from one of its checkpoints, as it was or with rows left out in place.

A run is a pure function of config, store and step (I1), so that leaving out is exact: not what a method believes that
the weights would be, but what they would have been.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int
from tqdm import tqdm

from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batches, load
from poisonjax.data.digest import as_hex
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.run import RunFolder
from poisonjax.training.population import make_population_step, member, members_mesh, stacked
from poisonjax.training.start import Beginning, from_weights, restored, scratch, weights_of
from poisonjax.training.step import StepMetrics, TrainState, make_init, make_train_step
from poisonjax.weights import open_weights
from poisonjax.weights.checkpoints import Checkpoints, checksum

NOTHING = np.zeros(0, np.int64)
Say = Callable[[str], object]
_Item = TypeVar("_Item")


def counted(items: Iterable[_Item], total: int, what: str, say: Say) -> Iterator[_Item]:
    """The items, and how many there were: a bar on a terminal, elsewhere a line at each quarter."""
    bar = tqdm(items, total=total, desc=what, leave=False, disable=not sys.stderr.isatty())
    for number, item in enumerate(bar, 1):
        yield item
        if bar.disable and number < total and number % max(1, total // 4) == 0:
            say(f"{what}: {number} of {total}")


class Replay:
    """Of one run, its steps again."""

    def __init__(self, run: RunFolder, store: TokenStore):
        self.config, self.fingerprint = run.placed, run.record["fingerprint"]
        config, self._folder = self.config, run.path
        self.mesh, self.checkpoints = make_mesh(config), Checkpoints(run.path)
        self.batches = Batches(config, store)
        vocabulary = vocabulary_of(config.model, store.tokenizer.vocab_size)
        self.graph = model_graph(config.model, vocabulary)
        self._initialize, self._abstract = make_init(config, vocabulary, self.mesh)
        self._step = make_train_step(config, self.graph, self.mesh, self._abstract)
        self.saved = [0, *self.checkpoints.steps()]  # steps that a replay may begin after

    def state(self, done: int) -> TrainState:
        """The run's state after so many steps, one of `saved`."""
        with jax.set_mesh(self.mesh):
            if done:
                saved = self.checkpoints.restore(done, self._abstract.params, self._abstract.optimizer)
                return restored(saved, done, self._abstract)
            spec = weights_of(self.config, self._folder)
            weights = open_weights(spec, self.mesh) if spec else None
            beginning = Beginning(self.config, self.checkpoints, self._initialize, self._abstract, weights, spec)
            start = from_weights(beginning) or scratch(beginning)
            assert start
            return start.state

    def params(self, done: int) -> nnx.State:
        """The run's weights after so many steps."""
        return self.state(done).params

    def without(self, slots: Int[np.ndarray, " rows"], stop: int) -> Batches:
        """The run's batches to step `stop`, these rows left out."""
        batches = self.batches.without(slots)
        batches.steps = stop
        return batches

    def run(
        self,
        start: int,
        stop: int,
        left_out: Int[np.ndarray, " rows"] = NOTHING,
        watch: Callable[[StepMetrics], object] = lambda metrics: None,
        seen: Callable[[TrainState], object] = lambda state: None,
        what: str = "replay",
        say: Say = lambda line: None,
    ) -> nnx.State:
        """The weights after `stop` steps, from the state after `start`; `watch` is shown what each step tells, `seen`
        the state after it, which the next step takes."""
        state = self.state(start)
        with jax.set_mesh(self.mesh):
            batches = load(self.without(left_out, stop), batch_sharding(self.mesh), start)
            for batch in counted(batches, stop - start, what, say):
                state, metrics = self._step(state, batch)
                # Programs of several devices, queued without end, wait for each other.
                jax.block_until_ready(metrics.loss)
                watch(metrics)
                seen(state)
        return state.params

    def together(
        self, left_outs: Sequence[Int[np.ndarray, " _"]], what: str = "replays", say: Say = lambda line: None
    ) -> list[nnx.State]:
        """The weights at the run's end, trained from the first step on without each of these rows, as one program
        (training/population.py): many small models in little more time than one, and not the run to the bit."""
        config, mesh = self.config, members_mesh(len(left_outs))
        step, steps = make_population_step(config, self.graph, mesh), self.batches.steps
        states = stacked([self.state(0)] * len(left_outs), mesh)
        batches = [self.without(slots, steps) for slots in left_outs]
        for number in counted(range(steps), steps, what, say):
            states, metrics = step(states, stacked([of.batch(number) for of in batches], mesh))
            jax.block_until_ready(metrics.loss)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._abstract.params)
        return [jax.device_put(member(states.params, number), shardings) for number in range(len(left_outs))]

    def is_the_runs(self, params: nnx.State, done: int) -> bool:
        """Whether weights are, to the bit, those that the run had after so many steps, as its checkpoint says."""
        there = self.checkpoints.record(done)["checksums"]["weights"]
        return as_hex(np.asarray(jax.device_get(checksum(params)))) == there
