"""Goldens of Hugging Face's transformers, made anew with `python tests/huggingface.py` where torch is there.

Weights are a function of a tensor's name, so that a golden holds names, shapes and logits alone.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).with_name("huggingface.json")
SHAPE = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama tied, few heads": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 10}),
    "llama scaled": ("LlamaConfig", {"rope_parameters": SCALED | {"original_max_position_embeddings": 16}}),
    "llama linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 20}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "neox odd": ("GPTNeoXConfig", {"hidden_size": 60, "rotary_pct": 0.3}),  # 15 numbers a head, 4 rotated
}
ROWS = np.random.default_rng(0).integers(0, 300, (64, 24))
KEPT = (slice(0, 4), slice(0, 24, 6), slice(0, 300, 30))  # of the logits, in a golden


def tensor(name: str, shape) -> np.ndarray:
    """A tensor's values: of norms around 1, of others around 0."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.15, shape)
    return (values + ("norm" in name and name.endswith("weight"))).astype(np.float32)


def made(case: str, folder: Path):
    """(a model of transformers with these weights, their shapes), written into `folder`."""
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, fields = CASES[case]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SHAPE | fields))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: list(value.shape) for name, value in load_file(file).items()}  # by the names in files
    save_file({name: tensor(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), shapes


def logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ROWS)).logits.numpy()


def main() -> None:
    goldens = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model, shapes = made(case, Path(folder))
            config = json.loads((Path(folder) / "config.json").read_text())
        goldens[case] = {
            "config": config,
            "tensors": shapes,
            "logits": np.round(logits(model)[KEPT].astype(np.float64), 6).tolist(),
        }
    GOLDENS.write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
