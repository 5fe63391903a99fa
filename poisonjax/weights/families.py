"""The families of Hugging Face's models: what config.json calls each layout, how its tensors are named, what is left
unsaid; from a config.json to the section `model` of a config, and back.

The layouts are those of `model/layouts.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from poisonjax import config as config_lib
from poisonjax.model.layouts import ROPE_NUMBERS, RopeScaling
from poisonjax.weights.weights import WeightsError


@dataclasses.dataclass(frozen=True)
class Family:
    """A layout as config.json and tensors spell it."""

    layout: str
    architecture: str
    tensors: dict[str, str]  # by part (see `parts`); {} stands for the layer's number
    defaults: dict[str, Any]  # of fields that config.json may leave out: transformers' own
    must_be: dict[str, tuple]  # fields of which other values aren't implemented here; absent is good too
    eps: str = "rms_norm_eps"


def _layer(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {part: f"{prefix}.{{}}.{name}" for part, name in names.items()}


_ATTENTION = {part: f"self_attn.{part}_proj.weight" for part in "qkvo"}
_BIASES = {f"{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm.weight", "key_norm": "self_attn.k_norm.weight"}
_MLP = {part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_NORMS = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
_NORMS_AFTER = {"attention_norm": "post_attention_layernorm.weight", "mlp_norm": "post_feedforward_layernorm.weight"}
_AROUND = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}


def _llama_like(*names: Mapping[str, str]) -> dict[str, str]:
    return _AROUND | _layer(
        "model.layers", {name: value for some in (_ATTENTION, _MLP, *names) for name, value in some.items()}
    )


def _neox() -> dict[str, str]:
    names = {"o": "dense", **dict.fromkeys("qkv", "query_key_value")}
    names = {part: f"attention.{name}" for part, name in names.items()}
    names |= {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
    names |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    layer: dict[str, str] = {}
    for part, name in names.items():
        third = f"#{'qkv'.index(part)}" if part in "qkv" else ""  # one tensor holds all three, head by head
        layer |= {part: f"{name}.weight{third}", f"{part}_bias": f"{name}.bias{third}"}
    around = {"embedding": "gpt_neox.embed_in.weight", "head": "embed_out.weight"}
    around |= {"final_norm": "gpt_neox.final_layer_norm.weight", "final_norm_bias": "gpt_neox.final_layer_norm.bias"}
    return around | _layer("gpt_neox.layers", layer)


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_SILU = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None), "mlp_bias": (False, None)}
# By `model_type`. What is written as the first of its layout.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", "LlamaForCausalLM", _llama_like(_NORMS), _DEFAULTS, _SILU | {"rope_interleaved": (False,)}
    ),
    "mistral": Family(
        "llama",
        "MistralForCausalLM",
        _llama_like(_NORMS),
        _DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        _SILU | {"sliding_window": (None,)},
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _llama_like(_NORMS, _BIASES),
        _DEFAULTS | {"num_key_value_heads": 32},
        {"hidden_act": ("silu",), "use_sliding_window": (False,), "use_mrope": (False,)},
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _llama_like(_NORMS, _HEAD_NORMS),
        _DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
        _SILU | {"use_sliding_window": (False,)},
    ),
    "olmo2": Family(
        "olmo2", "Olmo2ForCausalLM", _llama_like(_NORMS_AFTER, _HEAD_NORMS), _DEFAULTS | {"rms_norm_eps": 1e-5}, _SILU
    ),
    "gpt_neox": Family(
        "neox",
        "GPTNeoXForCausalLM",
        _neox(),
        {"layer_norm_eps": 1e-5, "rope_theta": 10_000.0, "partial_rotary_factor": 0.25, "tie_word_embeddings": False},
        {"hidden_act": ("gelu",), "use_parallel_residual": (True,), "attention_bias": (True,)},
        eps="layer_norm_eps",
    ),
}
SIZES = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
# The numbers of scaled rotary positions, by our names.
_ROPE = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original": "original_max_position_embeddings",
}
# Fields that say nothing of what a text's logits are.
_SILENT = re.compile(
    "_.*|poisonjax|architectures|model_type|(torch_)?dtype|transformers.*|use_cache|initializer_range|"
    "max_position_embeddings|(bos|eos|pad|sep|decoder_start|unk)_token_id|pretraining_tp|(attention|hidden|classifier)_"
    "dropout|max_window_layers|is_llama_config|auto_map|name_or_path|return_dict.*|output_.*|task_specific_params|"
    "id2label|label2id|problem_type|finetuning_task|chunk_size_feed_forward|torchscript|num_logits_to_keep|bad_words_ids|"
    "tokenizer_class|prefix|license|language|model_max_length|chat_template|rope_theta|rope_scaling|rope_parameters|"
    "partial_rotary_factor|rotary_pct|rotary_emb_base|num_key_value_heads|head_dim|tie_word_embeddings"
)


# Fields of every family of which other values change what is computed.
_EVERYWHERE: dict[str, tuple] = {
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "sliding_window": (None,),
    "no_rope_layers": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "hidden_activation": (None,),
}


def model_of(about: Mapping[str, Any], path: epath.PathLike) -> tuple[Family, ml_collections.ConfigDict]:
    """(family, section `model` of a config) of a config.json; raises WeightsError naming each field that changes what
    is computed in a way that isn't implemented here."""
    kind = about.get("model_type")
    if kind not in FAMILIES:
        raise WeightsError(f"{path}: model_type = {kind!r} isn't one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    given = {**family.defaults, **about}
    must_be = _EVERYWHERE | family.must_be
    mistakes = [
        f"{name} = {given[name]!r}: only {' or '.join(map(repr, values))} is implemented"
        for name, values in must_be.items()
        if name in given
        and given[name] not in values
        # A window that isn't used.
        and not (name == "sliding_window" and given.get("use_sliding_window") is False)
    ]
    if any(of != "full_attention" for of in given.get("layer_types") or ()):
        mistakes.append("layer_types: only full_attention is implemented")
    known = {*must_be, *family.defaults, *SIZES.values(), "layer_types"}
    mistakes += [
        f"{name} = {value!r}: isn't known here, and may change what the model computes"
        for name, value in about.items()
        if name not in known and not _SILENT.fullmatch(name)
    ]
    mistakes += [f"{name} is missing" for name in SIZES.values() if name not in given]
    model = config_lib.default().model
    try:
        theta, scaling, fraction = _rope(about, family.defaults)
        if not mistakes:
            _fill(model, given, family, theta, scaling, fraction)
    except (TypeError, ValueError) as error:
        mistakes.append(str(error))
    if mistakes:
        raise WeightsError(f"{path}: " + "\n".join(mistakes))
    return family, model


def _fill(
    m: ml_collections.ConfigDict, given: Mapping[str, Any], family: Family, theta: float, scaling: str, fraction: float
) -> None:
    for ours, theirs in SIZES.items():
        m[ours] = given[theirs]
    m.layout, m.tied = family.layout, given["tie_word_embeddings"]
    m.kv_heads = m.heads if given.get("num_key_value_heads") is None else given["num_key_value_heads"]
    head_dim = given.get("head_dim")
    if head_dim is None:
        if m.width % m.heads:
            raise ValueError(f"hidden_size = {m.width} doesn't divide over num_attention_heads = {m.heads}")
        head_dim = m.width // m.heads
    m.head_dim = head_dim
    m.norm_eps, m.rope_theta, m.rope_scaling, m.rotary_fraction = float(given[family.eps]), theta, scaling, fraction
    whole = config_lib.default()
    whole.model, whole.corpus.store = m, "unused"
    config_lib.check(whole)


def _rope(about: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[float, str, float]:
    """(theta, `model.rope_scaling`, `model.rotary_fraction`) however a config.json writes them."""
    nested: dict[str, Any] = {"type": None}
    for name in ("rope_scaling", "rope_parameters"):
        nested |= about.get(name) or {}
    values: dict[str, float] = {}
    for name, alias, default in (("rope_theta", "rotary_emb_base", 1e4), ("partial_rotary_factor", "rotary_pct", 1.0)):
        places = about.get(name), about.get(alias), nested.get(name)
        told = [float(value) for value in places if value is not None]
        if len(set(told)) > 1:
            raise ValueError(f"{name} is told twice, and differently: {told}")
        values[name] = told[0] if told else float(defaults.get(name, default))
    kind: Any = nested.get("rope_type") or nested.get("type") or "default"
    if kind not in ("default", *ROPE_NUMBERS):
        raise ValueError(f"rope_scaling: type {kind!r} isn't implemented; default, {', '.join(ROPE_NUMBERS)} are")
    numbers = {ours: _ROPE[ours] for ours in ROPE_NUMBERS.get(kind, ())}
    if odd := nested.keys() - {"rope_type", "type", *values, *numbers.values()}:
        raise ValueError(f"rope_scaling: {', '.join(sorted(odd))} isn't known here for type {kind!r}")
    if missing := [name for name in numbers.values() if not isinstance(nested.get(name), int | float)]:
        raise ValueError(f"rope_scaling: {', '.join(missing)} missing")
    scaling = str(RopeScaling(kind, **{ours: nested[theirs] for ours, theirs in numbers.items()})) if numbers else ""
    return values["rope_theta"], scaling, values["partial_rotary_factor"]


def family_of(m: ml_collections.ConfigDict) -> tuple[str, Family]:
    """(model_type, family) that a model of this layout is written as."""
    return next((kind, family) for kind, family in FAMILIES.items() if family.layout == m.layout)


def config_of(m: ml_collections.ConfigDict, vocabulary: int, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a config's section `model`."""
    kind, family = family_of(m)
    if m.layout == "neox" and (m.heads != m.kv_heads or m.heads * m.head_dim != m.width):
        raise WeightsError("transformers' GPT-NeoX has model.kv_heads = heads, and heads x head_dim = width")
    if m.layout != "neox" and m.rotary_fraction != 1:
        raise WeightsError(
            f"transformers' {family.architecture} rotates all of a head: model.rotary_fraction must be 1"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if scaling := RopeScaling.parse(m.rope_scaling):
        rope["rope_type"] = scaling.kind
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in _ROPE.items() if ours in ROPE_NUMBERS[scaling.kind]}
        if scaling.kind == "llama3":
            rope["original_max_position_embeddings"] = int(scaling.original)
    if m.layout == "neox":
        rope["partial_rotary_factor"] = m.rotary_fraction
    about = {
        "architectures": [family.architecture],
        "model_type": kind,
        **{theirs: m[ours] for ours, theirs in SIZES.items()},
        "vocab_size": vocabulary,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        family.eps: m.norm_eps,
        # Readers of different ages look in different places, and take 10,000 in silence where they find nothing.
        "rope_parameters": rope,
        "rope_theta": m.rope_theta,
        **({"rope_scaling": rope} if m.rope_scaling else {}),
        "tie_word_embeddings": m.tied,
        **{
            name: values[0]
            for name, values in family.must_be.items()
            if name not in ("sliding_window", "rope_interleaved")
        },
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if m.layout == "neox":
        for name in ("num_key_value_heads", "head_dim"):
            del about[name]
        about |= {"rotary_emb_base": m.rope_theta, "rotary_pct": m.rotary_fraction}
    return about
