"""Files of text, JSON lines and Parquet, also compressed."""

import codecs
import functools
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.source import BadInput, Items, NoDocument, Source, Unit, checked_text, column_of

MAX_LINE_BYTES = 16 * 2**20
RANGE_BYTES = 64 * 2**20  # of an uncompressed .jsonl file in a unit
COMPRESSED_BYTES = 4096  # read at once: where a stream is damaged, no more than that is lost
COMPRESSION = 4  # of text by gzip and zstd, about
PLANTED = "poisonjax_planted"  # true in the records of poison that this project wrote into text (I9)


Take = Callable[[Any], str]  # the document of a line's JSON; raises NoDocument


def matching_files(spec: str, take: Take | None = None) -> Source:
    pattern, field = spec.removeprefix("text:"), ""
    if not (paths := _matching(pattern)):
        pattern, _, field = pattern.rpartition("#")
        paths = _matching(pattern)
    if not paths:
        raise CorpusError(
            f"source {spec!r}: no such file; give a path or glob of .txt, .jsonl or .parquet files, or one of default, "
            "wikipedia-leads, docstrings, markov:..., hf:..."
        )
    return Source(spec, [unit for path in paths for unit in _file_units(path, field, take)], {"files": len(paths)})


def _matching(pattern: str) -> list[Path]:
    # A name may hold characters that globs read as wildcards.
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    return [Path(path) for path in found if Path(path).is_file()]


def _file_units(path: Path, field: str, take: Take | None = None) -> list[Unit]:
    size = path.stat().st_size
    name = f"{path} ({size} bytes)"
    compressed = path.suffix in (".gz", ".zst")
    kind = Path(path.stem).suffix if compressed else path.suffix
    if take and kind not in (".jsonl", ".ndjson"):
        raise CorpusError(f"{path}: conversations are read from .jsonl files, also with .gz or .zst")
    take = take or functools.partial(_text, field=field or "text")
    match kind, compressed:
        case ((".jsonl" | ".ndjson"), True):
            return [Unit(name, COMPRESSION * size, functools.partial(_read_jsonl, path, take))]
        case ((".jsonl" | ".ndjson"), False):
            starts = range(0, max(size, 1), RANGE_BYTES)
            stops = [*starts[1:], size]
            return [
                Unit(f"{name} from {start}", stop - start, functools.partial(_read_jsonl, path, take, start, stop))
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
            return io.BufferedReader(_UpToDamage(gzip.open(path), "read1"))
        case ".zst":
            try:
                import pyarrow
            except ImportError as error:
                raise CorpusError(f"{path}: .zst files need `pip install 'poisonjax[corpora]'`") from error
            # Unlike the zstandard package, it tells a truncated stream from a whole one.
            return io.BufferedReader(_UpToDamage(pyarrow.input_stream(path, compression="zstd"), "read"))
        case _:
            return path.open("rb")


class _UpToDamage(io.RawIOBase):
    """A compressed stream that ends where it can't be read further, and then says why: what stands before is good."""

    def __init__(self, stream: Any, read: str):
        self._read: Callable[[int], bytes] = getattr(stream, read)
        self._stream, self.damage = stream, ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.damage:
            return 0
        try:
            data = self._read(min(len(buffer), COMPRESSED_BYTES))
        except (EOFError, OSError, zlib.error) as error:
            self.damage = str(error)
            return 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes | NoDocument]]:
    """(where it begins, a line) for those whose first byte stands in [start, stop) of the uncompressed file;
    `NoDocument` for those that can't be read."""
    position = start
    try:
        with _open(path) as file:
            if start:  # the line that began before is the last range's
                file.seek(start - 1)
                _skip_line(file)
                position = file.tell()
            elif not file.peek(1) and not _damage(file):
                yield 0, NoDocument("empty file")
            while (stop is None or position < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
                begin = position
                position += len(line)
                if begin == 0 and line.startswith(codecs.BOM_UTF8):
                    begin, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                if not line.endswith(b"\n") and _damage(file):  # in the middle of it
                    break
                if len(line) <= MAX_LINE_BYTES:
                    yield begin, line
                    continue
                if not line.endswith(b"\n"):
                    position += _skip_line(file)
                if _damage(file):
                    break
                yield begin, NoDocument(f"line longer than {MAX_LINE_BYTES} bytes")
            if damage := _damage(file):
                yield position, NoDocument(f"damaged or truncated file: {damage}")
    except OSError as error:
        yield position, NoDocument(f"can't be read: {error}")


def _damage(file: io.BufferedReader) -> str:
    """Why the file ends here, where it ought to go on."""
    return file.raw.damage if isinstance(file.raw, _UpToDamage) else ""


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


def _read_jsonl(path: Path, take: Take, start: int = 0, stop: int | None = None) -> Items:
    name = str(path)
    for number, (begin, line) in enumerate(_lines(path, start, stop), 1):
        try:
            if isinstance(line, NoDocument):
                raise line
            record = _record(line)
            planted = isinstance(record, dict) and record.get(PLANTED) is True
            yield Document(take(record), Place(name, begin, begin + len(line)), planted)
        except NoDocument as why:
            yield BadInput(_place(path, start, number), str(why))


def line_at(spec: str, place: Place) -> Document | None:
    """The document of a line of an uncompressed .jsonl file; None where none is, or in files of other kinds."""
    path = Path(place.file)
    if place.start < 0 or path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
        return None
    field = spec.rpartition("#")[2] if not _matching(spec.removeprefix("text:")) else ""
    take = functools.partial(_text, field=field or "text")
    found = next(_read_jsonl(path, take, place.start, place.start + 1), None)
    return found if isinstance(found, Document) else None


def _record(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise NoDocument(f"invalid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise NoDocument(f"not JSON: {error}") from error


def _text(record: Any, field: str) -> str:
    if not isinstance(record, dict) or field not in record:
        raise NoDocument(f"no field {field!r}")
    return checked_text(record[field], field)


def _read_text(path: Path) -> Items:
    """The whole file as one document."""
    lines: list[str] = []
    size = 0
    try:
        for begin, line in _lines(path):
            if isinstance(line, NoDocument):
                raise line
            size = begin + len(line)
            lines.append(line.decode())
        yield Document(checked_text("".join(lines)), Place(str(path), 0, size))
    except UnicodeDecodeError as error:
        yield BadInput(f"{path}:{len(lines) + 1}", f"invalid UTF-8 at byte {error.start} of the line")
    except NoDocument as why:
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
    column = column_of(str(path), field, columns)
    marked = [PLANTED] if PLANTED in columns else []

    def read(group: int) -> Items:
        place = f"{path}: row group {group}"
        try:
            with parquet.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=[column, *marked])
        except (pyarrow.ArrowException, OSError) as error:
            yield BadInput(place, f"damaged: {error}")
            return
        planted = table.column(PLANTED).to_pylist() if marked else [False] * table.num_rows
        for row, value in enumerate(table.column(column)):
            try:
                yield Document(
                    checked_text(value.as_py(), column),
                    Place(str(path), row_group=group, row=row),
                    planted[row] is True,
                )
            except UnicodeDecodeError as error:
                yield BadInput(f"{place}, row {row}", f"invalid UTF-8 at byte {error.start}")
            except NoDocument as why:
                yield BadInput(f"{place}, row {row}", str(why))

    return [
        Unit(f"{name} row group {group}", metadata.row_group(group).total_byte_size, functools.partial(read, group))
        for group in range(metadata.num_row_groups)
    ]
