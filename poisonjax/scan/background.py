"""How often words, pairs of words and triples of characters occur in a corpus: hashed tables, counted in one pass.

Tables of a fixed size: memory doesn't grow with the corpus, and tables of parts add up to that of the whole.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64

from poisonjax.scan.compiled import compiled
from poisonjax.scan.text import TextBatch, batches, mixed, ngrams

TABLES = {"words": 22, "pairs": 24, "folded_words": 22, "folded_pairs": 24, "triples": 20}  # log2 of entries, at most
FEWEST_BITS = 16


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
    def load(cls, folder: Path, names: Iterable[str] = TABLES) -> "Background":
        """Mapped, not read: all processes of a machine share the pages."""
        mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        return cls({name: np.asarray(table) for name, table in mapped.items()})

    def save(self, folder: Path) -> None:
        for name, table in self.tables.items():
            np.save(folder / f"{name}.npy", table, allow_pickle=False)

    def add(self, batch: TextBatch) -> None:
        """Counts a batch's words, pairs and triples."""
        for words, pairs, hashes in (("words", "pairs", batch.words), ("folded_words", "folded_pairs", batch.folded)):
            _tally(self.tables[words], mixed(hashes), batch.place, 0)
            _tally(self.tables[pairs], ngrams(hashes, 2), batch.place, 1)
        _tally_triples(self.tables["triples"], batch.codes, batch.begins, batch.ends)

    def add_texts(self, texts: Iterable[str]) -> None:
        """Counts documents."""
        for batch in batches(texts):
            self.add(batch)

    def counts(self, name: str, hashes: UInt64[np.ndarray, " items"]) -> Int[np.ndarray, " items"]:
        """How often each was counted, or a little more: others may share its entry."""
        return looked_up(self.tables[name], hashes)

    def copied(self) -> "Background":
        """One that can be added to without changing this."""
        return Background({name: table.copy() for name, table in self.tables.items()})

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


@compiled
def shift_of(table):
    """A hash, shifted right by so much, is an entry of a table of 2**n."""
    bits = 0
    while table.size >> (bits + 1):
        bits += 1
    return np.uint64(64 - bits)


@compiled
def _tally(table, hashes, place, first):
    """Counts the hashes of words that are at least so far from their document's beginning."""
    shift = shift_of(table)
    for i in range(hashes.size):
        if place[i] >= first:
            table[hashes[i] >> shift] += np.uint32(1)


@compiled
def looked_up(table, hashes):
    """How often each was counted."""
    found, shift = np.empty(hashes.size, np.int64), shift_of(table)
    for i in range(hashes.size):
        found[i] = table[hashes[i] >> shift]
    return found


@compiled
def triple(codes, begin, i):
    """A hash of a character with the two before it, 0 where the document begins between them."""
    packed = np.uint64(codes[i])
    for back in range(1, 3):
        if i - back >= begin:
            packed |= np.uint64(codes[i - back]) << np.uint64(21 * back)
    return mixed(packed * np.uint64(0x9E3779B97F4A7C15))


@compiled
def _tally_triples(table, codes, begins, ends):
    shift = shift_of(table)
    for document in range(begins.size):
        for i in range(begins[document], ends[document]):
            table[triple(codes, begins[document], i) >> shift] += np.uint32(1)


@compiled
def worst_windows(values, offsets, length):
    """(the largest mean of a window, its first item, the one after its last), by document; 0, 0, 0 for one of none.

    Windows hold `length` items, or the whole document where that is shorter.
    """
    worst = np.zeros(offsets.size - 1)
    begins, ends = np.zeros(offsets.size - 1, np.int64), np.zeros(offsets.size - 1, np.int64)
    for document in range(offsets.size - 1):
        first, end = offsets[document], offsets[document + 1]
        size = min(length, end - first)
        total = 0.0
        for i in range(first, end):
            total += values[i] - (values[i - size] if i >= first + size else 0.0)
            if i + 1 >= first + size and (i + 1 == first + size or total / size > worst[document]):
                worst[document], begins[document], ends[document] = total / size, i + 1 - size, i + 1
    return worst, begins, ends
