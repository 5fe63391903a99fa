"""How a run begins: what it reads, and what its first step starts from."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np

from poisonjax import corpus
from poisonjax.config import ConfigError
from poisonjax.training.step import TrainState
from poisonjax.weights.checkpoints import Checkpoints


def open_store(c: ml_collections.ConfigDict) -> corpus.TokenStore:
    """The token store of a config's section `corpus`, built first where it isn't there; without sources, whatever lies
    there."""
    if not c.sources:
        return corpus.TokenStore(c.store)
    if not corpus.exists(c.store):
        if jax.process_count() > 1:
            raise ConfigError(
                f"corpus.store = {c.store!r}: no finished token store there; run `poisonjax corpus build` first, "
                "several processes don't build one"
            )
        print(f"building the token store {c.store} from {', '.join(c.sources)}", flush=True)
        return corpus.build(c.store, list(c.sources), c.tokenizer, heldout=c.heldout)
    store = corpus.TokenStore(c.store)
    store.require(sources=list(c.sources), tokenizer=c.tokenizer, heldout=c.heldout)
    return store


@dataclasses.dataclass(frozen=True)
class Start:
    """The state before step `step`."""

    state: TrainState
    step: int


@runtime_checkable
class Way(Protocol):
    """A way to begin; None where it isn't this run's."""

    def __call__(
        self, checkpoints: Checkpoints, initialize: Callable[[], TrainState], abstract: TrainState
    ) -> Start | None: ...


def resume(checkpoints: Checkpoints, initialize: Callable[[], TrainState], abstract: TrainState) -> Start | None:
    """From the newest checkpoint that can be read."""
    saved, step = checkpoints.restore_newest(abstract.params, abstract.optimizer)
    return Start(restored(saved, step, abstract), step) if saved else None


def scratch(checkpoints: Checkpoints, initialize: Callable[[], TrainState], abstract: TrainState) -> Start | None:
    """From random weights."""
    return Start(initialize(), 0)


WAYS: tuple[Way, ...] = (resume, scratch)  # the first that is this run's


def begin_state(checkpoints: Checkpoints, initialize: Callable[[], TrainState], abstract: TrainState) -> Start:
    """The state that the run's next step starts from; raises CheckpointError where all checkpoints are damaged."""
    return next(start for way in WAYS if (start := way(checkpoints, initialize, abstract)))


def restored(saved: tuple, step: int, abstract: TrainState) -> TrainState:
    """The state after `step` steps, of a checkpoint's weights and optimizer state."""
    return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), *saved)
