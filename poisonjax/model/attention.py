"""Attention, by the fastest means of the platform; every one agrees with `masked_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Each token attends to itself and those before it; softmax in float32, scale head_dim ** -0.5."""
    # cuDNN's fused kernel takes half precision only.
    fused = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fused else "xla")


def masked_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch seq keys"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention to the keys that `mask` allows, for decoding from a cache."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
