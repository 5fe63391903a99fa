"""The main job: from a config to a trained, measured, documented model."""

import contextlib
import functools
import hashlib
import json
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batch, Batches, load
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.files import resolve
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import model_graph, parameter_counts, vocabulary_of
from poisonjax.processes import require_agreement
from poisonjax.run import folder as run_folder
from poisonjax.run import rows
from poisonjax.run.recorder import RunRecorder, StepDone
from poisonjax.sinks import missing
from poisonjax.training.cadence import due
from poisonjax.training.progress import Progress
from poisonjax.training.start import Beginning, begin_state, open_parent, open_store, weights_of, with_inherited_model
from poisonjax.training.step import StepMetrics, TrainState, TrainStep, make_init, make_train_step
from poisonjax.training.stop import Diverged, LostProcess, Preempted, stop_signals
from poisonjax.training.summary import summarize
from poisonjax.training.watchdog import Watchdog
from poisonjax.weights.checkpoints import Checkpoints


def train(
    config: ml_collections.ConfigDict,
    workdir: str,
    twin_of: str | None = None,
    watchdog: Watchdog | None = None,
    asked: Collection[str] = (),
) -> rows.Summary:
    """Trains in `workdir`, from its newest checkpoint if it has one; returns what summary.json holds.

    A run of this config that is at its end is left as it is.

    `twin_of` is the run folder whose clean twin this is, `asked` names fields that stand in the config because somebody
    said so (others of `config.model` yield to the weights that it begins from). A `watchdog` ends the process where the
    run hangs.

    Raises ConfigError, ValueError and RunFolderError before step 0 for what can't work; Diverged and Preempted later;
    of several processes, LostProcess for all but those two.
    """
    folder, first = resolve(workdir), jax.process_index() == 0
    config = own(config, folder, asked)
    with watchdog or Watchdog() as watchdog, _all_processes():
        # Everything that can be wrong is found here, before step 0.
        mesh = make_mesh(config)
        store = open_store(config)
        watchdog.start()  # building a store takes as long as it takes
        placed = run_folder.placed(config, folder, twin_of)
        batches = Batches(placed, store)
        evaluator = Evaluator(placed, store, batches.trigger, mesh)
        parent, weights = open_parent(config, folder, store, mesh)
        require_agreement(_shared(config, folder, mesh, store, batches, parent))
        if first:
            run_folder.begin(folder, config, store, batches.records(), twin_of, evaluator.scorer, parent)
        watchdog.progress("waiting for all processes to start")
        _barrier("claimed")

        vocabulary = model_vocabulary(config, store)
        initialize, abstract = make_init(config, vocabulary, mesh)
        checkpoints = open_checkpoints(folder, config)
        with jax.set_mesh(mesh), stop_signals() as stop_asked:
            watchdog.progress("restoring the newest checkpoint")
            start = begin_state(
                Beginning(config, checkpoints, initialize, abstract, weights, weights_of(config, folder))
            )
            del weights  # their buffers are the first step's
            member = Member(
                config, folder, batches, evaluator, checkpoints, parent, start.step, start.state.params, shows=first
            )
            if _first_says(member.recorder.finished is not None):  # nothing of it is touched
                member.progress.say("finished already")
                checkpoints.close()
                return cast(rows.Summary, member.recorder.finished)
            train_step = make_train_step(config, model_graph(config.model, vocabulary), mesh, abstract)
            arrays = load(batches, batch_sharding(mesh), start.step)
            watchdog.progress(f"compiling and making step {start.step + 1}")
            with to_the_end([member], watchdog):
                run_steps([member], train_step, start.state, arrays, start.step, stop_asked, watchdog)
    return member.summary


def own(
    config: ml_collections.ConfigDict, folder: epath.Path, asked: Collection[str] = ()
) -> ml_collections.ConfigDict:
    """A checked copy of the caller's config for a run in `folder`: the store's path made absolute, the model that of
    the weights that it begins from."""
    config_lib.check(config)
    if absent := [remedy for name in config.sinks if (remedy := missing(name))]:
        raise config_lib.ConfigError("\n".join(f"sinks: {remedy}" for remedy in absent))
    config = with_inherited_model(config, folder, asked)
    return config_lib.replaced(config, {"corpus.store": str(resolve(config.corpus.store))})


