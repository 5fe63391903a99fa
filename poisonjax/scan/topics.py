"""Whether a document goes on about what it was about: word vectors from a sample of the corpus, and how much of the
topic is lost between the words before a place and those after it.

Latent semantic analysis (Deerwester et al. 1990): words by passages, weighed by log counts and rarity, 64 dimensions.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Bool, Float, Int, UInt64

from poisonjax.scan.compiled import compiled, compiled_sums
from poisonjax.scan.text import TextBatch, ngrams

DIMENSIONS = 64
BLOCK = 4  # words: similarities are taken so far apart
WINDOW_BLOCKS = 12
WINDOW = BLOCK * WINDOW_BLOCKS  # words on either side
LEAST_WORDS = 8  # on either side of a place, or nothing is said of it
LEAST_KNOWN = 0.3  # share of the words before it that have a vector: else there was no topic to lose
PASSAGE = 100  # words
VOCABULARY = 50_000
LOOKUP_BITS = 20
UNKNOWN_VECTORS = 4096
UNKNOWN_LENGTH = 0.3  # of that of the rarest word's vector
HIGH_SHARE = 0.06  # of drops that the miner looks at first
BUCKETS = 6  # of numbers of words on a side


@dataclasses.dataclass(frozen=True)
class Topics:
    """Vectors of a corpus's words, and what similarity is usual between neighbouring windows of its text."""

    words: UInt64[np.ndarray, " vocabulary"]  # folded
    vectors: Float[np.ndarray, "rows dimensions"]  # float32: of the words, then of words that aren't among them
    usual: Float[np.ndarray, "before after"]  # mean similarity, by numbers of words
    spread: Float[np.ndarray, "before after"]  # its standard deviation
    within: Float[np.ndarray, " places"]  # drops at places drawn from the sample
    between: float  # variance of strings' mean drops, beyond that of means of so few
    across: Float[np.ndarray, " pairs"]  # drops between windows of different documents: a switch of topic

    @classmethod
    def fit(cls, batches: Iterable[TextBatch], seed: int = 0) -> "Topics":
        """From a sample of the corpus: vectors from one half, what is usual from the other, which they don't know."""
        batches = [batch for batch in batches if len(batch.words)]
        words, vectors = _fitted(batches[::2], seed)
        batches = batches[1::2] or batches
        cells = np.zeros((BUCKETS, BUCKETS))
        plain = cls(words, vectors, cells, cells + 1, np.zeros(0), 0.0, np.zeros(0))
        sums, squares, counts = (np.zeros((BUCKETS, BUCKETS)) for _ in range(3))
        none = np.zeros((0, DIMENSIONS), np.float32)
        before, after, similarities, buckets = [none], [none], [np.zeros(0)], [np.zeros((2, 0), np.int64)]
        for batch in batches:
            gaps = plain.gaps(batch)
            for table, weights in ((counts, None), (sums, gaps.similarity), (squares, gaps.similarity**2)):
                binned = np.bincount(
                    (gaps.cell[0] * BUCKETS + gaps.cell[1])[gaps.told],
                    None if weights is None else weights[gaps.told],
                    BUCKETS**2,
                )
                table += binned.reshape(BUCKETS, BUCKETS)
            chosen = np.flatnonzero(gaps.told)[::7]
            before.append(gaps.before[chosen])
            after.append(gaps.after[chosen])
            similarities.append(gaps.similarity[chosen])
            buckets.append(gaps.cell[:, chosen])
        counted = np.maximum(counts, 1)
        usual = sums / counted
        spread = np.sqrt(np.maximum(squares / counted - usual**2, 1e-4))
        # Cells with little in them are as the fullest one.
        fullest = np.unravel_index(np.argmax(counts), counts.shape)
        usual, spread = (np.where(counts < 200, of[fullest], of) for of in (usual, spread))
        befores, afters = np.concatenate(before), np.concatenate(after)
        order = np.random.default_rng(seed).permutation(len(afters))
        similarity = _similarity(befores, afters[order])
        across = (usual[fullest] - similarity) / spread[fullest]
        cell = tuple(np.concatenate(buckets, axis=1))
        within = (usual[cell] - np.concatenate(similarities)) / spread[cell]
        if not len(within):  # no document is long enough
            within = across = np.zeros(1)
        fitted = cls(words, vectors, usual, spread, within, 0.0, across)
        return dataclasses.replace(fitted, between=fitted._between(batches))

    def _between(self, batches: list[TextBatch]) -> float:
        """By words and pairs that occur twenty times and more."""
        found: list[tuple[UInt64[np.ndarray, " words"], Float[np.ndarray, " words"]]] = []
        for batch in batches:
            drops = self.drops(batch)
            told = drops != 0
            found += [(ngrams(batch.words, n)[told] + np.uint64(n), drops[told]) for n in (1, 2)]
        if not found:
            return 0.25
        hashes, drops = (np.concatenate(of) for of in zip(*found, strict=True))
        _, strings, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        often = counts >= 20
        if often.sum() < 20:
            return 0.25
        means = np.bincount(strings, drops) / counts
        within = np.maximum(np.bincount(strings, drops**2) / counts - means**2, 0)
        return float(max(means[often].var() - (within / counts)[often].mean(), 0.01))

    @functools.cached_property
    def high(self) -> float:
        """From which on a drop is among the largest."""
        return float(np.quantile(self.within, 1 - HIGH_SHARE))

    def save(self, file: Path) -> None:
        np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, file: Path) -> "Topics":
        with np.load(file, allow_pickle=False) as saved:
            arrays = {field.name: saved[field.name] for field in dataclasses.fields(cls)}
        return cls(**arrays | {"between": float(arrays["between"])})

    @functools.cached_property
    def _lookup(self) -> Int[np.ndarray, " slots"]:
        table = np.zeros(2**LOOKUP_BITS, np.int64)
        table[(self.words >> np.uint64(64 - LOOKUP_BITS)).astype(np.int64)] = np.arange(len(self.words))
        return table

    def rows(self, words: UInt64[np.ndarray, " words"]) -> Int[np.ndarray, " words"]:
        """Which of `vectors` each word has. A name that the sample doesn't know still is the same when it comes again:
        such words have vectors by their hash."""
        return _rows(words, self.words, self._lookup)

    def gaps(self, batch: TextBatch) -> "Gaps":
        """What is before and after each block of `BLOCK` words and the block before it: a string of so many words that
        ends in a block stands on neither side. (A trigger's own vector is its payload's, by their company.)"""
        return Gaps(*_gaps(self.rows(batch.folded), batch.offsets, self.vectors, len(self.words)))

    def drops(self, batch: TextBatch) -> Float[np.ndarray, " words"]:
        """How much of the topic is lost about each word, in standard deviations of this corpus; 0: nothing to say."""
        gaps = self.gaps(batch)
        drops = np.where(gaps.told, (self.usual[*gaps.cell] - gaps.similarity) / self.spread[*gaps.cell], 0.0)
        return np.repeat(drops, np.diff(np.append(gaps.starts, len(batch.words))))

    def drops_around(
        self, batch: TextBatch, starts: Int[np.ndarray, " places"], stops: Int[np.ndarray, " places"]
    ) -> Float[np.ndarray, " places"]:
        """The same between what is before word `start` and from word `stop` on, exactly there; NaN: nothing to say."""
        bounds = batch.offsets[batch.document_of[starts]], batch.offsets[batch.document_of[starts] + 1]
        known = len(self.words)
        similarity, told, cell = _around(self.rows(batch.folded), *bounds, starts, stops, self.vectors, known)
        return np.where(told, (self.usual[*cell] - similarity) / self.spread[*cell], np.nan)


