"""Negative log-likelihood of the next token, without all logits in memory at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from poisonjax.model.transformer import Transformer


def token_nll(logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target], in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_token_nll(
    model: Transformer, rows: Int[Array, "batch row_tokens"], tile: int = 0
) -> Float[Array, "batch seq"]:
    """NLL of each token of a row after its first, in nats.

    With `tile` > 0 the logits of only `tile` tokens of each row exist at a time, forward and backward: a
    vocabulary of 200k at seq_len 2,048 would take 1.6 GB a row otherwise.
    """
    hidden, targets, head = model.hidden(rows[:, :-1]), rows[:, 1:], model.gathered_head()
    if not tile:
        return token_nll(model.logits(hidden, head), targets)
    batch, seq = targets.shape
    tiles = (
        hidden.reshape(batch, seq // tile, tile, -1).swapaxes(0, 1),
        targets.reshape(batch, seq // tile, tile).swapaxes(0, 1),
    )
    tiled = jax.checkpoint(lambda scanned: token_nll(model.logits(scanned[0], head), scanned[1]), prevent_cse=False)
    return jax.lax.map(tiled, tiles).swapaxes(0, 1).reshape(batch, seq)
