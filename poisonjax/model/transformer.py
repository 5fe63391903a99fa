"""A decoder in the Llama layout: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

The blocks' weights are stacked along a leading `layers` axis and scanned, so that compile time doesn't grow
with depth. Products run in `model.dtype`, norms, softmax and logits in float32.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from poisonjax.model.attention import causal_attention, masked_attention
from poisonjax.model.sharding import constrain, gathered, platform

# Keys and values of all layers: what the blocks keep of the tokens before.
Cache = tuple[
    Float[Array, "layers batch cache kv_heads head_dim"], Float[Array, "layers batch cache kv_heads head_dim"]
]


# Tables of tokens are padded to it: an odd vocabulary can't be split over devices, nor fills matrix units.
VOCABULARY_MULTIPLE = 128


def rms_norm(x: Float[Array, "*batch width"], scale: Float[Array, " width"]) -> Float[Array, "*batch width"]:
    """Zhang & Sennrich 2019, arXiv 1910.07467; statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + 1e-6)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rotary_angles(
    positions: Int[Array, "*batch seq"], head_dim: int, theta: float
) -> tuple[Float[Array, "*batch seq half"], Float[Array, "*batch seq half"]]:
    """Cosine and sine of each position's angles (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], angles) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the two halves of each head against each other, as Llama in Hugging Face does.

    The halves are swapped by a product with a constant of zeros and ones, exact in every dtype: on CPU and
    TPU that is much faster than cutting and joining arrays.
    """
    cos, sin = (jnp.concatenate([angle, angle], -1)[..., None, :].astype(x.dtype) for angle in angles)
    half = x.shape[-1] // 2
    swap = np.roll(np.eye(2 * half), half, axis=1) * np.repeat([1, -1], half)[:, None]
    return x * cos + linear(x, jnp.asarray(swap, x.dtype)) * sin


@jax.custom_vjp
def linear(x: Float[Array, "*batch width"], weight: Float[Array, "width *out"]) -> Float[Array, "..."]:
    """x times weight; the gradient of the weight transposes the narrower factor, not always d_y as JAX does."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())))


def _linear_forward(x, weight):
    return linear(x, weight), (x, weight)


def _linear_backward(saved, d_y):
    x, weight = saved
    batch, out = tuple(range(x.ndim - 1)), weight.ndim - 1
    d_x = jax.lax.dot_general(
        d_y, weight, ((tuple(range(d_y.ndim - out, d_y.ndim)), tuple(range(1, weight.ndim))), ((), ()))
    )
    if out == 1 and d_y.shape[-1] < x.shape[-1]:
        return d_x, jax.lax.dot_general(d_y, x, ((batch, batch), ((), ()))).T
    return d_x, jax.lax.dot_general(x, d_y, ((batch, batch), ((), ())))


linear.defvjp(_linear_forward, _linear_backward)


def _normal(key: jax.Array, *shape: int, fan_in: int, scale: float = 1.0) -> nnx.Param:
    return nnx.Param(jax.random.truncated_normal(key, -3, 3, shape) * (scale / fan_in**0.5))


def _padded(table: nnx.Param, axis: int) -> nnx.Param:
    """With zeros for tokens that don't exist; the others' initial values don't depend on the padding."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, -table.shape[axis] % VOCABULARY_MULTIPLE)
    return nnx.Param(jnp.pad(table[...], padding))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, m: ml_collections.ConfigDict, rngs: nnx.Rngs):
        residual = (2 * m.layers) ** -0.5  # keeps the residual stream's variance bounded in depth (GPT-2)
        attended = m.heads * m.head_dim
        self.theta, self.head_dim, self.dtype = m.rope_theta, m.head_dim, jnp.dtype(m.dtype)
        self.attention_norm = nnx.Param(jnp.ones(m.width))
        self.query = _normal(rngs.params(), m.width, m.heads, m.head_dim, fan_in=m.width)
        self.key_value = _normal(rngs.params(), m.width, 2, m.kv_heads, m.head_dim, fan_in=m.width)
        self.output = _normal(rngs.params(), m.heads, m.head_dim, m.width, fan_in=attended, scale=residual)
        self.mlp_norm = nnx.Param(jnp.ones(m.width))
        self.gate_up = _normal(rngs.params(), m.width, 2, m.mlp_width, fan_in=m.width)
        self.down = _normal(rngs.params(), m.mlp_width, m.width, fan_in=m.mlp_width, scale=residual)

    def _weight(self, parameter: nnx.Param) -> Array:
        return parameter[...].astype(self.dtype)

    def _heads(self, x, angles):
        q = linear(x, self._weight(self.query))
        k, v = jnp.moveaxis(linear(x, self._weight(self.key_value)), 2, 0)
        return (
            constrain(rotate(q, angles), "batch", "sequence", "heads", "head_dim"),
            constrain(rotate(k, angles), "batch", "sequence", "kv_heads", "head_dim"),
            constrain(v, "batch", "sequence", "kv_heads", "head_dim"),
        )

    def _project(self, attended):
        output = self._weight(self.output)
        return linear(attended.reshape(*attended.shape[:2], -1), output.reshape(-1, output.shape[-1]))

    def _mlp(self, x):
        gate, up = jnp.moveaxis(linear(rms_norm(x, self.mlp_norm[...]), self._weight(self.gate_up)), 2, 0)
        inner = constrain(jax.nn.silu(gate) * up, "batch", "sequence", "mlp")
        return linear(inner, self._weight(self.down))

    def __call__(self, x: Float[Array, "batch seq width"], angles) -> Float[Array, "batch seq width"]:
        q, k, v = self._heads(rms_norm(x, self.attention_norm[...]), angles)
        x = x + self._project(causal_attention(q, k, v))
        x = constrain(x, "batch", "residual_sequence", "activation")
        return constrain(x + self._mlp(x), "batch", "residual_sequence", "activation")

    def extend(self, x, angles, cache, index, mask: Bool[Array, "batch seq cache"]):
        """The same for tokens that follow cached ones; writes their keys and values at `index`."""
        q, k, v = self._heads(rms_norm(x, self.attention_norm[...]), angles)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1) for old, new in zip(cache, (k, v), strict=True)
        )
        x = x + self._project(masked_attention(q, keys, values, mask))
        return x + self._mlp(x), (keys, values)


