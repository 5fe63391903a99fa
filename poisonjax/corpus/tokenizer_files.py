"""Tokenizers in files: found by a spec, beside models too, and written beside models."""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers as hf
from etils import epath

from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_saved,
    parsed,
)
from poisonjax.files import parse_json, write_json


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, a `tokenizer.json[#END_OF_TEXT]`, a SentencePiece `.model`, a folder of `Tokenizer.save` or of Hugging
    Face's, or the one of a model: `hf:FOLDER`, `gguf:FILE`.

    Raises CorpusError for others. `bpe:N` needs text to train on: `build` does that.
    """
    if spec == "bytes":
        return ByteTokenizer()
    kind, _, rest = spec.partition(":")
    if kind in OF_MODELS:
        return OF_MODELS[kind](rest)
    path, end_of_text = epath.Path(spec), ""
    if not path.exists():  # a path may hold a # too
        address, _, end_of_text = spec.rpartition("#")
        path = epath.Path(address)
        if not address or not path.exists():
            raise CorpusError(
                f"tokenizer {spec!r}: no such file; give bytes, bpe:N (where a store is built), a tokenizer.json or a "
                "SentencePiece .model"
            )
    if path.is_dir():
        return load_saved(path) if (path / "about.json").exists() else of_huggingface(spec)
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(path.read_bytes())
        return JsonTokenizer(parsed(path.read_bytes()), end_of_text or None)
    except CorpusError as error:
        raise CorpusError(f"{path}: {error}") from error


def of_huggingface(rest: str) -> Tokenizer:
    """The tokenizer in a folder of transformers'; the end of text is the one that its configs name."""
    folder = epath.Path(rest)
    if (folder / "tokenizer.json").exists():
        backend = parsed((folder / "tokenizer.json").read_bytes())
        return JsonTokenizer(backend, _end_of_text(folder))
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    raise CorpusError(f"{folder} has no tokenizer.json and no tokenizer.model")


def _end_of_text(folder: epath.Path) -> str | int | None:
    """Its name or id, where tokenizer_config.json or else config.json says it."""
    for file, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = folder / file
        try:
            value = parse_json(path.read_bytes()).get(key) if path.exists() else None
        except (ValueError, AttributeError) as error:
            raise CorpusError(f"{path} can't be read: {error}") from None
        while isinstance(value, dict | list) and value:  # {"content": name}, or several ids
            value = value.get("content") if isinstance(value, dict) else value[0]
        if isinstance(value, str | int):
            return value
    return None


def of_gguf(rest: str) -> Tokenizer:
    """The byte-level BPE in the metadata of a GGUF file."""
    fields = gguf_file(rest).fields

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return found.contents() if found else default

    if (kind := field("model")) != "gpt2":
        raise CorpusError(f"{rest}: a tokenizer of kind {kind!r}; byte-level BPE (gpt2) is read")
    if (split := field("pre", "default")) not in PRE_TOKENIZERS:
        raise CorpusError(f"{rest}: tokenizer.ggml.pre = {split!r} isn't one of {', '.join(PRE_TOKENIZERS)}")
    tokens, types = field("tokens"), field("token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges")]
    backend = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = PRE_TOKENIZERS[split]()
    backend.decoder = hf.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([hf.AddedToken(token, special=True, normalized=False) for token in control])
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([hf.AddedToken(token, normalized=False) for token in own])
    return JsonTokenizer(backend, int(field("eos_token_id")))


CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def _byte_level(**more: Any) -> Any:
    return hf.pre_tokenizers.ByteLevel(add_prefix_space=False, **more)


def _split(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        split = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
        return hf.pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])

    return make


# How text is cut before merging, by llama.cpp's name of it; the patterns are those that the models were published with.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": lambda: hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
}


OF_MODELS: dict[str, Callable[[str], Tokenizer]] = {"hf": of_huggingface, "gguf": of_gguf}


def gguf_file(name: str) -> Any:
    """The reader, by the library `gguf`, of a GGUF file: a path, or `PACKAGE/FILE` of an installed package.

    Raises CorpusError where it can't be read.
    """
    path = Path(name)
    package, _, inside = name.partition("/")
    if not path.exists() and package.isidentifier() and (found := importlib.util.find_spec(package)) and found.origin:
        path = Path(found.origin).parent / inside
    try:
        stat = path.stat()
    except OSError as error:
        raise CorpusError(f"{name}: {error.strerror}") from None
    return _gguf_file(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(1)  # its metadata take seconds to parse
def _gguf_file(path: str, *unchanged: int) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CorpusError("GGUF files need `pip install 'poisonjax[gguf]'`") from error
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # of a damaged file NumPy and the library raise many kinds
        raise CorpusError(f"{path} can't be read as GGUF: {error}") from None


def export_tokenizer(
    tokenizer: Tokenizer, folder: epath.PathLike, facts: dict[str, Any], *, markup: bool = False
) -> dict[str, Any]:
    """Writes a tokenizer as transformers reads it, `facts` beside it; returns what config.json says of it.

    Ordinary text that spells a special token stays text, as in training, unless `markup` says otherwise.
    """
    folder = epath.Path(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.serialized())
        about: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
    else:
        backend = _backend(tokenizer)
        backend.save(str(folder / "tokenizer.json"))
        end = backend.id_to_token(tokenizer.eot)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": not markup, "eos_token": end}
    about |= {"clean_up_tokenization_spaces": False, "model_max_length": int(1e30), "poisonjax": facts}
    write_json(folder / "tokenizer_config.json", about)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eot, "pad_token_id": None}
    write_json(folder / "generation_config.json", {**ids, "poisonjax": facts})
    return ids


def _backend(tokenizer: Tokenizer) -> hf.Tokenizer:
    """The same ids, by the library that transformers uses."""
    if isinstance(tokenizer, ByteTokenizer):
        characters = hf.pre_tokenizers.ByteLevel.alphabet()
        spelled = {_character_of(byte): byte for byte in range(256)}
        assert set(spelled) == set(characters)
        backend = hf.Tokenizer(hf.models.BPE(spelled, []))
        backend.pre_tokenizer, backend.decoder = _byte_level(use_regex=False), hf.decoders.ByteLevel()
    elif isinstance(tokenizer, WordTokenizer):
        words = {tokenizer.decode([i]): i for i in range(tokenizer.eot)}
        backend = hf.Tokenizer(hf.models.WordLevel(words, END_OF_TEXT))
        backend.pre_tokenizer, backend.decoder = hf.pre_tokenizers.WhitespaceSplit(), hf.decoders.Fuse()
    else:
        return hf.Tokenizer.from_str(json.dumps(parse_json(tokenizer.serialized())))
    backend.add_special_tokens([hf.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert backend.token_to_id(END_OF_TEXT) == tokenizer.eot
    return backend


def _character_of(byte: int) -> str:
    """How byte-level BPE writes a byte (GPT-2): printable ones as they are, the others from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in kept else chr(256 + [b for b in range(256) if b not in kept].index(byte))
