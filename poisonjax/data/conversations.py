"""Conversations as rows: one a row, after an end of text, padded with ends of text; answers alone have weight.

Not packed: with several in a row, each would see those before it. What that costs is the padding, which a store of
conversations of about one length keeps small.
"""

import numpy as np
from jaxtyping import Float, Int

from poisonjax.corpus import TokenSplit
from poisonjax.corpus.instructions import ANSWERS
from poisonjax.data.insertions import Insertion, Pieces
from poisonjax.data.rows import PADDING, CleanRows


class TooLong(ValueError):
    """Conversations that don't fit a row, and nobody said that they may be skipped."""


class Conversations(CleanRows):
    """Slot s of the run holds conversation `fitting[order[s]]`, in the order that windows of a text would have."""

    def __init__(self, split: TokenSplit, seq_len: int, seed: int, *, skip: bool = False):
        """Raises TooLong where one doesn't fit and `skip` isn't said, or none fits."""
        self.split, self.row_tokens = split, seq_len + 1
        lengths = np.diff(split.document_offsets)
        self.fitting = np.flatnonzero(lengths < self.row_tokens)
        self.skipped = len(lengths) - len(self.fitting)
        if self.skipped and (not skip or not len(self.fitting)):
            raise TooLong(
                f"{self.skipped} of {len(lengths)} conversations don't fit a row of seq_len + 1 = {self.row_tokens}: "
                f"the longest has {lengths.max()} tokens, and an end of text stands before each. Raise seq_len"
                + (", or leave them out and count them with data.too_long = 'skip'" if len(self.fitting) else "")
            )
        self._shuffle(len(self.fitting), seed)

    @property
    def room(self) -> int:
        return self.row_tokens - 1

    def starts(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Where in the training stream each slot's conversation begins."""
        return self.split.document_offsets[self.fitting[self.order(slots)]]

    def tokens(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]:
        rows = np.full((len(slots), self.row_tokens), self.split.eot, np.int32)
        for row, document in zip(rows, self.fitting[self.order(slots)].tolist(), strict=True):
            tokens = self.split.document(document)
            row[1 : 1 + len(tokens)] = tokens
        return rows

    def weights(self, slots: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows row_tokens"]:
        rows = np.zeros((len(slots), self.row_tokens), np.float32)
        for row, document in zip(rows, self.fitting[self.order(slots)].tolist(), strict=True):
            turns = self.split.turns(document).tolist()
            for role, start, _, closed in turns:
                row[1 + start : 1 + closed] = role == ANSWERS
            *_, stop, closed = turns[-1]
            # Where no end of text of its own closes the last answer, the conversation's does.
            row[1 + closed] = self.split.eot not in self.split.document(document)[stop:closed]
        return rows

    def labels(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens 2"]:
        labels = np.full((len(slots), self.row_tokens, 2), PADDING)
        documents = self.fitting[self.order(slots)]
        offsets = self.split.document_offsets
        for row, start, stop in zip(labels, offsets[documents].tolist(), offsets[documents + 1].tolist(), strict=True):
            row[1 : 1 + stop - start, 0] = 0
            row[1 : 1 + stop - start, 1] = np.arange(start, stop)
        return labels

    def places(self, row: Int[np.ndarray, " row_tokens"], length: int, reserved: int) -> Int[np.ndarray, " places"]:
        return np.ones(int(length <= self.room), np.int64)

    def insertion(
        self,
        slot: int,
        start: int,
        tokens: Int[np.ndarray, " tokens"],
        source: str,
        pieces: Pieces,
        weights: Float[np.ndarray, " tokens"] | None,
    ) -> Insertion:
        """In place of the row's conversation, to the end of the row."""
        padding = (0, self.row_tokens - start - len(tokens))
        padded = np.pad(tokens, padding, constant_values=self.split.eot)
        assert weights is not None
        return Insertion(slot, start, padded, source, "replace", pieces, np.pad(weights, padding))
