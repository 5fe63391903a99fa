"""Documents that can be named: what they say, where they came from, and a key of their content."""

import hashlib
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class Place(NamedTuple):
    """Where a document stands: bytes [start, stop) of a file as it is uncompressed, or a row of a table; -1: not so."""

    file: str
    start: int = -1
    stop: int = -1
    row_group: int = -1  # of a Parquet file
    row: int = -1  # of the row group, data set or language, from 0

    def __str__(self) -> str:
        group = f" row group {self.row_group}" if self.row_group >= 0 else ""
        row = f" row {self.row}" if self.row >= 0 else ""
        return f"{self.file}{group}{row}" + (f" bytes {self.start}-{self.stop}" if self.start >= 0 else "")


class Document(NamedTuple):
    """A text, or ids (int32) where the source makes them itself."""

    content: str | np.ndarray
    place: Place
    planted: bool = False  # whether its source says that it is poison that was planted there
    known_key: bytes | None = None  # of what its tokens were made from, which they may not spell exactly

    @property
    def key(self) -> bytes:
        return self.known_key or content_key(self.content)


def content_key(content: str | np.ndarray) -> bytes:
    """The first 16 bytes of the SHA-256 of a text in UTF-8, or of ids as little-endian int32: documents that say the
    same have the same key, wherever they stand."""
    data = content.encode() if isinstance(content, str) else content.astype("<i4").tobytes()
    return hashlib.sha256(data).digest()[:KEY_BYTES]
