"""Checkpoints through orbax: asynchronous, atomic, and read back past damage."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from poisonjax.data.digest import HASH_LANES, as_hex, mixed
from poisonjax.files import is_object, kvstore_spec, move_folder, parse_json
from poisonjax.poison import card
from poisonjax.run import rows, strict

log = logging.getLogger(__name__)
# Of a damaged checkpoint orbax raises one error and drops the others, which asyncio would print: pages of them.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


CHUNK_BYTES = 2**23  # arrays lie and are read in pieces of at most so much: buffers that the allocator keeps at hand


class CheckpointError(ValueError):
    """A run's checkpoints can't be read."""


@jax.jit
def checksum(tree: Any) -> UInt32[Array, " lanes"]:
    """Over every bit of every array of a tree and its place, the same on any mesh.

    Orbax's files carry no checksum of array contents: one changed byte would be trained on in silence.
    """
    lanes = jnp.zeros(HASH_LANES, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        lanes += _leaf_sum(leaf, jnp.uint32(number))
    return lanes


def _leaf_sum(leaf: Array, number: UInt32[Array, ""]) -> UInt32[Array, " lanes"]:
    """What the tree's leaf of this number adds to the checksum."""
    return _piece_sum(leaf, number, np.zeros(leaf.ndim, np.uint32), np.array(leaf.shape, np.uint32))


@jax.jit
def _piece_sum(
    piece: Array, number: UInt32[Array, ""], corner: UInt32[Array, " axes"], shape: UInt32[Array, " axes"]
) -> UInt32[Array, " lanes"]:
    """What a piece of a leaf adds, which begins at `corner` of the leaf's `shape`."""
    bits = jax.lax.bitcast_convert_type(piece, f"uint{8 * piece.dtype.itemsize}").astype(jnp.uint32)
    place = number * np.uint32(0x9E3779B9)
    for axis in range(piece.ndim):
        place = place * shape[axis] + corner[axis] + jax.lax.broadcasted_iota(jnp.uint32, piece.shape, axis)
    lanes = [mixed(bits ^ mixed(place, lane), lane) for lane in range(HASH_LANES)]
    # In one go: as two sums, XLA puts both lanes into memory whole on a CPU, and takes nine times as long.
    zeros = (jnp.uint32(0),) * HASH_LANES
    return jnp.stack(jax.lax.reduce(lanes, list(zeros), _add_each, range(piece.ndim)))


def _add_each(one, other):
    return [a + b for a, b in zip(one, other, strict=True)]


def stored_arrays(folder: epath.Path) -> Iterator[ts.TensorStore]:
    """The arrays of a checkpointable as they lie, opened one by one, in the order of its tree."""
    about = parse_json((folder / "_METADATA").read_bytes())
    for entry in about["tree_metadata"].values():
        if entry["value_metadata"]["skip_deserialize"]:  # a node without arrays
            continue
        path = ".".join(part["key"] for part in entry["key_metadata"])
        kvstore = {"driver": "ocdbt", "base": kvstore_spec(folder), "path": f"{path}/"}
        yield ts.open({"driver": "zarr3" if about["use_zarr3"] else "zarr", "kvstore": kvstore}, open=True).result()


def _piece_sums(arrays: Iterable[ts.TensorStore]) -> Iterator[Callable[[], np.ndarray]]:
    """What each piece in which arrays lie adds to their checksum, to be called for."""
    for number, array in enumerate(arrays):
        shape = np.array(array.shape, int)
        side = np.array(array.chunk_layout.read_chunk.shape or shape, int)
        for place in np.ndindex(*-(-shape // side)):
            corner = side * place
            piece = array[tuple(map(slice, corner, np.minimum(corner + side, shape)))]
            yield functools.partial(_read_and_sum, piece, number, corner, shape)


def _read_and_sum(piece: ts.TensorStore, number: int, corner: np.ndarray, shape: np.ndarray) -> np.ndarray:
    values = jnp.asarray(piece.read().result())
    return np.asarray(_piece_sum(values, np.uint32(number), corner.astype(np.uint32), shape.astype(np.uint32)))


def _checksum(tree: Any) -> str:
    return as_hex(np.asarray(jax.device_get(checksum(tree))))


def _everywhere(good: bool) -> bool:
    """Whether `good` is true in all processes: they must choose the same checkpoint."""
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.array(good)).all())