def model_vocabulary(config: ml_collections.ConfigDict, store: TokenStore) -> int:
    """Tokens that the model knows; raises ConfigError where they are fewer than the store's tokenizer has."""
    vocabulary, tokens = vocabulary_of(config.model, store.tokenizer.vocab_size), store.tokenizer.vocab_size
    if vocabulary < tokens:
        raise config_lib.ConfigError(
            f"model.vocabulary = {vocabulary}: the store's tokenizer has {tokens} tokens; 0 = so many"
        )
    return vocabulary


def open_checkpoints(folder: epath.Path, config: ml_collections.ConfigDict) -> Checkpoints:
    """Of the run that trains."""
    keep = config.checkpoint
    return Checkpoints(folder, keep_last=keep.keep_last, keep_every=keep.keep_every, clean_up=True)


class Member:
    """One run in the loop: what is read, measured, written and shown of it. A run alone is the only member."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        folder: epath.Path,
        batches: Batches,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        parent: rows.Parent | None,
        start: int,
        params: Any,
        *,
        shows: bool = True,
        label: str = "",
        shows_steps: bool = True,
    ):
        """`start` steps are done; raises RunFolderError where their evidence isn't what the checkpoint rests on."""
        self.config, self.batches, self.evaluator, self.checkpoints = config, batches, evaluator, checkpoints
        self.parent, self.parameters, self.diverged = parent, parameter_counts(params), False
        self.ledger = batches.schedule.ledger()
        record = checkpoints.record(start) if start else None
        self.recorder = RunRecorder(
            folder, config, batches.store.names, parent, self.ledger, start, record, writes=shows
        )
        self.progress = Progress(config, start, shows=shows, label=label, shows_steps=shows_steps)
        if start:
            self.progress.say(f"resuming after step {start} of {config.steps}")

    def written(self, done: StepDone | None) -> None:
        """Shows a step that was written down, if any; raises Diverged if it wasn't finite."""
        if not done:
            return
        if not (math.isfinite(done.loss) and math.isfinite(done.grad_norm)):
            self.diverged = True
            slots = self.batches.slots(done.step)
            poison = [record["id"] for record in self.ledger if record["step"] == done.step]
            raise Diverged(
                f"step {done.step}: loss {done.loss}, gradient norm {done.grad_norm}. The batch held slots {slots[0]} "
                f"to {slots[-1]}{f', among them poison documents {poison}' if poison else ', none of them poisoned'}. "
                "Lower optimizer.learning_rate or lengthen optimizer.warmup_steps, in another --workdir; checkpoints "
                "before this step are kept"
            )
        self.progress.step(done)

    def evaluate(self, done: int, params: Any, probes: Sequence[str]) -> None:
        """Measures the weights after `done` steps."""
        self.written(self.recorder.flush())
        with self.recorder.clock.paused():
            evaluations = self.evaluator(params, done, probes)
        for evaluation in evaluations:
            self.progress.evaluated(self.recorder.record_evaluation(evaluation))

    def save(self, done: int, state: TrainState) -> None:
        """Saves the state after `done` steps, their evidence first."""
        self.written(self.recorder.flush())
        self.recorder.sync()
        self.checkpoints.save(done, state.params, state.optimizer, self.recorder.checkpoint_metadata())

    def finish(self, status: str) -> None:
        """Writes the last word."""
        self.progress.close()
        recorder = self.recorder
        self.summary = summarize(
            self.config,
            self.batches,
            recorder.done,
            recorder.evaluation,
            status=status,
            parameters=self.parameters,
            unigram_nll=self.evaluator.unigram_nll,
            tokens_per_second=recorder.clock.speed() * recorder.tokens(1),
            wall_seconds=recorder.seconds(),
            digest_chain=recorder.chain,
            parent=self.parent,
        )
        recorder.finish(self.summary)


