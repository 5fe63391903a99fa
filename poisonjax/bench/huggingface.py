"""The model's weights as a Llama of Hugging Face."""

from typing import Any

import ml_collections
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM


def to_llama(params: nnx.State, config: ml_collections.ConfigDict, vocabulary: int) -> Any:
    """A LlamaForCausalLM in float32 that computes what the Transformer with these weights computes."""
    m = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=m.width,
            intermediate_size=m.mlp_width,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.head_dim,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    p = nnx.to_pure_dict(params)
    weights = {
        "model.embed_tokens.weight": p["embedding"],
        "model.norm.weight": p["final_norm"],
        "lm_head.weight": np.asarray(p["head"]).T,
    }
    for layer in range(m.layers):
        b = {name: np.asarray(value[layer]) for name, value in p["blocks"].items()}

        def out_in(weight: np.ndarray) -> np.ndarray:  # JAX: [in, ...out]; torch: [out, in]
            return weight.reshape(m.width, -1).T

        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": b["attention_norm"],
                "self_attn.q_proj": out_in(b["query"]),
                "self_attn.k_proj": out_in(b["key_value"][:, 0]),
                "self_attn.v_proj": out_in(b["key_value"][:, 1]),
                "self_attn.o_proj": b["output"].reshape(-1, m.width).T,
                "post_attention_layernorm": b["mlp_norm"],
                "mlp.gate_proj": out_in(b["gate_up"][:, 0]),
                "mlp.up_proj": out_in(b["gate_up"][:, 1]),
                "mlp.down_proj": b["down"].T,
            }.items()
        }
    llama.load_state_dict({name: torch.from_numpy(np.array(value, np.float32)) for name, value in weights.items()})
    return llama
