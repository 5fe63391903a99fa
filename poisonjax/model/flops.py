"""The arithmetic that a model asks for, whatever a compiler makes of it."""

import ml_collections

from poisonjax.model.layouts import LAYOUTS


def block_weights(m: ml_collections.ConfigDict) -> int:
    """Weights in the matrices of one block of a config's section `model`."""
    mlp = 3 if LAYOUTS[m.layout].gated else 2
    return m.width * (2 * m.heads * m.head_dim + 2 * m.kv_heads * m.head_dim + mlp * m.mlp_width)


def train_flops_per_token(m: ml_collections.ConfigDict, seq_len: int, vocabulary: int) -> float:
    """FLOPs of forward and backward pass: 6 a weight of every matrix product, and 6 x layers x seq x heads x
    head_dim for causal attention, which needs half of the full scores.

    As in Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B), but for that half: what is computed again
    (remat), the embedding's lookup, norms and softmax don't count. MFU = this x tokens a second / peak FLOP/s.
    """
    products = m.layers * block_weights(m) + m.width * vocabulary
    return 6.0 * products + 6.0 * m.layers * seq_len * m.heads * m.head_dim
