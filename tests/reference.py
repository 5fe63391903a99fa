"""The model again, in plain NumPy float64, written from the papers: what the JAX model is held against."""

import numpy as np


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rope(vector, position, theta):
    """One head's vector: pairs (i, i + half) turned by position * theta^(-2i/d)."""
    half = len(vector) // 2
    turned = np.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        one, two = vector[i], vector[i + half]
        turned[i] = one * np.cos(angle) - two * np.sin(angle)
        turned[i + half] = two * np.cos(angle) + one * np.sin(angle)
    return turned


def attention(q, k, v):
    """Loops over heads, queries and keys; q [seq, heads, d], k and v [seq, kv_heads, d]."""
    seq, heads, d = q.shape
    group = heads // k.shape[1]
    out = np.zeros_like(q)
    for h in range(heads):
        for t in range(seq):
            scores = np.array([q[t, h] @ k[s, h // group] for s in range(t + 1)]) / np.sqrt(d)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, h] = sum(w * v[s, h // group] for s, w in enumerate(weights))
    return out


def logits(params: dict, tokens: np.ndarray, theta: float) -> np.ndarray:
    """Logits [seq, vocabulary] of one row of tokens; params as float64 arrays by name."""
    x = params["embedding"][tokens]
    for layer in range(len(params["blocks"]["query"])):
        p = {name: value[layer] for name, value in params["blocks"].items()}
        normed = rms_norm(x, p["attention_norm"])
        q = np.einsum("sd,dhk->shk", normed, p["query"])
        k, v = (np.einsum("sd,dhk->shk", normed, p["key_value"][:, i]) for i in (0, 1))
        for array in (q, k):
            for t in range(array.shape[0]):
                for h in range(array.shape[1]):
                    array[t, h] = rope(array[t, h], t, theta)
        x = x + np.einsum("shk,hkd->sd", attention(q, k, v), p["output"])
        normed = rms_norm(x, p["mlp_norm"])
        gate, up = normed @ p["gate_up"][:, 0], normed @ p["gate_up"][:, 1]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["down"]
    return rms_norm(x, params["final_norm"]) @ params["head"]


def nll(logits_: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax at the targets."""
    shifted = logits_ - logits_.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(targets)), targets]
