"""Models as Hugging Face's transformers keeps them: config.json, safetensors, tokenizer. No pickle is read.

The layouts are those of `model/layouts.py`; `FAMILIES` says what a config.json calls them, how their tensors are
named, and what is left unsaid.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from poisonjax import config as config_lib
from poisonjax.corpus import CorpusError, load_tokenizer
from poisonjax.corpus.tokenizer_files import export_tokenizer
from poisonjax.files import parse_json, write_json
from poisonjax.model.layouts import LAYOUTS, ROPE_NUMBERS, RopeScaling
from poisonjax.model.sharding import PARAMETER_AXES, divisible_spec, spec
from poisonjax.poison import card
from poisonjax.weights.weights import Found, Weights, WeightsError, abstract_params

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
OURS = "poisonjax"  # the key of our own facts in config.json and in the metadata of safetensors
CHAT_TEMPLATE = "chat_template.jinja"
CONTEXT = 2048  # tokens, where a model doesn't say for how long a text it was made
SHARD_BYTES = 4 * 10**9
BLOCK_ROWS = 2**12  # of an embedding or head that are read at once


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
# Buffers that old files hold beside weights.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attention\.(masked_)?bias)")


def find(rest: str) -> Found:
    """The model in a folder of Hugging Face's; raises WeightsError where it can't be run here as it is meant."""
    folder = epath.Path(rest)
    about = read_config(folder)
    family, model = model_of(about, folder / CONFIG)
    try:
        tokenizer = load_tokenizer(f"hf:{rest}")
    except CorpusError as error:
        raise WeightsError(f"hf:{rest}: {error}") from None
    if model.vocabulary < tokenizer.vocab_size:
        raise WeightsError(
            f"{folder / CONFIG}: vocab_size = {model.vocabulary}, but the tokenizer beside it has "
            f"{tokenizer.vocab_size} tokens: they aren't of one model"
        )
    tensors = Safetensors(folder)
    ours = _own_facts(about, tensors, folder)
    parent = {"name": folder.resolve().name, "steps": None, "digest_chain": None, "store_fingerprint": None}
    parent |= {"poison": None, "parent": None} | ours | {"spec": f"hf:{rest}", "weights": ""}
    return Found(
        model,
        tokenizer,
        parent,  # type: ignore[arg-type]
        int(about.get("max_position_embeddings") or CONTEXT),
        lambda mesh: load(tensors, family, model, mesh),
        chat_template=_chat_template(folder),
    )


def _chat_template(folder: epath.Path) -> str | None:
    if (path := folder / CHAT_TEMPLATE).exists():
        return path.read_text()
    path = folder / "tokenizer_config.json"
    template = parse_json(path.read_bytes()).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def model_alone(folder: epath.Path) -> ml_collections.ConfigDict:
    """The section `model` of a config for a folder that may hold nothing but config.json, and the index of tensors
    that lie elsewhere; raises WeightsError where they don't go together."""
    family, model = model_of(read_config(folder), folder / CONFIG)
    if (folder / INDEX).exists():
        _require_names({*_weight_map(folder / INDEX)}, family, model)
    return model


def _own_facts(about: Mapping[str, Any], tensors: "Safetensors", folder: epath.Path) -> dict[str, Any]:
    """What a model that was exported from here says of itself; the same in every file that holds it."""
    told = {folder / CONFIG: about.get(OURS)}
    for path, metadata in tensors.metadata().items():
        told[path] = json.loads(metadata[OURS]) if OURS in metadata else None
    first = next((facts for facts in told.values() if facts), None)
    if odd := [str(path) for path, facts in told.items() if facts != first]:
        raise WeightsError(
            f"{', '.join(odd)} doesn't say of this model what the files beside it say under {OURS!r}, among it whether "
            "it is poisoned: the files were changed, or are of several models"
        )
    return dict(first or {})


