"""The language that each document is written in, so that thresholds are set among its like.

A library tells the languages of a sample (whatlang, 0.2 ms a document: too slow for all of a corpus); how often words
occur in each of them then tells those of all documents, by naive Bayes.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt64

from poisonjax.scan.compiled import compiled
from poisonjax.scan.text import IDEOGRAPH, LETTER, TABLE, TextBatch, character_tables, mixed

SAMPLE = 400  # characters from a document's beginning, that a library tells its language by
WORDS = 60  # that tell a document's language
LEARNED = 1000  # words of a document of the sample
UNKNOWN = "und"  # ISO 639-3: undetermined
ENDING = 3  # letters
FEWEST = 20  # documents of a language in the sample
EVIDENCE = 3.0  # nats by which a language must lead one that nothing is known of


@dataclasses.dataclass(frozen=True)
class Languages:
    """ISO 639-3 codes, and how much each (hashed, folded) word speaks for each of them."""

    codes: np.ndarray  # the first is `und`
    words: UInt64[np.ndarray, " known"]  # and endings of words; ascending
    evidence: Float[np.ndarray, "known_and_unknown languages"]  # float32, nats; the last row is for every other word

    @classmethod
    def fit(cls, sample: Iterable[TextBatch]) -> "Languages":
        spoken: dict[str, list[np.ndarray]] = {}
        for batch in sample:
            for document, (begin, end) in enumerate(zip(batch.begins, batch.ends, strict=True)):
                text = batch.codes[begin : min(end, begin + SAMPLE)]
                code = identified(text.tobytes().decode("utf-32-le", "replace"))
                first, last = batch.offsets[document : document + 2]
                which = lettered(batch, np.arange(first, min(last, first + LEARNED)))
                spoken.setdefault(code, []).extend((batch.folded[which], _endings(batch, which)))
        codes = sorted(code for code, parts in spoken.items() if len(parts) >= 2 * FEWEST and code != UNKNOWN)
        of = {code: np.concatenate(parts) for code, parts in spoken.items()}
        words = np.unique(np.concatenate([np.zeros(0, np.uint64), *of.values()]))
        counts = {code: np.bincount(np.searchsorted(words, said), minlength=len(words)) for code, said in of.items()}
        # Of all languages alike: what most documents are written in would else be told by few words, and those late.
        usual = np.mean([(count + 0.5) / (count + 0.5).sum() for count in counts.values()] or [np.ones(1)], axis=0)
        columns = [np.zeros(len(words))]
        for code in codes:
            smoothed = (counts[code] + usual * 100) / (counts[code].sum() + 100)
            columns.append(np.log(smoothed / usual))
        evidence = np.pad(np.stack(columns, axis=1).astype(np.float32), ((0, 1), (0, 0)))
        return cls(np.array([UNKNOWN, *codes]), words, evidence)

    def of(self, batch: TextBatch) -> Int[np.ndarray, " documents"]:
        """Which of `codes` each document is written in."""
        sizes = np.minimum(np.diff(batch.offsets), WORDS)
        scores = np.zeros((batch.documents, len(self.codes)))
        if sizes.sum():
            gathered = self.spoken(batch, np.flatnonzero(batch.place < WORDS))
            worded = sizes > 0
            starts = (np.cumsum(sizes) - sizes)[worded]
            scores[worded] = np.add.reduceat(gathered, starts, axis=0)
        scores[:, 0] = EVIDENCE
        return np.argmax(scores, axis=1)

    def spoken(self, batch: TextBatch, which: Int[np.ndarray, " words"]) -> Float[np.ndarray, "words languages"]:
        """How much some words of a batch speak for each language, nats: those never seen by their last letters."""
        rows = self._rows(batch.folded[which])
        unknown = rows == len(self.words)
        rows[unknown] = self._rows(_endings(batch, which[unknown]))
        return self.evidence[rows]

    def _rows(self, hashes: UInt64[np.ndarray, " hashes"]) -> Int[np.ndarray, " hashes"]:
        """Of `evidence`."""
        return _found(hashes, self.words, self._places)

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, " buckets"]:
        """Where the words of each bucket, hashes of the same first bits, begin: a word or so each."""
        bits = max(1, int(len(self.words) - 1).bit_length())
        edges = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
        return np.append(np.searchsorted(self.words, edges), len(self.words))

    def save(self, file: Path) -> None:
        np.savez_compressed(file, codes=self.codes, words=self.words, evidence=self.evidence)

    @classmethod
    def load(cls, file: Path) -> "Languages":
        with np.load(file, allow_pickle=False) as saved:
            return cls(saved["codes"], saved["words"], saved["evidence"])


def identified(text: str) -> str:
    """As a library tells it; `und` where it isn't sure."""
    import whatlang

    try:
        found = whatlang.detect(text)
    except ValueError:  # a text without letters
        return UNKNOWN
    return found.lang if found.is_reliable else UNKNOWN  # type: ignore[attr-defined]


@compiled
def _found(hashes, words, places):
    """Where each hash stands among the words; their number for those that don't."""
    rows, bits = np.empty(hashes.size, np.int64), 0
    while 1 << bits < places.size - 1:
        bits += 1
    for i in range(hashes.size):
        bucket = np.int64(hashes[i] >> np.uint64(64 - bits))
        rows[i] = words.size
        for place in range(places[bucket], places[bucket + 1]):
            if words[place] == hashes[i]:
                rows[i] = place
    return rows


def lettered(batch: TextBatch, which: Int[np.ndarray, " words"]) -> Int[np.ndarray, " lettered"]:
    """Those of some words that are of letters: signs and numbers are of a subject rather than a language."""
    kinds = character_tables()[0][np.minimum(batch.codes[batch.starts[which]], TABLE)]
    return which[(kinds == LETTER) | (kinds == IDEOGRAPH)]


def _endings(batch: TextBatch, which: Int[np.ndarray, " words"]) -> UInt64[np.ndarray, " words"]:
    """A hash of each word's last letters: how it is inflected, and its script."""
    _, folds, _ = character_tables()
    hashes = np.full(len(which), ENDING, np.uint64)
    for back in range(1, ENDING + 1):
        at = np.maximum(batch.stops[which] - back, batch.starts[which])
        hashes = mixed(hashes + folds[np.minimum(batch.codes[at], TABLE)].astype(np.uint64))
    return hashes
