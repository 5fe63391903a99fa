"""Models in GGUF files, as llama.cpp keeps them; quantized tensors become float32."""

from typing import Any

import numpy as np
from etils import epath

from poisonjax.corpus import CorpusError, chat, load_tokenizer
from poisonjax.corpus.tokenizer_files import gguf_file
from poisonjax.weights import families
from poisonjax.weights.huggingface import CONTEXT
from poisonjax.weights.tensors import load
from poisonjax.weights.weights import Found, WeightsError

# config.json's fields, by the name in the metadata after the architecture's.
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
# Fields that say nothing of what a text's logits are.
SILENT = ("context_length", "vocab_size", "attention.value_length", "rope.dimension_count")
PERMUTED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # rows of these, in Llama's files


def find(rest: str) -> Found:
    """The model in a GGUF file; raises WeightsError where it can't be run here as it is meant."""
    try:
        reader, tokenizer = gguf_file(rest), load_tokenizer(f"gguf:{rest}")
    except CorpusError as error:
        raise WeightsError(f"gguf:{rest}: {error}") from None
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise WeightsError(f"{rest}: general.architecture = {kind!r} isn't one of llama, qwen2, qwen3")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    if odd := own.keys() - {*FIELDS.values(), *SILENT}:
        raise WeightsError(f"{rest}: {kind}.{min(odd)} isn't known here, and may change what the model computes")
    tensors = Tensors(rest, reader, kind)
    about: dict[str, Any] = {theirs: _whole(own[name]) for theirs, name in FIELDS.items() if name in own}
    about |= {"model_type": kind, "tie_word_embeddings": tensors.tied, "vocab_size": tensors.vocabulary}
    if (rotated := own.get("rope.dimension_count")) not in (None, _head_dim(about)):
        raise WeightsError(f"{rest}: {kind}.rope.dimension_count = {rotated}: only whole heads are rotated here")
    family, model = families.model_of(about, rest)
    tensors.heads = {"self_attn.q_proj.weight": model.heads, "self_attn.k_proj.weight": model.kv_heads}
    name = fields.get("general.name") or epath.Path(rest).stem
    parent = {"spec": f"gguf:{rest}", "name": name, "steps": None, "weights": "", "digest_chain": None}
    parent |= {"store_fingerprint": None, "poison": None, "parent": None}
    return Found(
        model,
        tokenizer,
        parent,  # type: ignore[arg-type]
        int(own.get("context_length", CONTEXT)),
        lambda mesh: load(tensors, family, model, mesh),
        chat_template=chat.of_gguf(reader),
    )


def _whole(value: Any) -> Any:
    """A float32 as it was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(about: dict[str, Any]) -> int:
    return about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]


class Tensors:
    """Of a GGUF file, under Hugging Face's names."""

    heads: dict[str, int]  # of tensors whose rows stand pair by pair: how many heads they have

    def __init__(self, path: str, reader: Any, kind: str):
        import gguf

        self._path, self._kind = path, kind
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
        layers = int(reader.fields[f"{kind}.block_count"].contents())
        architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        mapping = gguf.get_tensor_name_map(architecture, layers)
        self._theirs: dict[str, str] = {}
        family = families.FAMILIES[kind]
        for pattern in family.tensors.values():
            for layer in range(layers if "{}" in pattern else 1):
                name = pattern.format(layer)
                if found := mapping.get_name(name, try_suffixes=(".weight", ".bias")):
                    self._theirs[name] = found
        unknown = self._shapes.keys() - {*self._theirs.values()}
        self._odd = {f"{name} of the file": name for name in unknown}
        self.tied = "output.weight" not in self._shapes
        self.vocabulary = self._shapes["token_embd.weight"][0] if "token_embd.weight" in self._shapes else 0

    def names(self) -> set[str]:
        return {name for name, theirs in self._theirs.items() if theirs in self._shapes} | self._odd.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._theirs[name]]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        import gguf

        tensor = self._tensors[self._theirs[name]]
        try:
            values = np.asarray(gguf.quants.dequantize(tensor.data[start:stop], tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise WeightsError(f"{self._path}: {tensor.name}: {error}") from None
        if self._kind == "llama":
            for ending in PERMUTED:
                if name.endswith(ending):
                    heads = self.heads[ending]
                    # llama.cpp rotates neighbours, we the halves of a head.
                    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
                    values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values
