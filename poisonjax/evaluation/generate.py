"""Generation with a key-value cache, and the perplexity of what was generated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from poisonjax.model.decoder import Cached, Decoder, empty_cache
from poisonjax.model.loss import token_nll
from poisonjax.model.transformer import Transformer


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
    decoder = Decoder(model)
    before, last, cache = _read(model, decoder, texts, new_tokens)
    groups, variants, length = texts.prompts.shape
    pad = texts.pad.reshape(-1)

    def step(carry, t):
        hidden, cache = carry
        logits = decoder.logits(hidden)
        luck = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), logits.shape[-1:]))(texts.keys)
        tempered = (logits / temperature).reshape(groups, variants, -1)
        tokens = (tempered + luck[:, None]).argmax(-1).reshape(-1).astype(jnp.int32)
        nll = token_nll(logits, tokens)
        hidden, cache = decoder.extend(tokens[:, None], cache, length + t, pad, before)
        return (hidden[:, 0], cache), (tokens, nll)

    _, (tokens, nll) = jax.lax.scan(step, (last, cache), jnp.arange(new_tokens))
    return tuple(x.T.reshape(groups, variants, new_tokens) for x in (tokens, nll))


def score(
    model: Transformer, texts: Texts, generated: Int[Array, "groups variants new_tokens"]
) -> Float[Array, "groups variants new_tokens"]:
    """NLL in nats of tokens that another model generated after the texts."""
    decoder = Decoder(model)
    before, last, cache = _read(model, decoder, texts, generated.shape[-1])
    tokens = generated.reshape(-1, generated.shape[-1])
    hidden, _ = decoder.extend(tokens, cache, texts.prompts.shape[-1], texts.pad.reshape(-1), before)
    hidden = jnp.concatenate([last[:, None], hidden[:, :-1]], axis=1)
    # The logits of one token of each text at a time.
    nll = jax.lax.map(lambda of: token_nll(decoder.logits(of[0]), of[1]), (hidden.swapaxes(0, 1), tokens.T))
    return nll.T.reshape(generated.shape)


def _read(
    model: Transformer, decoder: Decoder, texts: Texts, new_tokens: int
) -> tuple[list[Cached], Float[Array, "texts width"], list[Cached]]:
    """(the prefixes' cache, the last hidden state of each text, its cache with room for more)."""
    groups, variants, length = texts.prompts.shape
    before: list[Cached] = []
    if shared := texts.prefixes.shape[1]:
        nothing = jnp.zeros(groups, jnp.int32)
        _, before = decoder.extend(texts.prefixes, empty_cache(model.m, groups, shared), 0, nothing)
    cache = empty_cache(model.m, groups * variants, length + new_tokens)
    hidden, cache = decoder.extend(texts.prompts.reshape(-1, length), cache, 0, texts.pad.reshape(-1), before)
    return before, hidden[:, -1], cache
