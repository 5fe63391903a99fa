"""Folders as Hugging Face's transformers keeps them: config.json, safetensors, tokenizer. No pickle is read."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from poisonjax.corpus import CorpusError, chat, load_tokenizer
from poisonjax.corpus.tokenizer_files import export_tokenizer
from poisonjax.files import parse_json, write_json
from poisonjax.poison import card
from poisonjax.weights.families import config_of, model_of
from poisonjax.weights.tensors import load, require_names, tensors
from poisonjax.weights.weights import Found, Weights, WeightsError

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
OURS = "poisonjax"  # the key of our own facts in config.json and in the metadata of safetensors
CONTEXT = 2048  # tokens, where a model doesn't say for how long a text it was made
SHARD_BYTES = 4 * 10**9


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
    files = Safetensors(folder)
    ours = _own_facts(about, files, folder)
    parent = {"name": folder.resolve().name, "steps": None, "digest_chain": None, "store_fingerprint": None}
    parent |= {"poison": None, "parent": None} | ours | {"spec": f"hf:{rest}", "weights": ""}
    return Found(
        model,
        tokenizer,
        parent,  # type: ignore[arg-type]
        int(about.get("max_position_embeddings") or CONTEXT),
        lambda mesh: load(files, family, model, mesh),
        chat_template=chat.of_huggingface(folder),
    )


def model_alone(folder: epath.Path) -> ml_collections.ConfigDict:
    """The section `model` of a config for a folder that may hold nothing but config.json, and the index of tensors
    that lie elsewhere; raises WeightsError where they don't go together."""
    family, model = model_of(read_config(folder), folder / CONFIG)
    if (folder / INDEX).exists():
        require_names({*_weight_map(folder / INDEX)}, family, model)
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
        (partial / chat.FILE).write_text(weights.chat_template)
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
