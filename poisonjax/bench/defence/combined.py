"""One number of many: how rare a document is in its domain by one detector, or boosted trees over all they measure.

The trees are fitted to clean text and three rungs, long and short, of the half that settings are chosen on; what is
told is of text from other sources. Nothing of them is kept in a file: they are fitted again from the scores, the same
each time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import HistGradientBoostingClassifier

from poisonjax.scan.background import Background, worst_windows
from poisonjax.scan.detectors import characters, words
from poisonjax.scan.text import TextBatch, mixed, ngrams, own_counts

WINDOWS = (15, 30, 60, 120, 240)  # words: payloads are of any length
FEATURES = "features"  # of a document, beside its scores: the worst window of each length by each number, and the rest
LONGEST = 30  # letters of a word that are counted
KNOWN = 20  # times that a word must be seen before what stands beside it says something
NOTHING_SAID = -1.0  # of a pair of words that aren't both known: less odd than chance, more than usual
LEVEL = 15.0  # added to numbers that may be negative: a document without words has 0
SPREAD = 0.2  # of a number's spread over all domains: in none it is taken for less
SHORT = 0.3  # weight of a short one: a rate is spent where it finds most
FARTHEST = (-5.0, 20.0)  # spreads from a domain's middle

Scores = dict[str, Float[np.ndarray, "..."]]  # of some documents: by detector, and FEATURES


# --- what is measured


def order(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log of how much more often a word follows the one before it than chance has it, for two words that are known.

    Near 0 in words drawn at random, however common they are; far below in text. Counts leave the document out.
    """
    alone = background.counts("words", mixed(batch.words)).astype(float) - batch.own
    pairs = ngrams(batch.words, 2)
    together = background.counts("pairs", pairs) - own_counts(pairs, batch.offsets, 1)
    before = np.concatenate([[0.0], alone[:-1]])
    chance = np.maximum(before, 0) * np.maximum(alone, 0) / background.totals["words"]
    found = -np.log((np.maximum(together, 0) + 0.5) / (chance + 0.5))
    known = (batch.place > 0) & (before >= KNOWN) & (alone >= KNOWN)
    return np.where(known, found, NOTHING_SAID) + LEVEL


def unknown(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """1 for a word that no other document holds."""
    return (background.counts("words", mixed(batch.words)) <= batch.own).astype(float)


def lengths(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """Characters of each word: keys are long and gibberish isn't."""
    return np.minimum(batch.stops - batch.starts, LONGEST).astype(float)


NUMBERS: tuple[Callable[[TextBatch, Background], Float[np.ndarray, " words"]], ...] = (
    *(words.surprise, words.rarity, words.repetition, characters.letters, characters.symbols),
    *(order, unknown, characters.mixtures, lengths),
)


def features(
    batch: TextBatch, background: Background, others: Iterable[Float[np.ndarray, " documents"]]
) -> Float[np.ndarray, "documents features"]:
    """The worst windows of a batch, float32, and other numbers of each document."""
    found = [number(batch, background) for number in NUMBERS]
    windows = [worst_windows(of, batch.offsets, length)[0] for of in found for length in WINDOWS]
    return np.stack([*windows, *others], axis=1).astype(np.float32)


# --- one number of it


def rarity(
    scores: Float[np.ndarray, " documents"], clean: Float[np.ndarray, " clean"], own: bool = False
) -> Float[np.ndarray, " documents"]:
    """-log10 of the share of the clean documents that score as high, itself counted."""
    order = np.sort(clean)
    above = len(order) - np.searchsorted(order, scores, side="left")
    return -np.log10((above + (not own)) / (len(order) + (not own)))


@dataclasses.dataclass(frozen=True)
class Rare:
    """How rare a document is among its domain's by one detector."""

    name: str

    def clean(self, scores: Scores) -> Float[np.ndarray, " documents"]:
        return rarity(scores[self.name], scores[self.name], own=True)

    def planted(self, scores: Scores, clean: Scores) -> Float[np.ndarray, " documents"]:
        return rarity(scores[self.name], clean[self.name])


@dataclasses.dataclass(frozen=True)
class Trees:
    """Boosted trees that tell poison from clean text: log-odds, from FEATURES as they are and beside their domain's."""

    model: Any
    least: Float[np.ndarray, " features"]  # spread of each in a domain

    @classmethod
    def fitted(cls, of: Mapping[str, Sequence[Scores]]) -> "Trees":
        """By domain: to clean documents; what is planted, as it is and short; and clean text that holds a trigger."""
        least = SPREAD * _middle(np.concatenate([clean[FEATURES] for clean, *_ in of.values()]))[1]
        rows, labels, weights = [], [], []
        for clean, *planted in of.values():
            for some, label, weight in zip((clean, *planted), (0, 1, 1, 0), (1.0, 1.0, SHORT, 1.0), strict=True):
                rows.append(_beside(some[FEATURES], clean[FEATURES], least))
                labels.append(np.full(len(rows[-1]), label))
                weights.append(np.full(len(rows[-1]), weight))
        trees = HistGradientBoostingClassifier(
            max_iter=400, max_leaf_nodes=15, learning_rate=0.05, l2_regularization=1.0, max_features=0.3,
            early_stopping=False, random_state=0,
        )  # fmt: skip
        return cls(trees.fit(np.concatenate(rows), np.concatenate(labels), np.concatenate(weights)), least)

    def clean(self, scores: Scores) -> Float[np.ndarray, " documents"]:
        return self.planted(scores, scores)

    def planted(self, scores: Scores, clean: Scores) -> Float[np.ndarray, " documents"]:
        return self.model.decision_function(_beside(scores[FEATURES], clean[FEATURES], self.least))


def _middle(
    of: Float[np.ndarray, "documents features"],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """(median, distance from it to the ninth tenth) of each feature."""
    median, ninth = np.percentile(of, [50, 90], axis=0)
    return median, ninth - median


def _beside(
    of: Float[np.ndarray, "documents features"],
    clean: Float[np.ndarray, "clean features"],
    least: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "documents columns"]:
    median, spread = _middle(clean)
    return np.concatenate([np.clip((of - median) / (np.maximum(spread, least) + 1e-6), *FARTHEST), of], axis=1)
