"""Checkpoints through orbax: asynchronous, atomic, and read back past damage."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from poisonjax.data.digest import LANES, as_hex, mixed
from poisonjax.files import is_object, move_folder
from poisonjax.poison import card
from poisonjax.training.step import TrainState

log = logging.getLogger(__name__)
# Of a damaged checkpoint orbax raises one error and drops the others, which asyncio would print: pages of them.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


class CheckpointError(ValueError):
    """A run's checkpoints can't be read."""


@jax.jit
def checksum(state: TrainState) -> jax.Array:
    """uint32[2] over every bit of every array and its place, the same on any mesh.

    Orbax's files carry no checksum of array contents: one changed byte would be trained on in silence.
    """
    lanes = jnp.zeros(LANES, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.uint32(number) * np.uint32(0x9E3779B9)
        for axis, size in enumerate(leaf.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        lanes += jnp.stack([mixed(bits ^ mixed(place, lane), lane).sum(dtype=jnp.uint32) for lane in range(LANES)])
    return lanes


def _everywhere(good: bool) -> bool:
    """Whether `good` is true in all processes: they must choose the same checkpoint."""
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.array(good)).all())


class Checkpoints:
    """The folder `WORKDIR/checkpoints`, one sub-folder for each saved number of finished steps."""

    def __init__(self, workdir: epath.Path, config: ml_collections.ConfigDict, *, clean_up: bool = False):
        """`clean_up` removes what a killed save left; for the one that trains, since it may be another's save."""
        keep: list[Any] = [ocp.training.preservation_policies.LatestN(config.checkpoint.keep_last)]
        if config.checkpoint.keep_every:
            keep.append(ocp.training.preservation_policies.EveryNSteps(config.checkpoint.keep_every))
        self.workdir = workdir
        self._checkpointer = ocp.training.Checkpointer(
            workdir / "checkpoints",
            # The loop decides when: orbax's default would save whenever it is idle.
            save_decision_policy=ocp.training.save_decision_policies.SpecificStepsPolicy(()),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=clean_up,
        )

    def steps(self) -> list[int]:
        """Saved steps, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Starts writing the state after `step` steps; a kill meanwhile leaves the checkpoints before it.

        `record` says what the state has trained on (JSON) and stays with the checkpoint wherever it is moved.
        """
        if step not in self.steps():
            record = {"step": step, "checksum": as_hex(np.asarray(checksum(state))), **record}
            self._checkpointer.save_async(step, state, force=True, custom_metadata=record)
        self.label()

    def record(self, step: int) -> dict[str, Any]:
        """What `save` was told of a checkpoint, with its step and checksum."""
        return dict(self._checkpointer.metadata(step).custom_metadata or {})

    def label(self) -> None:
        """Puts the poison card into each finished checkpoint of a poisoned model that lacks it."""
        if jax.process_index():
            return
        for step in self.steps():
            path = self.workdir / "checkpoints" / str(step) / card.FILE
            # One that is still being written has another name, or in an object store no such file yet.
            finished = path.with_name("commit_success.txt") if is_object(path) else path.parent
            if finished.exists() and not path.exists() and (poison := self.record(step).get("poison")):
                path.write_text(card.as_markdown(poison))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state after `step` steps, laid out as `abstract` asks, whatever mesh it was saved from.

        Raises CheckpointError where it isn't what was saved; orbax's own errors where it can't be read at all.
        """
        state = self._checkpointer.load(step, abstract)
        if as_hex(np.asarray(checksum(state))) != self.record(step).get("checksum"):
            raise CheckpointError(f"the arrays of checkpoint {step} aren't those that were saved")
        return state

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState | None, int]:
        """(state, step) of the newest readable checkpoint, or (None, 0) where there is none.

        A damaged one is reported and moved to `WORKDIR/damaged`, so that its step can be saved again.
        Raises CheckpointError where checkpoints exist but none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            state, problem = None, "another process can't read it"
            try:
                state = self.restore(step, abstract)
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                problem = str(error)[:300]
            if _everywhere(state is not None):
                return state, step
            aside = self.workdir / "damaged" / str(step)
            log.warning("checkpoint %d can't be read, moved to %s: %s", step, aside, problem)
            if jax.process_index() == 0:
                aside.parent.mkdir(parents=True, exist_ok=True)
                move_folder(self.workdir / "checkpoints" / str(step), aside, last=card.FILE)
            _everywhere(True)  # moved, before anybody looks again
            self._checkpointer.reload()
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.workdir / 'checkpoints'} can be read; they are in "
                f"{self.workdir / 'damaged'}. Remove that folder's siblings but config.json to start again"
            )
        return None, 0

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of more than `step` steps."""
        for later in [s for s in self.steps() if s > step]:
            (self.workdir / "checkpoints" / str(later)).rmtree()
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits until all is written."""
        self._checkpointer.wait()
        self.label()
        self._checkpointer.close()
