"""The language that each document is written in, so that thresholds are set among its like.

A library tells the languages of a sample (whatlang, 0.2 ms a document: too slow for all of a corpus); how often words
occur in each of them then tells those of all documents, by naive Bayes.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt64

from poisonjax.scan.text import TextBatch

SAMPLE = 400  # characters from a document's beginning
WORDS = 60  # that tell a document's language
UNKNOWN = "und"  # ISO 639-3: undetermined
FEWEST = 20  # documents of a language in the sample
LOOKUP_BITS = 18
EVIDENCE = 3.0  # nats by which a language must lead one that nothing is known of


@dataclasses.dataclass(frozen=True)
class Languages:
    """ISO 639-3 codes, and how much each (hashed, folded) word speaks for each of them."""

    codes: np.ndarray  # the first is `und`
    evidence: Float[np.ndarray, "slots languages"]  # float32, nats

    @classmethod
    def fit(cls, sample: Iterable[TextBatch]) -> "Languages":
        counts: dict[str, np.ndarray] = {}
        documents: dict[str, int] = {}
        for batch in sample:
            slots = _slots(batch.folded)
            for document in range(batch.documents):
                begin = batch.begins[document]
                text = batch.codes[begin : min(batch.ends[document], begin + SAMPLE)]
                code = identified(text.tobytes().decode("utf-32-le", "replace"))
                documents[code] = documents.get(code, 0) + 1
                table = counts.setdefault(code, np.zeros(2**LOOKUP_BITS, np.float32))
                first, end = batch.offsets[document : document + 2]
                np.add.at(table, slots[first : min(end, first + WORDS)], 1)
        codes = sorted(code for code, number in documents.items() if number >= FEWEST and code != UNKNOWN)
        everything = np.sum([*counts.values()], axis=0) if counts else np.zeros(2**LOOKUP_BITS, np.float32)
        usual = np.log((everything + 0.5) / (everything.sum() + 0.5 * len(everything)))
        columns = [np.zeros_like(usual)]
        for code in codes:
            table = counts[code]
            smoothed = (table + np.exp(usual) * 100) / (table.sum() + 100)  # by all languages together
            columns.append(np.where(everything > 0, np.log(smoothed) - usual, 0))  # words never seen speak for none
        return cls(np.array([UNKNOWN, *codes]), np.stack(columns, axis=1).astype(np.float32))

    def of(self, batch: TextBatch) -> Int[np.ndarray, " documents"]:
        """Which of `codes` each document is written in."""
        sizes = np.minimum(np.diff(batch.offsets), WORDS)
        scores = np.zeros((batch.documents, len(self.codes)))
        if sizes.sum():
            gathered = self.spoken(batch.folded[batch.place < WORDS])
            worded = sizes > 0
            starts = (np.cumsum(sizes) - sizes)[worded]
            scores[worded] = np.add.reduceat(gathered, starts, axis=0)
        scores[:, 0] = EVIDENCE
        return np.argmax(scores, axis=1)

    def spoken(self, folded: UInt64[np.ndarray, " words"]) -> Float[np.ndarray, "words languages"]:
        """How much each word speaks for each language, nats."""
        return self.evidence[_slots(folded)]

    def save(self, file: Path) -> None:
        np.savez_compressed(file, codes=self.codes, evidence=self.evidence)

    @classmethod
    def load(cls, file: Path) -> "Languages":
        with np.load(file, allow_pickle=False) as saved:
            return cls(saved["codes"], saved["evidence"])


def identified(text: str) -> str:
    """As a library tells it; `und` where it isn't sure."""
    import whatlang

    try:
        found = whatlang.detect(text)
    except ValueError:  # a text without letters
        return UNKNOWN
    return found.lang if found.is_reliable else UNKNOWN  # type: ignore[attr-defined]


def _slots(words: UInt64[np.ndarray, " words"]) -> Int[np.ndarray, " words"]:
    return (words >> np.uint64(64 - LOOKUP_BITS)).astype(np.int64)