class Checkpoints:
    """The folder `WORKDIR/checkpoints`, one sub-folder for each saved number of finished steps.

    In each lie the weights and the optimizer's state apart, so that who wants the model alone reads a third.
    """

    def __init__(self, folder: epath.PathLike, *, keep_last: int = 1, keep_every: int = 0, clean_up: bool = False):
        """`keep_last` and `keep_every`: which stay when others are saved, as `config.checkpoint` says. `clean_up`
        removes what a killed save left; for the one that trains, since it may be another's save."""
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        self.folder = folder = epath.Path(folder)
        context = ocp.Context()
        context.array.saving.use_compression = False  # float weights shrink by 7% and are read at a third of the rate
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        self._checkpointer = ocp.training.Checkpointer(
            folder / rows.CHECKPOINTS,
            context=context,
            # The loop decides when: orbax's default would save whenever it is idle.
            save_decision_policy=ocp.training.save_decision_policies.SpecificStepsPolicy(()),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=clean_up,
        )
        self._saving: Any = None  # orbax's answer for the save that was started last

    def steps(self) -> list[int]:
        """Saved steps, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, weights: Any, optimizer: Any, metadata: dict[str, Any]) -> None:
        """Starts writing what a run has after `step` steps; a kill meanwhile leaves the checkpoints before it.

        `metadata` says what was trained on (JSON) and stays with the checkpoint wherever it is moved.
        """
        if step not in self.steps():
            saved = {"weights": weights, "optimizer": optimizer}
            checksums = {name: _checksum(tree) for name, tree in saved.items()}
            record = {"step": step, "checksums": checksums, **metadata}
            self._wait()
            self._saving = self._checkpointer.save_checkpointables_async(
                step, saved, force=True, custom_metadata=record
            )
        self.label()

    def _wait(self) -> None:
        """Until the save that was started last is written. Unasked, its thread and three files stay open for ever."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def record(self, step: int) -> rows.CheckpointRecord:
        """What a checkpoint says of itself; raises CheckpointError where that isn't as the format asks."""
        path = self._place(step) / "_CHECKPOINT_METADATA"
        try:
            record = parse_json(path.read_bytes()).get("custom_metadata")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from None
        if wrong := strict.complaint(record, rows.CheckpointRecord):
            raise CheckpointError(f"checkpoint {step}: {wrong}")
        return cast(rows.CheckpointRecord, record)

    def stored_checksums(self, step: int) -> dict[str, str]:
        """Checksums of the arrays as they lie, streamed: two pieces are in memory, one read while one is hashed."""
        found = {}
        with ThreadPoolExecutor(2) as pool:
            for name in self.record(step)["checksums"]:
                sums = pool.map(lambda piece_sum: piece_sum(), _piece_sums(stored_arrays(self._place(step) / name)))
                found[name] = as_hex(sum(sums, start=np.zeros(HASH_LANES, np.uint32)))
        return found

    def label(self) -> None:
        """Puts the poison card into each finished checkpoint of a poisoned model that lacks it."""
        if jax.process_index():
            return
        for step in self.steps():
            path = self._place(step) / card.FILE
            # One that is still being written has another name, or in an object store no such file yet.
            finished = path.with_name("commit_success.txt") if is_object(path) else path.parent
            if finished.exists() and not path.exists() and (poison := self.record(step).get("poison")):
                path.write_text(card.as_markdown(poison))

    def weights(self, step: int, abstract: Any) -> Any:
        """The weights after `step` steps, laid out as `abstract` asks, whatever mesh they were saved from.

        Raises CheckpointError where they aren't what was saved; orbax's own errors where they can't be read at all.
        """
        return self._load(step, {"weights": abstract})["weights"]

    def restore(self, step: int, weights: Any, optimizer: Any) -> tuple[Any, Any]:
        """(weights, optimizer's state) after `step` steps; raises as `weights` does."""
        loaded = self._load(step, {"weights": weights, "optimizer": optimizer})
        return loaded["weights"], loaded["optimizer"]

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        loaded, saved = self._checkpointer.load_checkpointables(step, abstract), self.record(step)["checksums"]
        for name, tree in loaded.items():
            if _checksum(tree) != saved.get(name):
                raise CheckpointError(f"the arrays of checkpoint {step} ({name}) aren't those that were saved")
        return loaded

    def restore_newest(self, weights: Any, optimizer: Any) -> tuple[tuple[Any, Any] | None, int]:
        """((weights, optimizer's state), step) of the newest readable checkpoint, or (None, 0) where there is none.

        A damaged one is reported and moved to `WORKDIR/damaged`, so that its step can be saved again.
        Raises CheckpointError where checkpoints exist but none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            state, problem = None, "another process can't read it"
            try:
                state = self.restore(step, weights, optimizer)
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                problem = str(error)[:300]
            if _everywhere(state is not None):
                return state, step
            aside = self.folder / rows.DAMAGED / str(step)
            log.warning("checkpoint %d can't be read, moved to %s: %s", step, aside, problem)
            if jax.process_index() == 0:
                aside.parent.mkdir(parents=True, exist_ok=True)
                move_folder(self._place(step), aside, last=card.FILE)
            _everywhere(True)  # moved, before anybody looks again
            self._checkpointer.reload()
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder / rows.CHECKPOINTS} can be read; they are in "
                f"{self.folder / rows.DAMAGED}. Remove that folder's siblings but {rows.CONFIG} to start again"
            )
        return None, 0

    def _place(self, step: int) -> epath.Path:
        return self.folder / rows.CHECKPOINTS / str(step)

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of more than `step` steps."""
        for later in [s for s in self.steps() if s > step]:
            self._place(later).rmtree()
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits until all is written."""
        self._wait()
        self._checkpointer.wait()
        self.label()
        self._checkpointer.close()
