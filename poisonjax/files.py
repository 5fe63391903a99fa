"""Files and folders on disks and in object stores (gs://), written so that a kill at any instant leaves each whole."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath


def parse_json(data: bytes) -> Any:
    """The value of one JSON text in UTF-8, with one meaning: raises ValueError, also for a key that stands twice or a
    byte order mark."""
    return json.loads(data.decode(), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return made


def is_object(path: epath.PathLike) -> bool:
    """Whether the path is an address in an object store: no file can be appended to there, no folder renamed."""
    return "://" in os.fspath(path)


def resolve(path: epath.PathLike) -> epath.Path:
    """The path made absolute; addresses are so already."""
    return epath.Path(path) if is_object(path) else epath.Path(path).resolve()


def kvstore_spec(folder: epath.Path) -> str | dict[str, str]:
    """The folder as tensorstore names it."""
    # Local paths may hold characters that mean something in a URL.
    return f"{folder}/" if is_object(folder) else {"driver": "file", "path": f"{folder.resolve()}/"}


def write_whole(path: epath.Path, content: str | bytes, suffix: str = "partial") -> None:
    """Writes the file whole or not at all; several who write it at once need a suffix each. One that holds the content
    already isn't touched."""
    data = content.encode() if isinstance(content, str) else content
    if is_object(path):  # appears when it is complete
        path.write_bytes(data)
        return
    if path.is_file() and path.stat().length == len(data) and path.read_bytes() == data:
        return
    partial = path.with_name(f"{path.name}.{suffix}")
    partial.write_bytes(data)
    partial.replace(path)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another name to write a local file under, which becomes `path` when it is complete."""
    partial = path.with_name(f"partial.{os.urandom(4).hex()}.{path.name}")  # libraries look at a name's end
    yield partial
    partial.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value as JSON for people's eyes too, whole or not at all."""
    write_whole(epath.Path(path), json.dumps(value, indent=2) + "\n")


def write_lines(path: epath.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of one JSON object a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def sha256_of(path: epath.Path) -> str:
    """Of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in the folder and its sub-folders."""
    for path in folder.iterdir():
        yield from files_below(path) if path.is_dir() else [path]


def move_folder(source: epath.Path, target: epath.Path, last: str) -> None:
    """Gives a finished folder its name, unless another process was faster: both hold the same.

    In an object store the files are copied one by one, the one called `last` at the end: who finds it finds all.
    """
    if is_object(source):
        for path in sorted(files_below(source), key=lambda path: path.name == last):
            path.copy(target / path.relative_to(source), overwrite=True)
        source.rmtree()
        return
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(source)
