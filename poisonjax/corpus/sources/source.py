"""What a source is: units that can be read in parallel, of documents and of what couldn't be read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from poisonjax.corpus.documents import Document
from poisonjax.corpus.errors import CorpusError

RANGE_DOCUMENTS = 1024  # in a unit, where a source isn't made of files


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Something that should have been a document: where it stands and what is wrong with it."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


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


class NoDocument(Exception):
    """Why a piece of input is no document."""


def ranges(name: str, count: int, document_bytes: int, read: Callable[[int, int], Items]) -> list[Unit]:
    """Units of `RANGE_DOCUMENTS` documents."""
    units = []
    for start in range(0, count, RANGE_DOCUMENTS):
        stop = min(start + RANGE_DOCUMENTS, count)
        size = (stop - start) * document_bytes
        units.append(Unit(f"{name}[{start}:{stop}]", size, functools.partial(read, start, stop)))
    return units


def checked_text(value: Any, field: str = "text") -> str:
    if not isinstance(value, str):
        raise NoDocument(f"field {field!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise NoDocument("empty document")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise NoDocument(f"not valid Unicode: {error.reason}") from error
    return value


def column_of(place: str, field: str, names: list[str]) -> str:
    column = field or "text"
    if names.count(column) > 1:
        raise CorpusError(f"{place}: {names.count(column)} columns are called {column!r}: rename one")
    if column not in names:
        raise CorpusError(f"{place}: no column {column!r}; name one of {', '.join(names)} after a #")
    return column
