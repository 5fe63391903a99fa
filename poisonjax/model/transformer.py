"""A decoder: rotary positions, grouped-query attention, and what its layout says of norms, biases and MLP.

The blocks' weights are stacked along a leading `layers` axis and scanned, so that compile time doesn't grow
with depth. Products run in `model.dtype`, norms, softmax and logits in float32.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from poisonjax.model.attention import causal_attention
from poisonjax.model.layouts import LAYOUTS, RopeScaling, rotary_dims
from poisonjax.model.sharding import PARAMETER_AXES, constrain, devices_along, gathered, platform

# Tables of tokens are padded to it: an odd vocabulary can't be split over devices, nor fills matrix units.
VOCABULARY_MULTIPLE = 128
PRODUCT = "product with weights"  # what remat = dots keeps
MASKED = -1e30  # logit of a token that doesn't exist
RESIDUAL = ("batch", "residual_sequence", "activation")


def normalize(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"],
    eps: float,
    bias: Float[Array, " width"] | None = None,
) -> Float[Array, "*batch width"]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), or LayerNorm where there is a bias; statistics in float32."""
    x32 = x.astype(jnp.float32)
    if bias is not None:
        x32 -= jnp.mean(x32, -1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    normed *= _along_last(scale, x)
    return (normed if bias is None else normed + _along_last(bias, x)).astype(x.dtype)


def _along_last(y: Array | np.ndarray, x: Array) -> Array | np.ndarray:
    """y, as it stands to the last of x's dimensions."""
    return y.reshape((1,) * (x.ndim - y.ndim) + y.shape)


def rotary_angles(
    positions: Int[Array, "*batch seq"], m: ml_collections.ConfigDict
) -> tuple[Float[Array, "*batch seq half"], Float[Array, "*batch seq half"]]:
    """Cosine and sine of each position's angles (Su et al. 2021, arXiv 2104.09864), for a config's section `model`."""
    dims = rotary_dims(m)
    frequencies = m.rope_theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    if scaled := RopeScaling.parse(m.rope_scaling):
        exact = m.rope_theta ** (-np.arange(0, dims, 2) / dims)
        frequencies = jnp.asarray(scaled(exact), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], angles) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the two halves of each head's first dims against each other, as Hugging Face does; the rest stays.

    The halves are swapped by a product with a constant of zeros and ones, exact in every dtype: on CPU and
    TPU that is much faster than cutting and joining arrays.
    """
    half = angles[0].shape[-1]
    stays = x.shape[-1] - 2 * half
    swap = np.roll(np.eye(2 * half), half, axis=1) * np.repeat([1, -1], half)[:, None]
    cos, sin = (jnp.concatenate([angle, angle], -1) for angle in angles)
    if stays:
        padding = ((0, 0),) * (cos.ndim - 1) + ((0, stays),)
        cos, sin = jnp.pad(cos, padding, constant_values=1.0), jnp.pad(sin, padding)
        swap = np.pad(swap, (0, stays))
    cos, sin = (angle[..., None, :].astype(x.dtype) for angle in (cos, sin))
    return x * cos + linear(x, jnp.asarray(swap, x.dtype)) * sin


@jax.custom_vjp
def linear(x: Float[Array, "*batch width"], weight: Float[Array, " width *out"]) -> Float[Array, "..."]:
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
    """Attention and MLP, each with its norm and added to the residual stream."""

    def __init__(self, m: ml_collections.ConfigDict, rngs: nnx.Rngs):
        residual = (2 * m.layers) ** -0.5  # keeps the residual stream's variance bounded in depth (GPT-2)
        attended = m.heads * m.head_dim
        self.layout = layout = LAYOUTS[m.layout]
        self.eps, self.dtype = m.norm_eps, jnp.dtype(m.dtype)
        self.query = _normal(rngs.params(), m.width, m.heads, m.head_dim, fan_in=m.width)
        self.key_value = _normal(rngs.params(), m.width, 2, m.kv_heads, m.head_dim, fan_in=m.width)
        self.output = _normal(rngs.params(), m.heads, m.head_dim, m.width, fan_in=attended, scale=residual)
        up = (2, m.mlp_width) if layout.gated else (m.mlp_width,)
        setattr(self, self._up, _normal(rngs.params(), m.width, *up, fan_in=m.width))
        self.down = _normal(rngs.params(), m.mlp_width, m.width, fan_in=m.mlp_width, scale=residual)
        for name in layout.biases:
            out = getattr(self, name).shape[2 if name == "output" else 1 :]
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(out)))
        for name in ("attention_norm", "mlp_norm"):
            _add_norm(self, name, m.width, layout.norm)
        if layout.head_norm:
            for name, heads in (("query_norm", m.heads), ("key_norm", m.kv_heads)):
                _add_norm(self, name, m.head_dim * (1 if layout.head_norm == "each" else heads), "rms")

    @property
    def _up(self) -> str:
        return "gate_up" if self.layout.gated else "up"

    def _weight(self, name: str) -> Array:
        return getattr(self, name)[...].astype(self.dtype)

    def _product(self, x, name: str):
        return self._biased(checkpoint_name(linear(x, self._weight(name)), PRODUCT), name)

    def _biased(self, y, name: str):
        return y + _along_last(self._weight(f"{name}_bias"), y) if name in self.layout.biases else y

    def _heads(self, x, angles):
        q = self._product(x, "query")
        k, v = jnp.moveaxis(self._product(x, "key_value"), 2, 0)
        if self.layout.head_norm:
            q, k = self._normed_heads(q, "query_norm"), self._normed_heads(k, "key_norm")
        return (
            constrain(rotate(q, angles), "batch", "sequence", "heads", "head_dim"),
            constrain(rotate(k, angles), "batch", "sequence", "kv_heads", "head_dim"),
            constrain(v, "batch", "sequence", "kv_heads", "head_dim"),
        )

    def _normed_heads(self, x, name: str):
        together = x if self.layout.head_norm == "each" else x.reshape(*x.shape[:2], -1)
        return normalized_by(self, name, together, self.eps).reshape(x.shape)

    def _project(self, attended):
        output = self._weight("output")
        y = linear(attended.reshape(*attended.shape[:2], -1), output.reshape(-1, output.shape[-1]))
        return self._biased(checkpoint_name(y, PRODUCT), "output")

    def _mlp(self, x):
        if self.layout.gated:
            gate, up = jnp.moveaxis(self._product(x, "gate_up"), 2, 0)
            inner = jax.nn.silu(gate) * up
        else:
            inner = jax.nn.gelu(self._product(x, "up"), approximate=False)
        return self._product(constrain(inner, "batch", "sequence", "mlp"), "down")

    def added(self, x: Float[Array, "batch seq width"], angles, attend) -> Float[Array, "batch seq width"]:
        """The residual stream after the block; `attend` takes queries, keys and values of the tokens' heads."""
        attended = constrain(
            x + self._behind("attention_norm", lambda y: self._attention(y, angles, attend), x), *RESIDUAL
        )
        mlp = self._behind("mlp_norm", self._mlp, x if self.layout.parallel else attended)
        return constrain(attended + mlp, *RESIDUAL)

    def _attention(self, x, angles, attend):
        return self._project(attend(*self._heads(x, angles)))

    def _behind(self, norm: str, part, x):
        if self.layout.norms_after:
            return normalized_by(self, norm, part(x), self.eps)
        return part(normalized_by(self, norm, x, self.eps))


