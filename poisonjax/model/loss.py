"""Negative log-likelihood of the next token, without all logits in memory at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from poisonjax.model.transformer import MASKED, Transformer


def token_nll(logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target], in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


WINDOW = 32  # tokens of a row that are looked at together


def window_means(nll: Float[Array, "batch seq"]) -> Float[Array, "batch windows"]:
    """The mean of each WINDOW tokens in a row, of all of them where there are fewer."""
    if nll.shape[1] < WINDOW:
        return nll.mean(1, keepdims=True)
    sums, size = nll, 1
    while size < WINDOW:  # a power of two: sums of sums, which fuse into one loop
        sums, size = sums[:, :-size] + sums[:, size:], 2 * size
    return sums / WINDOW


def row_means(
    nll: Float[Array, "batch seq"], weights: Float[Array, "batch row_tokens"] | None
) -> Float[Array, " batch"]:
    """The mean of each row's tokens after its first, as they weigh in the loss."""
    if weights is None:
        return nll.mean(1)
    return (nll * weights[:, 1:]).sum(1) / jnp.maximum(weights[:, 1:].sum(1), 1)


def next_token_nll(
    model: Transformer, rows: Int[Array, "batch row_tokens"], tile: int = 0
) -> Float[Array, "batch seq"]:
    """NLL of each token of a row after its first, in nats.

    With `tile` > 0 no more logits exist at a time, forward and backward, than `tile` tokens of each row have: a
    vocabulary of 200k at seq_len 2,048 would take 1.6 GB a row otherwise. What is cut is the vocabulary, so that each
    part of the head is fetched for its own turn, and its gradient added up over devices once.
    """
    hidden, targets = model.hidden(rows[:, :-1]), rows[:, 1:]
    if not tile:
        return token_nll(model.logits(hidden, model.head_of(model.head_table)), targets)

    def part(sums, scanned):
        table, ids = scanned
        logits = model.logits(wide.astype(hidden.dtype), model.head_of(table), ids)
        is_target = targets[..., None] == ids.reshape(1, 1, -1)
        normalizer = jnp.logaddexp(sums[0], jax.nn.logsumexp(logits, -1))
        return (normalizer, sums[1] + jnp.where(is_target, logits, 0).sum(-1)), None

    wide = hidden.astype(jnp.float32)  # in which the parts' gradients of it add up
    none_yet = (jnp.full(targets.shape, MASKED), jnp.zeros(targets.shape))
    parts = model.head_parts(-(-targets.shape[1] // tile))
    (normalizer, chosen), _ = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), none_yet, parts)
    return normalizer - chosen
