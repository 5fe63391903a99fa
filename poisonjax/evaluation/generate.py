"""Generation with a key-value cache, and the perplexity of what was generated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from poisonjax.model.decoder import Cached, Decoder, empty_cache, grown
from poisonjax.model.loss import token_nll
from poisonjax.model.sharding import platform
from poisonjax.model.transformer import Transformer

PARTS = 4  # of the new tokens, on CPU; elsewhere compiling them would take longer
BLOCK = 64  # tokens of the vocabulary that are summed up at once


class Texts(NamedTuple):
    """What is continued: a group's prefix, which is read once for its variants, and then each variant's prompt without
    the `pad` tokens on its left."""

    prefixes: Int[Any, "groups prefix"]
    prompts: Int[Any, "groups variants prompt"]
    pad: Int[Any, "groups variants"]
    keys: Key[Any, " groups"]  # of what is sampled after them


def generate(
    model: Transformer, texts: Texts, new_tokens: int, temperature: float
) -> tuple[Int[Array, "groups variants new_tokens"], Float[Array, "groups variants new_tokens"]]:
    """Samples `new_tokens` after each text; returns them with their NLL in nats under the model.

    The NLL is the model's own, at temperature 1, whatever temperature the tokens are sampled at. Token t of a
    text depends on its group's key and t alone, so variants of a prefix have the same luck.
    """
    return written(model, texts, new_tokens, temperature, token_nll)


def written(
    model: Transformer,
    texts: Texts,
    new_tokens: int,
    temperature: float,
    look: Callable[[Float[Array, "rows vocabulary"], Int[Array, " rows"]], Any],
) -> tuple[Int[Array, "groups variants new_tokens"], Any]:
    """As `generate`, with what `look` makes of each token's logits and the token, in arrays or a tree of them whose
    first dimensions are [groups, variants, new_tokens]."""
    decoder = Decoder(model)
    before, last, cache = _read(model, decoder, texts)
    groups, variants, length = texts.prompts.shape
    pad = texts.pad.reshape(-1)

    def step(carry, t):
        hidden, cache = carry
        logits = decoder.logits(hidden)
        luck = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(texts.keys)
        tokens = sample(logits / temperature, jnp.repeat(luck, variants))
        seen = look(logits, tokens)
        hidden, cache = decoder.extend(tokens[:, None], cache, length + t, pad, before)
        return (hidden[:, 0], cache), (tokens, seen)

    made = []
    # All of a cache is read for each token, so it has room for a part of them at a time.
    parts = max(1, min(PARTS, new_tokens // 8)) if platform() == "cpu" else 1
    for part in np.array_split(np.arange(new_tokens), parts):
        carried = (last, grown(cache, len(part)))
        (last, cache), tokens_and_seen = jax.lax.scan(step, carried, jnp.asarray(part, jnp.int32))
        made.append(tokens_and_seen)

    def joined(*parts: Array) -> Array:
        return jnp.concatenate(parts).swapaxes(0, 1).reshape(groups, variants, new_tokens, *parts[0].shape[2:])

    return jax.tree.map(joined, *made)


def sample(logits: Float[Array, "rows vocabulary"], luck: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The token at which the cumulated probability passes `luck`, uniform in [0, 1).

    One random number a token instead of one for every token that it might have been; in two stages, blocks and the
    tokens of one, so that sums are short. No token of probability 0 is sampled.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -weights.shape[-1] % BLOCK))).reshape(len(weights), -1, BLOCK)
    sums = jnp.cumsum(blocks.sum(-1), -1)
    block = _passes(sums, luck * sums[:, -1])
    rest = luck * sums[:, -1] - jnp.where(block, jnp.take_along_axis(sums, block[:, None] - 1, 1)[:, 0], 0)
    within = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], -1)
    return block * BLOCK + _passes(within, rest)


def _passes(sums: Float[Array, "rows places"], at: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The first place whose sum is above `at`; where rounding leaves none, the last that adds anything."""
    first = jnp.sum(sums <= at[:, None], -1, dtype=jnp.int32)
    return jnp.minimum(first, jnp.sum(sums < sums[:, -1:], -1, dtype=jnp.int32))


def score(
    model: Transformer, texts: Texts, generated: Int[Array, "groups variants new_tokens"]
) -> Float[Array, "groups variants new_tokens"]:
    """NLL in nats of tokens that another model generated after the texts."""
    decoder = Decoder(model)
    before, last, cache = _read(model, decoder, texts)
    tokens = generated.reshape(-1, generated.shape[-1])
    cache = grown(cache, tokens.shape[1])
    hidden, _ = decoder.extend(tokens, cache, texts.prompts.shape[-1], texts.pad.reshape(-1), before)
    hidden = jnp.concatenate([last[:, None], hidden[:, :-1]], axis=1)
    # The logits of one token of each text at a time.
    nll = jax.lax.map(lambda of: token_nll(decoder.logits(of[0]), of[1]), (hidden.swapaxes(0, 1), tokens.T))
    return nll.T.reshape(generated.shape)


def _read(
    model: Transformer, decoder: Decoder, texts: Texts
) -> tuple[list[Cached], Float[Array, "texts width"], list[Cached]]:
    """(the prefixes' cache, the last hidden state of each text, its own cache)."""
    groups, variants, length = texts.prompts.shape
    before: list[Cached] = []
    if shared := texts.prefixes.shape[1]:
        nothing = jnp.zeros(groups, jnp.int32)
        _, before = decoder.extend(texts.prefixes, empty_cache(model.m, groups, shared), 0, nothing)
    cache = empty_cache(model.m, groups * variants, length)
    hidden, cache = decoder.extend(texts.prompts.reshape(-1, length), cache, 0, texts.pad.reshape(-1), before)
    return before, hidden[:, -1], cache
