"""The other side of `train_vs_torch`: the same model and step in PyTorch, written as PyTorch users would."""

import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn


class Block(nn.Module):
    """As poisonjax.model.transformer.Block."""

    def __init__(self, m: ml_collections.ConfigDict):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = m.heads, m.kv_heads, m.head_dim
        self.attention_norm = nn.RMSNorm(m.width, eps=1e-6)
        self.qkv = nn.Linear(m.width, (m.heads + 2 * m.kv_heads) * m.head_dim, bias=False)
        self.output = nn.Linear(m.heads * m.head_dim, m.width, bias=False)
        self.mlp_norm = nn.RMSNorm(m.width, eps=1e-6)
        self.gate_up = nn.Linear(m.width, 2 * m.mlp_width, bias=False)
        self.down = nn.Linear(m.mlp_width, m.width, bias=False)

    def forward(self, x, cos, sin):
        batch, seq, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, seq, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class TorchTransformer(nn.Module):
    """As poisonjax.model.transformer.Transformer; returns the mean loss of rows of tokens."""

    def __init__(self, config: ml_collections.ConfigDict, vocabulary: int):
        super().__init__()
        m = config.model
        self.embedding = nn.Embedding(vocabulary, m.width)
        self.blocks = nn.ModuleList(Block(m) for _ in range(m.layers))
        self.final_norm = nn.RMSNorm(m.width, eps=1e-6)
        self.head = nn.Linear(m.width, vocabulary, bias=False)
        frequencies = m.rope_theta ** (-torch.arange(0, m.head_dim, 2, dtype=torch.float32) / m.head_dim)
        angles = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, rows):
        x = self.embedding(rows[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    def load(self, params: nnx.State) -> None:
        """Takes the JAX model's weights."""
        p = nnx.to_pure_dict(params)

        def matrix(*parts) -> torch.Tensor:  # JAX: [in, ...out]; torch: [out, in]
            flat = [np.asarray(part, np.float32).reshape(len(part), -1) for part in parts]
            return torch.from_numpy(np.concatenate(flat, axis=1).T.copy())

        with torch.no_grad():
            self.embedding.weight.copy_(torch.from_numpy(np.array(p["embedding"])))
            self.head.weight.copy_(matrix(p["head"]))
            self.final_norm.weight.copy_(torch.from_numpy(np.array(p["final_norm"])))
            for i, block in enumerate(self.blocks):
                assert isinstance(block, Block)
                b = {name: np.asarray(value[i]) for name, value in p["blocks"].items()}
                block.attention_norm.weight.copy_(torch.from_numpy(b["attention_norm"].copy()))
                block.mlp_norm.weight.copy_(torch.from_numpy(b["mlp_norm"].copy()))
                block.qkv.weight.copy_(matrix(b["query"], b["key_value"]))
                block.output.weight.copy_(matrix(b["output"].reshape(-1, b["output"].shape[-1])))
                block.gate_up.weight.copy_(matrix(b["gate_up"]))
                block.down.weight.copy_(matrix(b["down"]))


class TrainStep:
    """A compiled training step, on the GPU where there is one.

    With model.dtype = bfloat16, products in it by autocast and float32 weights, as here.
    """

    def __init__(self, model: TorchTransformer, config: ml_collections.ConfigDict):
        o = config.optimizer
        self.device, self.clip_norm = "cuda" if torch.cuda.is_available() else "cpu", o.clip_norm
        self.low, self.model = config.model.dtype == "bfloat16", model.to(self.device)
        betas = (o.b1, o.b2)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=o.learning_rate, betas=betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.compiled = torch.compile(model)

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """What a step takes, on its device before the step."""
        return torch.from_numpy(rows).to(self.device, torch.int64)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The loss, which the host needn't wait for."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
            loss = self.compiled(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