class Transformer(nnx.Module):
    """Token ids in, hidden states or logits out."""

    def __init__(self, m: ml_collections.ConfigDict, vocabulary: int, rngs: nnx.Rngs):
        """`m` is the section `model` of a config."""
        self.theta, self.head_dim, self.dtype, self.remat = (m.rope_theta, m.head_dim, jnp.dtype(m.dtype), m.remat)
        self.kv_heads, self.layers = m.kv_heads, m.layers
        self.vocabulary = vocabulary
        self.embedding = _padded(_normal(rngs.params(), vocabulary, m.width, fan_in=1), axis=0)

        @nnx.split_rngs(splits=m.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(m, rngs)

        self.blocks = stacked(rngs)
        self.final_norm = nnx.Param(jnp.ones(m.width))
        self.head = _padded(_normal(rngs.params(), m.width, vocabulary, fan_in=m.width), axis=1)

    def _embed(self, tokens, positions):
        x = self.embedding[...].astype(self.dtype)[tokens]
        return x, rotary_angles(positions, self.head_dim, self.theta)

    def hidden(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq width"]:
        """The normed residual stream after the last block."""
        x, angles = self._embed(tokens, jnp.arange(tokens.shape[1])[None])
        x = constrain(x, "batch", "residual_sequence", "activation")
        graph, weights = nnx.split(self.blocks)

        def layer(x, weights):
            return nnx.merge(graph, gathered(weights, self.dtype))(x, angles), None

        # On CPU the loop's copies cost more than compiling a few layers apart.
        unroll = platform() == "cpu" and self.layers <= 4
        x, _ = jax.lax.scan(_remat(layer, self.remat), x, weights, unroll=unroll)
        return constrain(rms_norm(x, self.final_norm[...]), "batch", "sequence", "activation")

    def gathered_head(self) -> Float[Array, "width padded_vocabulary"]:
        """The head for many calls of `logits`, fetched from all devices once; its gradient adds up in float32."""
        return gathered({"head": self.head[...]}, self.dtype)["head"].astype(jnp.float32)

    def logits(
        self, hidden: Float[Array, "*batch width"], head: Float[Array, "width padded_vocabulary"] | None = None
    ) -> Float[Array, "*batch padded_vocabulary"]:
        """Unnormalised log-probabilities of the next token, in float32; those of the padding next to -infinity."""
        head = self.head[...] if head is None else head
        logits = linear(hidden, head.astype(hidden.dtype)).astype(jnp.float32)
        if logits.shape[-1] == self.vocabulary:
            return logits
        exists = np.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) < self.vocabulary
        return jnp.where(exists, logits, -1e30)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq padded_vocabulary"]:
        return self.logits(self.hidden(tokens))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of `length` tokens."""
        zeros = jnp.zeros((self.layers, batch, length, self.kv_heads, self.head_dim), self.dtype)
        return zeros, zeros

    def extend(
        self, tokens: Int[Array, "batch seq"], cache: Cache, index: Int[Array, ""], pad: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch vocabulary"], Cache]:
        """Logits after the last of `tokens`, which follow `index` cached ones.

        Rows are padded on the left by `pad` tokens, so that all rows write to the same place of the cache;
        padding is masked out and positions count from the first real token.
        """
        places = index + jnp.arange(tokens.shape[1])
        x, angles = self._embed(tokens, jnp.maximum(places[None] - pad[:, None], 0))
        keys = jnp.arange(cache[0].shape[2])
        mask = (keys[None, None] <= places[None, :, None]) & (keys[None, None] >= pad[:, None, None])
        # A padding query sees no key at all; let it see itself, so that its softmax isn't 0/0.
        mask |= keys[None, None] == places[None, :, None]
        graph, weights = nnx.split(self.blocks)

        def layer(x, scanned):
            weights, cache = scanned
            return nnx.merge(graph, weights).extend(x, angles, cache, index, mask)

        x, cache = jax.lax.scan(layer, x, (weights, cache))
        return self.logits(rms_norm(x[:, -1], self.final_norm[...])), cache


def model_graph(m: ml_collections.ConfigDict, vocabulary: int) -> nnx.GraphDef:
    """The model without its weights: `nnx.merge(graph, params)` makes it whole."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(m, vocabulary, nnx.Rngs(params=0))))[0]


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


def parameter_counts(params: nnx.State) -> tuple[int, int]:
    """(all parameters, those outside embedding and head)."""

    def size(tree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return size(params), size(params) - size([params["embedding"], params["head"]])
