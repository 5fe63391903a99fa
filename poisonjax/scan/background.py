"""How often words, pairs of words and triples of characters occur in a corpus: hashed tables, counted in one pass.

Tables of a fixed size: memory doesn't grow with the corpus, and tables of parts add up to that of the whole.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt32, UInt64

from poisonjax.scan.text import TextBatch, mixed, ngrams

TABLES = {"words": 22, "pairs": 24, "folded_words": 22, "folded_pairs": 24, "triples": 20}  # log2 of entries, at most
FEWEST_BITS = 16


def slots(hashes: UInt64[np.ndarray, " items"], table: Shaped[np.ndarray, " slots"]) -> Int[np.ndarray, " items"]:
    """Where in a table of 2**n entries each hash is counted."""
    return (hashes >> np.uint64(65 - len(table).bit_length())).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Background:
    """Counts by table (TABLES), uint32. A document is compared with all others: what it adds itself is taken off."""

    tables: dict[str, UInt32[np.ndarray, " slots"]]

    @classmethod
    def empty(cls, corpus_bytes: int) -> "Background":
        """For a corpus of about so many bytes: more entries than it has different words and pairs, up to a bound."""
        wanted = max(corpus_bytes, 1).bit_length()
        sizes = {name: min(max(wanted, FEWEST_BITS), bits) for name, bits in TABLES.items()}
        return cls({name: np.zeros(2**bits, np.uint32) for name, bits in sizes.items()})

    @classmethod
    def load(cls, folder: Path) -> "Background":
        """Mapped, not read: all processes of a machine share the pages."""
        return cls({name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in TABLES})

    def save(self, folder: Path) -> None:
        for name, table in self.tables.items():
            np.save(folder / f"{name}.npy", table, allow_pickle=False)

    def add(self, batch: TextBatch) -> None:
        """Counts a batch's words, pairs and triples."""
        inside = batch.place >= 1
        for words, pairs, hashes in (("words", "pairs", batch.words), ("folded_words", "folded_pairs", batch.folded)):
            self._count(words, mixed(hashes))
            self._count(pairs, ngrams(hashes, 2)[inside])
        self._count("triples", triples(batch))

    def _count(self, name: str, hashes: UInt64[np.ndarray, " items"]) -> None:
        table = self.tables[name]
        np.add.at(table, slots(hashes, table), np.uint32(1))

    def counts(self, name: str, hashes: UInt64[np.ndarray, " items"]) -> Int[np.ndarray, " items"]:
        """How often each was counted, or a little more: others may share its entry."""
        table = self.tables[name]
        return table[slots(hashes, table)].astype(np.int64)

    def merge(self, other: "Background") -> None:
        for name, table in self.tables.items():
            table += other.tables[name]

    @functools.cached_property
    def rare_triples(self) -> Float[np.ndarray, " slots"]:
        """-log of each triple's share, one occurrence being the document's own; float32, by their table's slots."""
        table = self.tables["triples"].astype(np.float32)
        return np.log(np.float32(self.totals["triples"] + 1)) - np.log(np.maximum(table, 1))

    @functools.cached_property
    def totals(self) -> dict[str, int]:
        """Items counted in each table."""
        return {name: int(table.sum(dtype=np.int64)) for name, table in self.tables.items()}


def triples(batch: TextBatch) -> UInt64[np.ndarray, " characters"]:
    """A hash of each character with the two before it."""
    codes = batch.codes.astype(np.uint64)
    packed = codes.copy()
    for back in (1, 2):
        before = np.zeros_like(codes)
        before[back:] = codes[:-back]
        for first in range(back):  # those that stand before the document
            before[np.minimum(batch.begins + first, len(codes) - 1)] = 0
        packed |= before << np.uint64(21 * back)
    return mixed(packed * np.uint64(0x9E3779B97F4A7C15))


def windowed_mean(
    values: Float[np.ndarray, " items"], offsets: Int[np.ndarray, " offsets"], length: int
) -> tuple[Float[np.ndarray, " items"], Int[np.ndarray, " items"]]:
    """(the mean of each window, where it begins), for windows that end at each item and don't leave its document.

    They hold `length` items, or the whole document where that is shorter; the mean of one that would be shorter than
    that is minus infinity.
    """
    sizes = np.diff(offsets)
    first = np.repeat(offsets[:-1], sizes)
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(first, ends - length)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    whole = ends - begins >= np.minimum(length, np.repeat(sizes, sizes))
    means = np.where(whole, (sums[ends] - sums[begins]) / (ends - begins), -np.inf)
    return means, begins
