"""How a run begins: what it reads, and what its first step starts from."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import beside, is_run
from poisonjax.training.optimizer import make_optimizer
from poisonjax.training.step import TrainState
from poisonjax.weights import Weights, find_weights, open_weights
from poisonjax.weights.checkpoints import Checkpoints


def open_store(config: ml_collections.ConfigDict) -> corpus.TokenStore:
    """The token store of a config, built first where it isn't there; without `corpus.sources`, whatever lies there.
    Documents that `corpus.exclude` lists are left out. Raises ConfigError where it holds texts and not conversations,
    or the other way round."""
    c, conversations = config.corpus, config.data.kind == "instructions"
    store = _found_or_built(c, config.data.template if conversations else "")
    if conversations != (store.template is not None):
        raise config_lib.ConfigError(
            f"data.kind = {config.data.kind!r}, but the store {c.store} holds "
            f"{'texts: build it with --template' if conversations else 'conversations'}"
        )
    return store


def _found_or_built(c: ml_collections.ConfigDict, template: str) -> corpus.TokenStore:
    if not c.sources:
        return corpus.open_store(c.store, c.exclude)
    if not corpus.exists(c.store):
        if jax.process_count() > 1:
            raise config_lib.ConfigError(
                f"corpus.store = {c.store!r}: no finished token store there; run `poisonjax corpus build` first, "
                "several processes don't build one"
            )
        print(f"building the token store {c.store} from {', '.join(c.sources)}", flush=True)
        corpus.build(c.store, list(c.sources), c.tokenizer, heldout=c.heldout, template=template)
    store = corpus.open_store(c.store, c.exclude)
    store.require(sources=list(c.sources), tokenizer=c.tokenizer, heldout=c.heldout, template=template)
    corpus.require_unchanged(store)
    return store


def weights_of(config: ml_collections.ConfigDict, folder: epath.Path | None) -> str:
    """The spec of `start.weights` for `open_weights`, of the run in `folder`; "" where it begins from none."""
    spec = config.start.weights
    if folder is None and spec.startswith(config_lib.BESIDE):
        raise config_lib.ConfigError(f"start.weights = {spec!r}: a run folder says what it lies beside")
    return beside(spec, folder) if folder else spec


def with_inherited_model(
    config: ml_collections.ConfigDict, folder: epath.Path | None = None, asked: Collection[str] = ()
) -> ml_collections.ConfigDict:
    """The config with the model of the weights that `start.weights` names, if any.

    Where these are gone, the run in `folder` still knows them. Raises ConfigError for fields of the model that
    contradict them: those `asked` for by name, and others that aren't at their defaults. WeightsError where there are
    none.
    """
    if not config.start.weights:
        return config
    try:
        model = find_weights(weights_of(config, folder)).model_config
    except ValueError:
        if not (folder and is_run(folder)):
            raise
        there = RunFolder(folder).config
        if there.start.weights != config.start.weights:
            raise
        model = there.model
    defaults, fields = config_lib.flat(config_lib.default()), config_lib.flat(config)
    theirs = config_lib.inherited_fields(model)
    odd = [name for name, value in theirs.items() if fields[name] != value]
    if odd := [name for name in odd if name in asked or fields[name] != defaults[name]]:
        raise config_lib.ConfigError(
            "\n".join(
                f"{name} = {fields[name]!r}: {config.start.weights} has {theirs[name]!r}; leave it out" for name in odd
            )
        )
    return config_lib.replaced(config, theirs)


def open_parent(
    config: ml_collections.ConfigDict, folder: epath.Path, store: corpus.TokenStore, mesh: Mesh
) -> tuple[rows.Parent | None, Weights | None]:
    """(what is known of the weights that the run in `folder` begins from, these weights where it hasn't yet begun).

    Raises ConfigError where they read other tokens than the store holds.
    """
    if not (spec := weights_of(config, folder)):
        return None, None
    if is_run(folder) and Checkpoints(folder).steps():
        return RunFolder(folder).record.get("parent"), None
    weights = open_weights(spec, mesh)
    if weights.tokenizer.fingerprint != store.tokenizer.fingerprint:
        raise config_lib.ConfigError(
            f"start.weights = {spec!r} reads other tokens than corpus.store = {config.corpus.store!r} holds: build it "
            f"with --tokenizer {spec if spec.startswith(('hf:', 'gguf:')) else 'of the run, STORE/tokenizer'}"
        )
    parent = weights.parent.copy()
    parent["spec"] = config.start.weights  # as it is typed: runs beside each other may be moved together
    return parent, weights


@dataclasses.dataclass(frozen=True)
class Start:
    """The state before step `step`."""

    state: TrainState
    step: int


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run may begin from."""

    config: ml_collections.ConfigDict
    checkpoints: Checkpoints
    initialize: Callable[[], TrainState]
    abstract: TrainState
    weights: Weights | None = None
    spec: str = ""  # of the weights, for their optimizer's state


def resume(run: Beginning) -> Start | None:
    """From the newest checkpoint that can be read."""
    saved, step = run.checkpoints.restore_newest(run.abstract.params, run.abstract.optimizer)
    return Start(restored(saved, step, run.abstract), step) if saved else None


def from_weights(run: Beginning) -> Start | None:
    """From weights that others trained; Adam's moments carried along where `start.optimizer` says so."""
    if not run.weights:
        return None
    optimizer = make_optimizer(run.config.optimizer, run.config.steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract.optimizer)
    if run.config.start.optimizer:
        read = find_weights(run.spec).read_optimizer
        assert read  # `config.checks` asks for a run
        state = jax.tree.map(_from_the_first_step, read(run.abstract.params, run.abstract.optimizer), is_leaf=_counts)
    else:
        state = jax.jit(optimizer.init, out_shardings=shardings)(run.weights.params)
    return Start(restored((run.weights.params, state), 0, run.abstract), 0)


def _counts(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _from_the_first_step(node: Any) -> Any:
    """The learning rate's schedule is the new run's."""
    return node._replace(count=jax.tree.map(jnp.zeros_like, node.count)) if _counts(node) else node


def scratch(run: Beginning) -> Start | None:
    """From random weights."""
    return Start(run.initialize(), 0)


WAYS: tuple[Callable[[Beginning], Start | None], ...] = (resume, from_weights, scratch)  # the first that is this run's


def begin_state(run: Beginning) -> Start:
    """The state that the run's next step starts from; raises CheckpointError where all checkpoints are damaged."""
    return next(start for way in WAYS if (start := way(run)))


def restored(saved: tuple, step: int, abstract: TrainState) -> TrainState:
    """The state after `step` steps, of a checkpoint's weights and optimizer state."""
    return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), *saved)
