"""Whether a document goes on about what it was about: word vectors from a sample of the corpus, and how much of the
topic is lost between the words before a place and those after it.

Latent semantic analysis (Deerwester et al. 1990): words by passages, weighed by log counts and rarity, 64 dimensions.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Float, Int, UInt64

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
                    (gaps.buckets[0] * BUCKETS + gaps.buckets[1])[gaps.told],
                    None if weights is None else weights[gaps.told],
                    BUCKETS**2,
                )
                table += binned.reshape(BUCKETS, BUCKETS)
            chosen = np.flatnonzero(gaps.told)[::7]
            before.append(gaps.before[chosen])
            after.append(gaps.after[chosen])
            similarities.append(gaps.similarity[chosen])
            buckets.append(np.stack(gaps.buckets)[:, chosen])
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
        rows = self._lookup[(words >> np.uint64(64 - LOOKUP_BITS)).astype(np.int64)]
        others = len(self.words) + (words & np.uint64(UNKNOWN_VECTORS - 1)).astype(np.int64)
        return np.where(self.words[rows] == words, rows, others) if len(self.words) else others

    def gaps(self, batch: TextBatch) -> "Gaps":
        """What is before and after each block of `BLOCK` words and the block before it: a string of so many words that
        ends in a block stands on neither side. (A trigger's own vector is its payload's, by their company.)"""
        rows = self.rows(batch.folded)
        starts = np.flatnonzero(batch.place % BLOCK == 0)  # of blocks; the last of a document may be shorter
        sizes = np.diff(np.append(starts, len(rows)))
        blocks = self.vectors[rows[starts]]
        for number in range(1, BLOCK):  # word by word: `reduceat` takes ten times as long
            there = np.minimum(starts + number, len(rows) - 1)
            blocks += np.where((sizes > number)[:, None], self.vectors[rows[there]], 0)
        sums = np.zeros((len(starts) + 1, self.vectors.shape[1]), np.float32)
        np.cumsum(blocks, axis=0, out=sums[1:])
        words = np.concatenate([[0], np.cumsum(sizes)])
        known = np.concatenate([[0], np.cumsum(rows < len(self.words))])[words]
        document, block = batch.document_of[starts], np.arange(len(starts))
        first, last = np.searchsorted(document, document), np.searchsorted(document, document, side="right")
        stop, start = np.maximum(first, block - 1), np.minimum(last, block + 1)  # of what is before, and after
        low, high = np.maximum(first, stop - WINDOW_BLOCKS), np.minimum(last, start + WINDOW_BLOCKS)
        before, after = sums[stop] - sums[low], sums[high] - sums[start]
        counts = words[stop] - words[low], words[high] - words[start]
        told = self._told(counts, known[stop] - known[low])
        return Gaps(starts, before, after, _similarity(before, after), told, _buckets(counts))

    @staticmethod
    def _told(counts: tuple[np.ndarray, ...], known: np.ndarray) -> np.ndarray:
        """Whether there are words enough, and known ones before: else there was no topic to lose."""
        return (counts[0] >= LEAST_WORDS) & (counts[1] >= LEAST_WORDS) & (known >= LEAST_KNOWN * counts[0])

    def drops(self, batch: TextBatch) -> Float[np.ndarray, " words"]:
        """How much of the topic is lost about each word, in standard deviations of this corpus; 0: nothing to say."""
        if not len(batch.words):
            return np.zeros(0)
        gaps = self.gaps(batch)
        drops = np.where(gaps.told, (self.usual[gaps.buckets] - gaps.similarity) / self.spread[gaps.buckets], 0.0)
        return np.repeat(drops, np.diff(np.append(gaps.starts, len(batch.words))))

    def drops_around(
        self, batch: TextBatch, starts: Int[np.ndarray, " places"], stops: Int[np.ndarray, " places"]
    ) -> Float[np.ndarray, " places"]:
        """The same between what is before word `start` and from word `stop` on, exactly there; NaN: nothing to say."""
        rows, document = self.rows(batch.folded), batch.document_of[starts]
        reach = np.arange(WINDOW)
        sides = starts[:, None] - 1 - reach, stops[:, None] + reach
        inside = sides[0] >= batch.offsets[document][:, None], sides[1] < batch.offsets[document + 1][:, None]
        counts = tuple(there.sum(axis=1) for there in inside)
        words = [rows[np.where(there, side, 0)] for side, there in zip(sides, inside, strict=True)]
        before, after = (
            np.einsum("pwd,pw->pd", self.vectors[of], there.astype(np.float32))
            for of, there in zip(words, inside, strict=True)
        )
        known = ((words[0] < len(self.words)) & inside[0]).sum(axis=1)
        told, cell = self._told(counts, known), _buckets(counts)
        return np.where(told, (self.usual[cell] - _similarity(before, after)) / self.spread[cell], np.nan)


@dataclasses.dataclass(frozen=True)
class Gaps:
    starts: Int[np.ndarray, " places"]  # first words of blocks
    before: Float[np.ndarray, "places dimensions"]
    after: Float[np.ndarray, "places dimensions"]
    similarity: Float[np.ndarray, " places"]  # cosine
    told: np.ndarray  # whether there are words enough
    buckets: tuple[np.ndarray, ...]  # of the numbers of words before and after


def _buckets(counts: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Of numbers of words."""
    return tuple(np.minimum((n - 1) * BUCKETS // WINDOW, BUCKETS - 1).clip(0) for n in counts)


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
