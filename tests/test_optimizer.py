"""Learning rate, weight decay by kind of parameter, and which checkpoints are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from poisonjax.model.transformer import Transformer
from poisonjax.training import loop
from poisonjax.training.optimizer import make_optimizer, schedule
from poisonjax.weights.checkpoints import Checkpoints


def test_cosine_warms_up_and_ends_at_the_final_fraction(config):
    config.steps = 100
    config.optimizer.warmup_steps, config.optimizer.learning_rate, config.optimizer.final_fraction = (10, 2.0, 0.1)
    rate = schedule(config.optimizer, config.steps)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 1, 2, 1.1, 0.2], rtol=1e-6)


def test_wsd_is_stable_then_falls(config):
    config.steps = 100
    o = config.optimizer
    o.schedule, o.warmup_steps, o.decay_steps, o.learning_rate, o.final_fraction = "wsd", 10, 20, 2.0, 0.5
    rate = schedule(config.optimizer, config.steps)
    np.testing.assert_allclose([rate(5), rate(10), rate(80), rate(90), rate(100)], [1, 2, 2, 1.5, 1], rtol=1e-6)


def test_matrices_decay_and_nothing_else_does(config):
    """With zero gradients, AdamW moves a parameter by -rate * decay * parameter, or not at all."""
    config.optimizer.warmup_steps, config.optimizer.learning_rate, config.optimizer.weight_decay = 0, 0.5, 0.1
    params = nnx.state(Transformer(config.model, 61, nnx.Rngs(params=0)))
    optimizer = make_optimizer(config.optimizer, config.steps)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed = set()
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        name = [key.key for key in path if hasattr(key, "key")][-1]
        if np.any(update):
            decayed.add(name)
            np.testing.assert_allclose(update, -0.05 * param, rtol=1e-5, atol=1e-9)
    assert decayed == {"query", "key_value", "output", "gate_up", "down", "head"}


@pytest.mark.parametrize(
    ("last", "every", "kept"), [(1, 0, [12]), (2, 0, [9, 12]), (1, 6, [6, 12]), (9, 0, [3, 6, 9, 12])]
)
def test_checkpoints_are_kept_as_asked(config, tmp_path, last, every, kept):
    config.checkpoint.every, config.checkpoint.keep_last, config.checkpoint.keep_every = 3, last, every
    loop.train(config, str(tmp_path))
    assert Checkpoints(epath.Path(tmp_path)).steps() == kept