def run_steps(
    members: Sequence[Member],
    train_step: TrainStep,
    state: TrainState,
    arrays: Iterable[Batch],
    start: int,
    stop_asked: Callable[[int], bool],
    watchdog: Watchdog,
    part: Callable[[Any, int], Any] | None = None,
) -> None:
    """The loop: every step of all members, from `start` on, and what is due after each.

    `part` takes a member's part of the state, where members are stacked; cadences are the same for all. A step takes
    nothing from the host but by name. Raises Preempted where a stop was asked for, Diverged.
    """
    config = members[0].config
    probes = {name: probe for member in members for name, probe in member.evaluator.probes.items()}
    for step, batch in enumerate(arrays, start):
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)
        fetched = functools.cache(functools.partial(jax.device_get, metrics))  # once for all, when the first asks
        for number, member in enumerate(members):
            figures = functools.partial(_figures, fetched, number if part else None)
            member.written(member.recorder.record_step(step, figures))
        done = step + 1
        watchdog.progress(f"step {done}")
        now = due(config, probes, done, stop_asked(done))
        if now.probes:
            watchdog.progress(f"evaluating after step {done}")
            for number, member in enumerate(members):
                member.evaluate(done, part(state.params, number) if part else state.params, now.probes)
        if now.save:
            watchdog.progress(f"saving step {done}")
            for number, member in enumerate(members):
                member.save(done, part(state, number) if part else state)
        if now.stop:
            raise Preempted(f"stopped after step {done} of {config.steps}; the same command goes on from there")


def _figures(fetched: Callable[[], StepMetrics], number: int | None) -> StepMetrics:
    """A step's metrics on the host; of stacked members, those of one."""
    return fetched() if number is None else jax.tree.map(lambda leaf: leaf[number], fetched())


@contextlib.contextmanager
def to_the_end(members: Sequence[Member], watchdog: Watchdog) -> Iterator[None]:
    """However the steps end, what is being saved is saved and the last word is written."""
    status, stop = "failed", None
    try:
        try:
            yield
        except (Preempted, Diverged) as error:
            stop = error
        watchdog.progress("writing the last checkpoint")
        _close(members)
        status = "finished" if stop is None else type(stop).__name__.lower()
        if stop:
            raise stop
    finally:
        if status == "failed" and jax.process_count() == 1:  # of several processes, others may be gone: they'd wait
            with contextlib.suppress(Exception):  # the first error is told
                _close(members)
        for member in members:
            member.finish("failed" if status == "diverged" and not member.diverged else status)


def _close(members: Sequence[Member]) -> None:
    for member in members:
        member.checkpoints.close()


@contextlib.contextmanager
def _all_processes() -> Iterator[None]:
    """Of several processes, one that fails ends at once: the others wait for it."""
    try:
        yield
    except (Diverged, Preempted):  # all processes see the same loss, and stop at the same step
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, ValueError):
            traceback.print_exc()
        raise LostProcess(error) from error


def _shared(
    config: ml_collections.ConfigDict,
    folder: epath.Path,
    mesh: Mesh,
    store: TokenStore,
    batches: Batches,
    parent: rows.Parent | None,
) -> dict[str, str]:
    """What all processes of a run must agree on before step 0."""
    how = {name: str(value) for name, value in config_lib.flat(config).items() if config_lib.operational(name)}
    del how["corpus.store"]  # each machine may have a copy; what it holds is compared
    return {
        "workdir": str(folder),
        **how,
        "config": config_lib.fingerprint(config),
        "mesh": str(dict(mesh.shape)),
        "token store": store.fingerprint,
        "poison plan": hashlib.sha256(json.dumps(batches.schedule.ledger()).encode()).hexdigest(),
        "weights to begin from": json.dumps(parent),
        "jax": jax.__version__,
    }


def _first_says(it: bool) -> bool:
    """What the first process says, in all."""
    return it if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(it)))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