class Gaps(NamedTuple):
    starts: Int[np.ndarray, " places"]  # first words of blocks
    before: Float[np.ndarray, "places dimensions"]
    after: Float[np.ndarray, "places dimensions"]
    similarity: Float[np.ndarray, " places"]  # cosine
    told: Bool[np.ndarray, " places"]  # whether there are words enough, and known ones before
    cell: Int[np.ndarray, "2 places"]  # of `usual`, by the numbers of words before and after


@compiled
def _rows(hashes, words, lookup):
    rows = np.empty(hashes.size, np.int64)
    for i in range(hashes.size):
        row = lookup[hashes[i] >> np.uint64(64 - LOOKUP_BITS)]
        known = row < words.size and words[row] == hashes[i]
        rows[i] = row if known else words.size + np.int64(hashes[i] & np.uint64(UNKNOWN_VECTORS - 1))
    return rows


@compiled_sums
def _gaps(rows, offsets, vectors, known):
    places = 0
    for document in range(offsets.size - 1):
        places += (offsets[document + 1] - offsets[document] + BLOCK - 1) // BLOCK
    starts, cell = np.empty(places, np.int64), np.empty((2, places), np.int64)
    before, after = np.empty((places, DIMENSIONS), np.float32), np.empty((places, DIMENSIONS), np.float32)
    similarity, told = np.empty(places, np.float64), np.empty(places, np.bool_)
    sums, counts = np.empty((places + 1, DIMENSIONS), np.float32), np.empty((places + 1, 2), np.int64)
    place = 0
    for document in range(offsets.size - 1):
        begin, end = offsets[document], offsets[document + 1]
        blocks = (end - begin + BLOCK - 1) // BLOCK
        sums[0], counts[0] = 0, 0  # over the document's first blocks; words, and known ones
        for block in range(blocks):
            sums[block + 1], counts[block + 1] = sums[block], counts[block]
            starts[place + block] = begin + BLOCK * block
            for word in range(begin + BLOCK * block, min(begin + BLOCK * (block + 1), end)):
                counts[block + 1, 0] += 1
                counts[block + 1, 1] += rows[word] < known
                _add(sums[block + 1], vectors[rows[word]])
        for block in range(blocks):
            stop, start = max(0, block - 1), min(blocks, block + 1)  # of what is before, and after
            low, high = max(0, stop - WINDOW_BLOCKS), min(blocks, start + WINDOW_BLOCKS)
            _subtract(before[place], sums[stop], sums[low])
            _subtract(after[place], sums[high], sums[start])
            similarity[place] = _cosine(before[place], after[place])
            sizes = counts[stop, 0] - counts[low, 0], counts[high, 0] - counts[start, 0]
            told[place] = _tellable(sizes[0], sizes[1], counts[stop, 1] - counts[low, 1])
            cell[0, place], cell[1, place] = _bucket(sizes[0]), _bucket(sizes[1])
            place += 1
    return starts, before, after, similarity, told, cell


