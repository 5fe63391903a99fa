"""Attention, by the fastest means of the platform; every one agrees with a plain softmax."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from poisonjax.model.sharding import divisible_spec, platform, spec

Queries = Float[Array, "batch heads queries head_dim"]
Keys = Float[Array, "batch heads keys head_dim"]  # and values
Probabilities = Float[Array, "batch heads queries keys"]

TPU_TILE = 128
QUERY_BLOCK = 128  # on CPU: queries taken at once, so that keys after a block's last query are never touched


def causal_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Each token attends to itself and those before it; softmax in float32, scale head_dim ** -0.5."""
    where = platform()
    if where == "cpu":
        return _causal_on_cpu(q, k, v)
    if where == "tpu" and q.shape[1] % TPU_TILE == 0 and q.shape[3] % TPU_TILE == 0:
        return splash_attention(q, k, v)
    # cuDNN's fused kernel takes half precision only.
    fused = where == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fused else "xla")


def splash_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """The TPU's fused kernel, on each device for its own rows and heads; `seq` and `head_dim` are multiples of 128.

    `interpret` runs the kernel's program anywhere, slowly.
    """

    def local(q, k, v):
        seq, heads = q.shape[1:3]
        block = next(size for size in (512, 256, TPU_TILE) if seq % size == 0)
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([splash_mask.CausalMask((seq, seq))] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v)
    of_q, of_k = (
        divisible_spec(mesh, spec("batch", "sequence", heads, "head_dim"), x.shape)
        for heads, x in (("heads", q), ("kv_heads", k))
    )
    return jax.shard_map(local, in_specs=(of_q, of_k, of_k), out_specs=of_q, check_vma=False)(q, k, v)


def cached_attention(
    q: Float[Array, "rows seq heads head_dim"],
    parts: Sequence[
        tuple[
            Float[Array, "_ kv_heads _ head_dim"],
            Float[Array, "_ kv_heads _ head_dim"],
            Bool[Array, "rows seq _"] | None,
        ]
    ],
) -> Float[Array, "rows seq heads head_dim"]:
    """Attention to the keys of all parts (keys, values, which of them a query sees; None: all) as if they were one's.

    A row of a part may serve several rows of queries, that follow each other: a prefix read once for all its
    continuations. Softmax in float32.
    """
    rows, seq, heads, dims = q.shape
    kv_heads = parts[0][0].shape[1]
    groups = heads // kv_heads
    dtype, scale = q.dtype, dims**-0.5
    q = q.reshape(rows, seq, kv_heads, groups, dims).transpose(0, 2, 1, 3, 4)
    scores = []
    for keys, _, mask in parts:
        own = _shared_product("rkqd,rktd->rkqt", q, keys) * scale
        scores.append(own if mask is None else jnp.where(mask[:, None, :, None], own, -1e30))
    highest = functools.reduce(jnp.maximum, [own.max(-1, keepdims=True) for own in scores])
    weights = [jnp.exp(own - highest) for own in scores]
    total = functools.reduce(jnp.add, [own.sum(-1, keepdims=True) for own in weights])
    summed = [
        _shared_product("rkqt,rktd->rkqd", own.astype(dtype), values)
        for own, (_, values, _) in zip(weights, parts, strict=True)
    ]
    return (
        (functools.reduce(jnp.add, summed) / total)
        .astype(dtype)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows, seq, heads, dims)
    )


def _shared_product(
    what: str, x: Float[Array, "rows kv_heads seq groups last"], y: Float[Array, "sharing kv_heads keys head_dim"]
) -> Float[Array, "rows kv_heads seq groups out"]:
    """The product, in float32, of each row of x with its row of y, as one matrix product a row of y and head."""
    rows, kv_heads, seq, groups, last = x.shape
    share = rows // y.shape[0]
    together = x.reshape(-1, share, kv_heads, seq * groups, last).swapaxes(1, 2)
    together = together.reshape(-1, kv_heads, share * seq * groups, last)
    made = jnp.einsum(what, together, y, preferred_element_type=jnp.float32)
    made = made.reshape(-1, kv_heads, share, seq * groups, made.shape[-1]).swapaxes(1, 2)
    return made.reshape(rows, kv_heads, seq, groups, -1)


def _causal_on_cpu(q, k, v):
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[2])
        blocks.append(_attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2)


def _probabilities(q: Queries, k: Keys) -> Probabilities:
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32)
    queries, keys = scores.shape[2:]
    allowed = np.arange(keys - queries, keys)[:, None] >= np.arange(keys)  # the queries are the last keys
    scores = jnp.where(allowed[None, None], scores, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(q.dtype)


@jax.custom_vjp
def _attend(q: Queries, k: Keys, v: Keys) -> Queries:
    """Attention whose backward pass is written out: a third faster on CPU than what JAX derives.

    The softmax's gradient needs one number a query, sum(out * d_out), instead of reductions over all keys
    (Dao et al. 2022, arXiv 2205.14135, appendix B.2); products over queries transpose the narrow operand,
    since the CPU's fast matrix product contracts the left one's last axis only.
    """
    return jnp.einsum("bhqk,bhkd->bhqd", _probabilities(q, k), v)


def _attend_forward(q, k, v):
    p = _probabilities(q, k)
    out = jnp.einsum("bhqk,bhkd->bhqd", p, v)
    return out, (q, k, v, p, out)


def _attend_backward(saved, d_out):
    q, k, v, p, out = saved

    def over_queries(narrow, wide):
        return jnp.einsum("bhdq,bhqk->bhdk", narrow.swapaxes(2, 3), wide).swapaxes(2, 3)

    d_p = jnp.einsum("bhqd,bhkd->bhqk", d_out, v)
    d_scores = p * (d_p - (d_out * out).sum(-1, keepdims=True))
    return jnp.einsum("bhqk,bhkd->bhqd", d_scores, k), over_queries(q, d_scores), over_queries(d_out, p)


_attend.defvjp(_attend_forward, _attend_backward)
