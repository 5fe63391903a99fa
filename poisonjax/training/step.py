"""The train step: one jitted function from (state, batch) to (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from poisonjax.data.batches import Batch
from poisonjax.data.digest import digest
from poisonjax.model.loss import next_token_nll, row_means, window_means
from poisonjax.model.sharding import batch_sharding, constrain, state_sharding
from poisonjax.model.transformer import Transformer
from poisonjax.training.optimizer import make_optimizer, schedule


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: Int[Array, ""]  # steps done
    params: nnx.State
    optimizer: Any


class StepMetrics(NamedTuple):
    """What a step tells; stays on the device until somebody asks."""

    loss: Float[Array, ""]  # nats a token, before the update
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    digest: UInt32[Array, " 3"]  # of the very arrays trained on (I5)
    rows: Float[Array, "batch 3"]  # `row_losses` of the batch; one array, so that devices pass it on once


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def init_state(config: ml_collections.ConfigDict, vocabulary: int) -> TrainState:
    """State before step 0, a pure function of config and seeds.init; jit it with output shardings."""
    params = nnx.split(Transformer(config.model, vocabulary, nnx.Rngs(params=config.seeds.init)))[1]
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.optimizer, config.steps).init(params))


def make_init(
    config: ml_collections.ConfigDict, vocabulary: int, mesh: Mesh | AbstractMesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """(the jitted initialiser, the state's shapes with shardings); weights are the same on every mesh."""
    shapes = jax.eval_shape(lambda: init_state(config, vocabulary))
    shardings = state_sharding(mesh, shapes)
    abstract = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )
    return jax.jit(lambda: init_state(config, vocabulary), out_shardings=shardings), abstract


def make_train_step(
    config: ml_collections.ConfigDict, graph: nnx.GraphDef, mesh: Mesh | AbstractMesh, abstract_state: TrainState
) -> TrainStep:
    """The jitted step; the state passed in is donated. Call it under `jax.set_mesh(mesh)`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(
        train_step_of(config, graph),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def row_losses(nll: Float[Array, "batch seq"], weights: Any) -> Float[Array, "batch 3"]:
    """How well each row was known, nats a token: (the mean as its tokens weigh, that of its worst WINDOW tokens
    together (model/loss.py), those without weight at nothing, the token of the row at which these begin)."""
    windows = window_means(nll if weights is None else nll * (weights[:, 1:] > 0))
    return jnp.stack([row_means(nll, weights), windows.max(1), windows.argmax(1) + 1.0], axis=1)


def train_step_of(config: ml_collections.ConfigDict, graph: nnx.GraphDef) -> TrainStep:
    """The step as a pure function of state and batch."""
    optimizer, learning_rate = (make(config.optimizer, config.steps) for make in (make_optimizer, schedule))
    microbatches, tile = config.optimizer.accumulate, config.model.loss_tile

    def loss_of(params: nnx.State, batch: Batch, all_weights: Any) -> tuple[Float[Array, ""], Float[Array, "batch 3"]]:
        nll = next_token_nll(nnx.merge(graph, params), batch.tokens, tile)
        # Weighted tokens are a share of all the step's, not of their microbatch's.
        loss = nll.mean() if batch.weights is None else (nll * batch.weights[:, 1:]).sum() / all_weights
        return loss, row_losses(jax.lax.stop_gradient(nll), batch.weights)

    def accumulated(params, batch):
        all_weights = None if batch.weights is None else batch.weights[:, 1:].sum()
        loss_and_gradients = jax.value_and_grad(loss_of, has_aux=True)
        if microbatches == 1:
            (loss, rows), gradients = loss_and_gradients(params, batch, all_weights)
            return loss, gradients, rows
        # Microbatch i takes every i-th row, so that each device keeps its own rows.
        split = jax.tree.map(lambda x: x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1), batch)

        def add(total, batch):
            batch = jax.tree.map(lambda x: constrain(x, "batch", "sequence"), batch)
            (loss, rows), gradients = loss_and_gradients(params, batch, all_weights)
            return jax.tree.map(jnp.add, total, (loss, gradients)), rows

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, rows = jax.lax.scan(add, zero, split)
        loss, gradients = jax.tree.map(lambda x: x / microbatches, total) if all_weights is None else total
        return loss, gradients, rows.swapaxes(0, 1).reshape(-1, 3)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, gradients, rows_known = accumulated(state.params, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        rows = batch.tokens.shape[0]
        slots = state.step.astype(jnp.uint32) * np.uint32(rows) + jnp.arange(rows, dtype=jnp.uint32)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=optax.global_norm(gradients),
            learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
            digest=digest(batch.tokens, slots, batch.weights),
            rows=rows_known,
        )
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics

    return train_step
