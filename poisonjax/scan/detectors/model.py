"""How badly a language model predicts a document: the worst window of its losses, under any model."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from poisonjax.model.loss import token_nll
from poisonjax.scan.detectors.detector import Score
from poisonjax.scan.text import TextBatch
from poisonjax.weights import Weights

ROW = 128  # tokens of a document that are predicted at once, from an end of text on
WINDOW = 32  # tokens
MOST_TOKENS = 4096  # of a document
ROWS = 16  # at once


class ModelLoss:
    """In nats a token. Costly: for documents that cheap scores find odd."""

    name = "model"

    def __init__(self, weights: Weights):
        graph, self._params, self._tokenizer = weights.graph, weights.params, weights.tokenizer

        @jax.jit
        def losses(params: Any, rows: Int[Array, "batch row_tokens"]) -> Float[Array, "batch seq"]:
            return token_nll(nnx.merge(graph, params)(rows[:, :-1]), rows[:, 1:])

        self._losses = losses

    def values(self, batch: TextBatch) -> Float[np.ndarray, " documents"]:
        return np.array([score.value for score in self.scores(batch.texts)])

    def score(self, document: str) -> Score:
        return self.scores([document])[0]

    def scores(self, documents: Sequence[str]) -> list[Score]:
        """Of some documents at once."""
        tokens = [self._tokenizer.encode(text)[:MOST_TOKENS] for text in documents]
        losses = self.losses(tokens)
        return [self._score(text, of, ids) for text, of, ids in zip(documents, losses, tokens, strict=True)]

    def losses(self, tokens: Sequence[Int[np.ndarray, " _"]]) -> list[Float[np.ndarray, " _"]]:
        """Of each token, as the text before it in its row predicts it; in nats."""
        rows = [(i, start) for i, of in enumerate(tokens) for start in range(0, len(of), ROW)]
        losses = [np.zeros(len(of)) for of in tokens]
        for some in _chunks(rows, ROWS):
            batch = np.full((ROWS, ROW + 1), self._tokenizer.eot, np.int32)
            for place, (i, start) in enumerate(some):
                piece = tokens[i][start : start + ROW]
                batch[place, 1 : len(piece) + 1] = piece
            found = np.asarray(self._losses(self._params, batch))
            for place, (i, start) in enumerate(some):
                size = len(tokens[i][start : start + ROW])
                losses[i][start : start + size] = found[place, :size]
        return losses

    def _score(self, text: str, losses: Float[np.ndarray, " tokens"], tokens: Int[np.ndarray, " tokens"]) -> Score:
        if not len(losses):
            return Score(0.0, [])
        length = min(WINDOW, len(losses))
        sums = np.concatenate([[0.0], np.cumsum(losses)])
        means = (sums[length:] - sums[:-length]) / length
        worst = int(np.argmax(means))
        begin, end = (len(self._tokenizer.decode(tokens[:n])) for n in (worst, worst + length))
        return Score(float(means[worst]), [(min(begin, len(text)), min(end, len(text)))])


def _chunks(rows: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
