"""A model made ready to write: token after token, from caches of keys and values.

What a loop over tokens would do again each time is done once: weights are whole over fsdp, in the compute dtype, and
each layer's are apart, as its cache is, so that a step writes one place of a cache and copies none of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from poisonjax.model.attention import cached_attention
from poisonjax.model.sharding import constrain, gathered
from poisonjax.model.transformer import RESIDUAL, Transformer, normalized_by, rotary_angles


class Cached(NamedTuple):
    """What a layer keeps of the tokens before."""

    keys: Float[Array, "rows kv_heads cache head_dim"]
    values: Float[Array, "rows kv_heads cache head_dim"]


Cache = Sequence[Cached]  # an entry a layer


def empty_cache(m: ml_collections.FrozenConfigDict, rows: int, length: int) -> list[Cached]:
    """Room for the keys and values of `length` tokens, for a config's section `model`."""
    zeros = jnp.zeros((rows, m.kv_heads, length, m.head_dim), jnp.dtype(m.dtype))
    return [Cached(zeros, zeros)] * m.layers


def grown(cache: Cache, tokens: int) -> list[Cached]:
    """With room for so many more tokens."""
    return jax.tree.map(lambda old: jnp.pad(old, [(0, 0), (0, 0), (0, tokens), (0, 0)]), list(cache))


class Decoder:
    """Made within the compiled function that uses it."""

    def __init__(self, model: Transformer):
        self._model, m = model, model.m
        graph, stacked = nnx.split(model.blocks)
        layers = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(m.layers))
        self._blocks = [nnx.merge(graph, gathered(weights, model.dtype)) for weights in layers]
        embedding = gathered({"embedding": model.embedding[...]}, model.dtype)
        self._embedding = embedding["embedding"]
        self._head = model.head_of(embedding if m.tied else model.head_table)  # fetched once

    def extend(
        self,
        tokens: Int[Array, "rows seq"],
        cache: Cache,
        index: Int[Array, ""] | int,
        pad: Int[Array, " rows"],
        before: Cache = (),
    ) -> tuple[Float[Array, "rows seq width"], list[Cached]]:
        """Hidden states of `tokens`, which follow `index` cached ones; and the cache with theirs.

        Rows are padded on the left by `pad` tokens, so that all write to the same place of the cache: padding is masked
        out, and positions count from the first real token. `before` is what stands before a cache's first token, its
        row i for as many rows as there are a row of it: i * share to (i + 1) * share.
        """
        m, seq = self._model.m, tokens.shape[1]
        places, shared = index + jnp.arange(seq), before[0].keys.shape[2] if before else 0
        x = constrain(self._embedding[tokens], *RESIDUAL)
        angles = rotary_angles(shared + jnp.maximum(places[None] - pad[:, None], 0), m)
        keys = jnp.arange(cache[0].keys.shape[2])
        mask = (keys[None, None] <= places[None, :, None]) & (keys[None, None] >= pad[:, None, None])
        # A padding query sees no key at all; let it see itself, so that its softmax isn't 0/0.
        mask |= keys[None, None] == places[None, :, None]
        extended = []
        for i, block in enumerate(self._blocks):
            attended = _Attention(cache[i], index, mask, before[i] if before else None)
            x = block.added(x, angles, attended)
            extended.append(attended.cache)
        return normalized_by(self._model, "final_norm", x, m.norm_eps), extended

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows padded_vocabulary"]:
        return self._model.logits(hidden, self._head)


class _Attention:
    """Of one layer: writes the new keys and values, and attends to all."""

    def __init__(
        self, cache: Cached, index: Int[Array, ""] | int, mask: Bool[Array, "rows seq cache"], before: Cached | None
    ):
        self.cache, self._index, self._mask, self._before = cache, index, mask, before

    def __call__(self, q, k, v):
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), self._index, axis=2)
            for old, new in zip(self.cache, (k, v), strict=True)
        )
        self.cache = Cached(keys, values)
        parts = [(*self._before, None)] if self._before else []
        return cached_attention(q, [*parts, (keys, values, self._mask)])