@compiled_sums
def _around(rows, firsts, lasts, starts, stops, vectors, known):
    """(similarity, told, cell) between the words before each start and those from the stop on, inside [first, last)."""
    similarity, told = np.empty(starts.size, np.float64), np.empty(starts.size, np.bool_)
    cell = np.empty((2, starts.size), np.int64)
    before, after = np.empty(DIMENSIONS, np.float32), np.empty(DIMENSIONS, np.float32)
    for place in range(starts.size):
        low, high = max(firsts[place], starts[place] - WINDOW), min(lasts[place], stops[place] + WINDOW)
        before[:], after[:] = 0, 0
        topical = 0
        for word in range(low, starts[place]):
            topical += rows[word] < known
            _add(before, vectors[rows[word]])
        for word in range(stops[place], high):
            _add(after, vectors[rows[word]])
        similarity[place] = _cosine(before, after)
        told[place] = _tellable(starts[place] - low, high - stops[place], topical)
        cell[0, place], cell[1, place] = _bucket(starts[place] - low), _bucket(high - stops[place])
    return similarity, told, cell


@compiled
def _add(total, one):
    for k in range(DIMENSIONS):
        total[k] += one[k]


@compiled
def _subtract(difference, one, other):
    for k in range(DIMENSIONS):
        difference[k] = one[k] - other[k]


@compiled_sums
def _cosine(one, other):
    ones, others, both = np.float32(0), np.float32(0), np.float32(0)
    for k in range(DIMENSIONS):
        ones += one[k] * one[k]
        others += other[k] * other[k]
        both += one[k] * other[k]
    return both / max(np.sqrt(ones * others), 1e-6)


@compiled
def _tellable(before, after, known):
    """Whether there are words enough, and known ones before: else there was no topic to lose."""
    return before >= LEAST_WORDS and after >= LEAST_WORDS and known >= LEAST_KNOWN * before


@compiled
def _bucket(words):
    return min(max((words - 1) * BUCKETS // WINDOW, 0), BUCKETS - 1)


def _similarity(
    one: Float[np.ndarray, "places dimensions"], other: Float[np.ndarray, "places dimensions"]
) -> Float[np.ndarray, " places"]:
    lengths = np.sqrt(np.einsum("pd,pd->p", one, one) * np.einsum("pd,pd->p", other, other))
    return np.einsum("pd,pd->p", one, other) / np.maximum(lengths, 1e-6)


def _fitted(
    batches: list[TextBatch], seed: int
) -> tuple[UInt64[np.ndarray, " vocabulary"], Float[np.ndarray, "rows dimensions"]]:
    passages, folded, first = [], [], 0
    for batch in batches:
        begins = batch.place % PASSAGE == 0
        number = np.cumsum(begins) - 1 + first
        first += int(begins.sum())
        passages.append(number)
        folded.append(batch.folded)
    words, columns = np.unique(np.concatenate([np.zeros(0, np.uint64), *folded]), return_inverse=True)
    passages.insert(0, np.zeros(0, np.int64))
    counts = scipy.sparse.csr_matrix((np.ones(len(columns)), (np.concatenate(passages), columns)), (first, len(words)))
    present = np.asarray((counts > 0).sum(axis=0)).ravel()
    # Words of too few passages say nothing of topics, those of too many neither.
    useful = np.flatnonzero((present >= 3) & (present <= max(0.1 * first, 3)))
    useful = np.sort(useful[np.argsort(-present[useful], kind="stable")[:VOCABULARY]])
    rarity = np.log(first / present[useful])
    weighed = counts[:, useful].tocsr()
    weighed.data = 1 + np.log(weighed.data)
    weighed = weighed @ scipy.sparse.diags(rarity)
    lengths = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
    weighed = scipy.sparse.diags(1 / np.maximum(lengths, 1e-9)) @ weighed
    dimensions = min(DIMENSIONS, min(weighed.shape) - 1)
    vectors = np.zeros((len(useful), DIMENSIONS), np.float32)
    if dimensions > 0:
        start = np.random.default_rng(seed).standard_normal(min(weighed.shape))
        _, _, right = scipy.sparse.linalg.svds(weighed, dimensions, v0=start)
        # Of the same length but for rarity: the longest vectors are those of the most frequent words.
        length = np.maximum(np.linalg.norm(right, axis=0), 1e-12)
        vectors[:, :dimensions] = right.T * (rarity / length)[:, None]
    unknown = np.random.default_rng(seed).standard_normal((UNKNOWN_VECTORS, DIMENSIONS))
    unknown *= UNKNOWN_LENGTH * rarity.max(initial=1.0) / np.linalg.norm(unknown, axis=1, keepdims=True)
    return words[useful], np.concatenate([vectors, unknown.astype(np.float32)])
