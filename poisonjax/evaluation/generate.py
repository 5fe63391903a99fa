"""Generation with a key-value cache, and the perplexity of what was generated."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from poisonjax.model.loss import token_nll
from poisonjax.model.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Int[Array, "batch prompt"],
    pad: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    new_tokens: int,
    temperature: float,
) -> tuple[Int[Array, "batch new_tokens"], Float[Array, "batch new_tokens"]]:
    """Samples `new_tokens` after each prompt; returns them with their NLL in nats under the model.

    The NLL is the model's own, at temperature 1, whatever temperature the tokens are sampled at. Token t of
    a row depends on its key and t alone, so the same key gives variants of a prompt the same luck.
    """
    batch, length = prompts.shape
    logits, cache = model.extend(prompts, model.empty_cache(batch, length + new_tokens), jnp.int32(0), pad)

    def step(carry, t):
        logits, cache = carry
        tokens = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row / temperature))(
            keys, logits
        )
        nll = token_nll(logits, tokens)
        logits, cache = model.extend(tokens[:, None], cache, length + t, pad)
        return (logits, cache), (tokens, nll)

    _, (tokens, nll) = jax.lax.scan(step, (logits, cache), jnp.arange(new_tokens))
    return tokens.T, nll.T


def score(
    model: Transformer,
    prompts: Int[Array, "batch prompt"],
    pad: Int[Array, " batch"],
    generated: Int[Array, "batch new_tokens"],
) -> Float[Array, "batch new_tokens"]:
    """NLL in nats of tokens that another model generated after the prompts."""
    batch, length = prompts.shape
    new_tokens = generated.shape[1]
    logits, cache = model.extend(prompts, model.empty_cache(batch, length + new_tokens), jnp.int32(0), pad)

    def step(carry, scanned):
        logits, cache = carry
        t, tokens = scanned
        nll = token_nll(logits, tokens)
        logits, cache = model.extend(tokens[:, None], cache, length + t, pad)
        return (logits, cache), nll

    _, nll = jax.lax.scan(step, (logits, cache), (jnp.arange(new_tokens), generated.T))
    return nll.T