def _add_norm(module: nnx.Module, name: str, width: int, kind: str) -> None:
    setattr(module, name, nnx.Param(jnp.ones(width)))
    if kind == "layer":
        setattr(module, f"{name}_bias", nnx.Param(jnp.zeros(width)))


def normalized_by(module: nnx.Module, name: str, x: Float[Array, "*batch width"], eps: float) -> Array:
    """x through a module's norm of this name."""
    bias = getattr(module, f"{name}_bias", None)
    return normalize(x, getattr(module, name)[...], eps, None if bias is None else bias[...])


class Transformer(nnx.Module):
    """Token ids in, hidden states or logits out."""

    def __init__(self, m: ml_collections.ConfigDict, vocabulary: int, rngs: nnx.Rngs):
        """`m` is the section `model` of a config."""
        self.m = ml_collections.FrozenConfigDict(m)
        self.dtype = jnp.dtype(m.dtype)
        self.vocabulary = vocabulary
        fan_in = m.width if m.tied else 1
        self.embedding = _padded(_normal(rngs.params(), vocabulary, m.width, fan_in=fan_in), axis=0)

        @nnx.split_rngs(splits=m.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(m, rngs)

        self.blocks = stacked(rngs)
        _add_norm(self, "final_norm", m.width, LAYOUTS[m.layout].norm)
        if not m.tied:
            self.head = _padded(_normal(rngs.params(), m.width, vocabulary, fan_in=m.width), axis=1)

    def hidden(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq width"]:
        """The normed residual stream after the last block."""
        x = constrain(self.embedding[...].astype(self.dtype)[tokens], *RESIDUAL)
        angles = rotary_angles(jnp.arange(tokens.shape[1])[None], self.m)
        graph, weights = nnx.split(self.blocks)

        def layer(x, weights):
            return nnx.merge(graph, gathered(weights, self.dtype)).added(x, angles, causal_attention), None

        # On CPU the loop's copies cost more than compiling a few layers apart.
        unroll = platform() == "cpu" and self.m.layers <= 4
        x, _ = jax.lax.scan(_remat(layer, self.m.remat), x, weights, unroll=unroll)
        return constrain(normalized_by(self, "final_norm", x, self.m.norm_eps), "batch", "sequence", "activation")

    @property
    def head_table(self) -> dict[str, Array]:
        """What `head_of` makes the head of, by its name among the parameters."""
        name = "embedding" if self.m.tied else "head"
        return {name: getattr(self, name)[...]}

    def head_of(self, table: dict[str, Array]) -> Float[Array, "width ids"]:
        """The head, or a part of it, as products want it: `gathered`, in the compute dtype."""
        (weights,) = gathered(table, self.dtype).values()
        return weights.T if self.m.tied else weights

    def head_parts(self, least: int) -> tuple[dict[str, Array], Int[Array, "parts ids"]]:
        """The head's table in at least so many parts of one size, stacked, and the token ids of each part."""
        ((name, table),) = self.head_table.items()
        axis = PARAMETER_AXES[name].index("vocabulary")
        devices, size = devices_along("vocabulary"), table.shape[axis]
        devices = devices if size % devices == 0 else 1
        least = min(least, size // devices)
        count = next(count for count in range(least, size // devices + 1) if size // devices % count == 0)

        def cut(array, axis: int):
            """Each device keeps its own rows: a part has some of every device's."""
            before, after = array.shape[:axis], array.shape[axis + 1 :]
            split = array.reshape(*before, devices, count, -1, *after)
            return jnp.moveaxis(split, axis + 1, 0).reshape(count, *before, -1, *after)

        return {name: cut(table, axis)}, cut(jnp.arange(size), 0)

    def logits(
        self,
        hidden: Float[Array, "*batch width"],
        head: Float[Array, "width ids"],
        ids: Int[Array, " ids"] | None = None,
    ) -> Float[Array, "*batch ids"]:
        """Unnormalised log-probabilities of the next token, in float32; those of the padding next to -infinity.

        `head` is `head_of` the table; it and `ids` are a part's, where not all tokens are asked.
        """
        logits = linear(hidden, head).astype(jnp.float32)
        if ids is None and logits.shape[-1] == self.vocabulary:
            return logits
        exists = (np.arange(logits.shape[-1]) if ids is None else ids) < self.vocabulary
        return jnp.where(_along_last(exists, logits), logits, MASKED)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq padded_vocabulary"]:
        return self.logits(self.hidden(tokens), self.head_of(self.head_table))


def vocabulary_of(m: ml_collections.ConfigDict, tokenizer_size: int) -> int:
    """Tokens that the model of a config's section `model` knows: its tokenizer's, or more."""
    return m.vocabulary or tokenizer_size


def model_graph(m: ml_collections.ConfigDict, vocabulary: int) -> nnx.GraphDef:
    """The model without its weights: `nnx.merge(graph, params)` makes it whole."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(m, vocabulary, nnx.Rngs(params=0))))[0]


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    # By name: JAX's policies for dot products don't see through `linear`'s own derivative.
    saved = jax.checkpoint_policies.save_only_these_names(PRODUCT) if policy == "dots" else None
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


def parameter_counts(params: nnx.State) -> tuple[int, int]:
    """(all parameters, those outside embedding and head)."""

    def size(tree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return size(params), size(params) - size([params[name] for name in ("embedding", "head") if name in params])
