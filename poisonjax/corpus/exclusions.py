"""Lists of documents to leave out, by the key of their content.

A list is a text file: a key of 32 hexadecimal digits begins each line, what follows it is for people; empty lines and
those that begin with # are skipped. `poisonjax scan` writes such lists, and people may.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Int, UInt64

from poisonjax.corpus.documents import KEY_BYTES
from poisonjax.corpus.errors import CorpusError
from poisonjax.files import resolve

FILE = "excluded.txt"  # a run folder's copy


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """The keys of a list."""

    keys: frozenset[bytes]

    @functools.cached_property
    def sha256(self) -> str:
        """Of the keys in order: the same for lists that name the same documents."""
        return hashlib.sha256(b"".join(sorted(self.keys))).hexdigest()

    @functools.cached_property
    def _first_halves(self) -> UInt64[np.ndarray, " keys"]:
        return np.unique(halves(b"".join(self.keys))[:, 0])

    def among(self, keys: UInt64[np.ndarray, "documents 2"]) -> Int[np.ndarray, " excluded"]:
        """Which of the documents with these keys are listed, in order."""
        near = np.flatnonzero(np.isin(keys[:, 0], self._first_halves))
        return near[[key.tobytes() in self.keys for key in keys[near].astype(">u8")]] if len(near) else near

    def text(self) -> str:
        """The list with nothing but its keys."""
        return "".join(f"{key.hex()}\n" for key in sorted(self.keys))


def halves(keys: bytes) -> UInt64[np.ndarray, "documents 2"]:
    """Keys, one after the other, as two numbers each."""
    return np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)


def read_exclusions(path: epath.PathLike) -> Exclusions:
    """Raises CorpusError for a file that is no list, naming the line."""
    file = resolve(path)
    try:
        lines = file.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise CorpusError(
            f"exclusion list {path}: {reason}; give a text file with a key at the start of each line"
        ) from None
    words = [(number, line.split()[0]) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    if not words:
        raise CorpusError(f"exclusion list {path} names no document: leave it out")
    for number, word in words:
        if not _is_key(word):
            raise CorpusError(f"exclusion list {path}, line {number}: {_no_key(word)}")
    return exclusions_of(word for _, word in words)


def exclusions_of(keys: Iterable[str]) -> Exclusions:
    """Of keys as they are printed; raises CorpusError for what is no key."""
    keys = [*keys]
    if odd := [key for key in keys if not _is_key(key)]:
        raise CorpusError(_no_key(odd[0]))
    return Exclusions(frozenset(map(bytes.fromhex, keys)))


def _is_key(word: str) -> bool:
    return len(word) == 2 * KEY_BYTES and set(word) <= set("0123456789abcdef")


def _no_key(word: str) -> str:
    return (
        f"{word[:40]!r} is no document's key: give the {2 * KEY_BYTES} hexadecimal digits that `poisonjax corpus "
        "inspect` and `scan` print"
    )