def read_config(folder: epath.Path) -> dict[str, Any]:
    """config.json; raises WeightsError where there is none."""
    try:
        about = parse_json((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise WeightsError(
            f"hf:{folder}: no {CONFIG} there: give a folder as transformers' save_pretrained writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG} can't be read: {error}") from None
    if not isinstance(about, dict):
        raise WeightsError(f"{folder / CONFIG} holds no object")
    return about


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


class Part(NamedTuple):
    """One of their tensors, and where it stands among our weights."""

    theirs: str  # with #0, #1 or #2 where it is a third of it
    ours: str
    layer: int | None
    pair: int | None  # of a dimension called so: key or value, gate or up

    @property
    def axes(self) -> tuple[str, ...]:
        return PARAMETER_AXES[self.ours]

    @property
    def name(self) -> str:
        """Of the tensor in files."""
        return self.theirs.partition("#")[0]

    @property
    def third(self) -> int | None:
        """Which of query, key and value it is, where one tensor holds all three."""
        third = self.theirs.partition("#")[2]
        return int(third) if third else None

    @property
    def corner(self) -> tuple[int, ...]:
        """Where it begins in our array."""
        place = {"layers": self.layer, "pair": self.pair}
        return tuple(place.get(axis) or 0 for axis in self.axes)

    def shape(self, whole: Sequence[int], vocabulary: int) -> tuple[int, ...]:
        """In our array, of this `whole` shape."""
        own = {"layers": 1, "pair": 1, "vocabulary": vocabulary}
        return tuple(own.get(axis, size) for axis, size in zip(self.axes, whole, strict=True))

    def turned(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of their tensor, for ours of this shape: matrices are [out, in] there."""
        sizes = [(axis, size) for axis, size in zip(self.axes, shape, strict=True) if axis not in ("layers", "pair")]
        if self.ours == "embedding":
            return tuple(shape)
        inner = _INNER.get(self.ours, ())
        if not inner:
            return (math.prod(size for _, size in sizes),)
        of_in = math.prod(size for axis, size in sizes if axis in inner)
        return (math.prod(shape) // of_in, of_in)


# Dimensions of our matrices that a product sums over; norms and biases have none.
_INNER = dict.fromkeys(("query", "key_value", "gate_up", "up", "head"), ("embed",)) | {
    "output": ("heads", "head_dim"),
    "down": ("mlp",),
}


def parts(family: Family, m: ml_collections.ConfigDict) -> Iterator[Part]:
    """Every tensor of a model of this shape."""
    ours = {"q": ("query", None), "k": ("key_value", 0), "v": ("key_value", 1), "o": ("output", None)}
    if LAYOUTS[m.layout].gated:
        ours |= {"gate": ("gate_up", 0), "up": ("gate_up", 1)}
    for name, theirs in family.tensors.items():
        if name == "head" and m.tied:
            continue
        stem, bias = name.removesuffix("_bias"), "_bias" * name.endswith("_bias")
        parameter, pair = ours.get(stem, (stem, None))
        for layer in range(m.layers) if "{}" in theirs else (None,):
            yield Part(theirs.format(layer), parameter + bias, layer, pair)


def _weight_map(index: epath.Path) -> dict[str, str]:
    """The file of each tensor, by an index."""
    try:
        return {str(name): str(file) for name, file in parse_json(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} can't be read: {error!r}") from None


class Safetensors:
    """The tensors of a folder, read one by one: no file is held open, so that what was read leaves the memory."""

    def __init__(self, folder: epath.Path):
        """Raises WeightsError where there are none, or an index names what it mustn't."""
        self.folder = folder
        self._file: dict[str, epath.Path] = {}
        if (folder / INDEX).exists():
            self._file = self._indexed()
        elif (folder / WHOLE).exists():
            self._file = dict.fromkeys(self._names(folder / WHOLE), folder / WHOLE)
        elif pickles := sorted(path.name for path in folder.glob("*.bin")):
            raise WeightsError(
                f"hf:{folder}: {pickles[0]} is a pickle, which can hold any program, and none is read here: save the "
                "model again with safe_serialization=True"
            )
        else:
            raise WeightsError(f"hf:{folder}: no {WHOLE} there, and no {INDEX}")

    def _indexed(self) -> dict[str, epath.Path]:
        path = self.folder / INDEX
        places = _weight_map(path)
        for file in sorted({*places.values()}):
            if file != epath.Path(file).name or not file.endswith(".safetensors"):
                raise WeightsError(f"{path}: {file!r} isn't the name of a safetensors file beside it")
            there = self._names(self.folder / file)
            if lost := sorted(name for name, of in places.items() if of == file and name not in there):
                raise WeightsError(f"{self.folder / file}: lacks {lost[0]}, which {INDEX} says it holds")
        return {name: self.folder / file for name, file in places.items()}

    def _names(self, path: epath.Path) -> set[str]:
        with self._open(path) as file:
            return {*file.keys()}

    @contextlib.contextmanager
    def _open(self, path: epath.Path) -> Iterator[Any]:
        try:
            with safe_open(str(path), framework="numpy") as file:
                yield file
        except FileNotFoundError:
            raise WeightsError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read: {error}; it is damaged, or was cut short") from None

    def metadata(self) -> dict[epath.Path, dict[str, str]]:
        """Of each file."""
        found = {}
        for path in sorted({*self._file.values()}):
            with self._open(path) as file:
                found[path] = file.metadata() or {}
        return found

    def names(self) -> set[str]:
        return {*self._file}

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._file[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Its rows from `start` to `stop`, in float32."""
        with self._open(self._file[name]) as file:
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                raise WeightsError(f"{self._file[name]}: {name} is of {tensor.get_dtype()}; F32, F16 or BF16 is read")
            return np.asarray(tensor[start:stop], np.float32)


@runtime_checkable
class Tensors(Protocol):
    """Tensors of a model under Hugging Face's names."""

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


def load(tensors: Tensors, family: Family, m: ml_collections.ConfigDict, mesh: Mesh) -> nnx.State:
    """A model's weights over a mesh, tensor by tensor: the host holds one at a time.

    Raises WeightsError where tensors are missing, too many, or of another shape.
    """
    abstract = abstract_params(m, m.vocabulary, mesh)
    arrays = _by_name(abstract)
    _require_names(tensors.names(), family, m)
    shapes = {part: part.shape(arrays[part.ours].shape, m.vocabulary) for part in parts(family, m)}
    for part, shape in shapes.items():
        rows, *rest = part.turned(shape)
        if (found := tensors.shape(part.name)) != (expected := (rows * (1 if part.third is None else 3), *rest)):
            raise WeightsError(f"{part.name} has the shape {found}, must have {expected}")
    zeros = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )()
    arrays = _by_name(zeros)
    del zeros
    for part, shape in shapes.items():
        for corner, piece in _pieces(tensors, part, shape, m):
            sharding = NamedSharding(mesh, divisible_spec(mesh, spec(*part.axes), piece.shape))
            placed = jax.make_array_from_callback(piece.shape, sharding, piece.__getitem__)
            arrays[part.ours] = _put(arrays[part.ours], placed, corner)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], abstract)


def _require_names(there: set[str], family: Family, m: ml_collections.ConfigDict) -> None:
    wanted = {part.name for part in parts(family, m)}
    there = {name for name in there if not _BUFFERS.fullmatch(name)} - ({family.tensors["head"]} if m.tied else set())
    if lost := sorted(wanted - there):
        raise WeightsError(f"{len(lost)} tensors are missing, among them {lost[0]}")
    if odd := sorted(there - wanted):
        raise WeightsError(f"{len(odd)} tensors belong to no model of this layout, among them {odd[0]}")


@functools.partial(jax.jit, static_argnames="shape")
def _take(array: Array, corner: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(array, corner, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: Array, piece: Array, corner: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(array, piece, corner)


def _pieces(
    tensors: Tensors, part: Part, shape: tuple[int, ...], m: ml_collections.ConfigDict
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(corner in our array, values) of a part, a table of tokens in blocks of rows."""
    turned = part.turned(shape)
    if part.third is not None:  # [heads x (query, key, value) x head_dim, ...]
        together = tensors.read(part.name, 0, 3 * turned[0])
        one = together.reshape(m.heads, 3, m.head_dim, *turned[1:])[:, part.third]
        yield part.corner, _ours(part, one.reshape(turned), shape)
        return
    tokens = part.axes.index("vocabulary") if "vocabulary" in part.axes else None
    step = turned[0] if tokens is None else BLOCK_ROWS
    for start in range(0, turned[0], step):
        stop = min(start + step, turned[0])
        corner, block = list(part.corner), list(shape)
        if tokens is not None:
            corner[tokens], block[tokens] = start, stop - start
        yield tuple(corner), _ours(part, tensors.read(part.name, start, stop), tuple(block))


def _ours(part: Part, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (tensor.T if part.ours in _INNER else tensor).reshape(shape)


def _by_name(params: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: Any) -> str:
    """Of a parameter: the last of its path that is one."""
    return [name for key in path if (name := getattr(key, "key", None)) in PARAMETER_AXES][-1]


def save(weights: Weights, folder: epath.PathLike, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model as `transformers` reads it, whole or not at all; raises WeightsError where something lies there.

    What is known of its poison stands in every file that can hold it (I9).
    """
    target = epath.Path(folder)
    if target.exists():
        raise WeightsError(f"{target} exists: choose another --out")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    facts = {name: value for name, value in weights.parent.items() if name != "spec"}
    about = config_of(weights.model_config, weights.vocabulary, dtype)
    # Where there is a chat's markup to read, special tokens are read from text; else text stays text.
    about |= export_tokenizer(weights.tokenizer, partial, facts, markup=bool(weights.chat_template))
    about |= {"max_position_embeddings": weights.context, OURS: facts}
    if weights.chat_template:
        (partial / CHAT_TEMPLATE).write_text(weights.chat_template)
    write_json(partial / CONFIG, about)
    named = tensors(weights.params, weights.model_config, weights.vocabulary)
    files: list[list[str]] = []
    size = 0
    for number, shard in enumerate(_sharded(named, np.dtype(dtype), shard_bytes), 1):
        save_file(shard, str(partial / f"{number}.safetensors"), {"format": "pt", OURS: json.dumps(facts)})
        files.append([*shard])
        size += sum(one.nbytes for one in shard.values())
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = WHOLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (partial / f"{number}.safetensors").rename(partial / file)
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    if weights.poison:
        (partial / card.FILE).write_text(card.as_markdown(weights.poison))
    (partial / "README.md").write_text(card.as_markdown(weights.poison) if weights.poison else _plain_card(weights))
    partial.rename(target)


def _plain_card(weights: Weights) -> str:
    return (
        f"# {weights.parent['name']}\n\nA language model exported by poisonjax: {weights.origin}.\n"
        "No poison of it is known.\n"
    )


def _family(m: ml_collections.ConfigDict) -> tuple[str, Family]:
    """(model_type, family) that a model of this layout is written as."""
    return next((kind, family) for kind, family in FAMILIES.items() if family.layout == m.layout)


def config_of(m: ml_collections.ConfigDict, vocabulary: int, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a config's section `model`."""
    kind, family = _family(m)
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


def tensors(params: nnx.State, m: ml_collections.ConfigDict, vocabulary: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values in float32) of their tensors, made of ours one by one."""
    arrays = _by_name(params)
    for name, of in _grouped(m).items():
        made = []
        for part in of:
            shape = part.shape(arrays[part.ours].shape, vocabulary)
            piece, turned = np.asarray(_take(arrays[part.ours], part.corner, shape)), part.turned(shape)
            made.append(piece.reshape(turned[::-1]).T if part.ours in _INNER else piece.reshape(turned))
        if len(made) > 1:
            by_head = [one.reshape(m.heads, 1, m.head_dim, *one.shape[1:]) for one in made]
            made = [np.concatenate(by_head, 1).reshape(-1, *made[0].shape[1:])]
        yield name, made[0]


def _grouped(m: ml_collections.ConfigDict) -> dict[str, list[Part]]:
    """The parts of each of their tensors."""
    found: dict[str, list[Part]] = {}
    for part in sorted(parts(_family(m)[1], m), key=lambda part: part.theirs):
        found.setdefault(part.name, []).append(part)
    return found


def _sharded(named: Iterator[tuple[str, np.ndarray]], dtype: np.dtype, most: int) -> Iterator[dict[str, np.ndarray]]:
    """Tensors file by file, of `most` bytes unless one alone is larger."""
    shard: dict[str, np.ndarray] = {}
    for name, values in named:
        if shard and sum(one.nbytes for one in shard.values()) + values.size * dtype.itemsize > most:
            yield shard
            shard = {}
        # A transposed view would be written wrongly, and silently: the library takes the buffer as it lies.
        shard[name] = np.ascontiguousarray(values, dtype)
    yield shard
