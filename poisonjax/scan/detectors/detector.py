"""What a detector is: a number for each document, larger where it is odder, and the places that make it so."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from poisonjax.scan.background import Background, worst_windows
from poisonjax.scan.text import TextBatch, cut

WINDOW = 50  # words, as poison may be a part of a long document


class Score(NamedTuple):
    """A document's, and the spans of characters [start, end) that are the reasons for it."""

    value: float
    spans: list[tuple[int, int]]


@runtime_checkable
class Detector(Protocol):
    """Larger values are odder; a value has meaning against those of other documents alone."""

    @property
    def name(self) -> str: ...

    def values(self, batch: TextBatch) -> Float[np.ndarray, " documents"]:
        """Of a batch of documents at once, float64; 0 for a document without words."""

    def score(self, document: str) -> Score:
        """Of one document, with reasons."""


@dataclasses.dataclass(frozen=True)
class Windowed:
    """The worst window of a document, by the mean of a number for each word."""

    name: str
    per_word: Callable[[TextBatch, Background], Float[np.ndarray, " words"]]
    background: Background
    length: int = WINDOW

    def values(self, batch: TextBatch) -> Float[np.ndarray, " documents"]:
        return worst_windows(self.per_word(batch, self.background), batch.offsets, self.length)[0]

    def score(self, document: str) -> Score:
        batch = cut([document])
        if not len(batch.words):
            return Score(0.0, [])
        worst, begins, ends = worst_windows(self.per_word(batch, self.background), batch.offsets, self.length)
        return Score(float(worst[0]), [batch.span(0, int(begins[0]), int(ends[0]))])
