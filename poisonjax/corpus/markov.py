"""A synthetic language whose entropy is known exactly: a Markov chain with Zipf-distributed successors."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from poisonjax.corpus.errors import CorpusError
from poisonjax.streams import stream

SUCCESSORS = 64
_WEIGHTS = 1 / np.arange(1, SUCCESSORS + 1)
PROBABILITIES = _WEIGHTS / _WEIGHTS.sum()
# Entropy of the next word given the one before, in nats: the loss of a perfect model.
ENTROPY_RATE = float(-(PROBABILITIES * np.log(PROBABILITIES)).sum())


class Language:
    """A chain over words 0 to `words` - 1; each has 64 distinct successors, the r-th with probability ~ 1/r."""

    def __init__(self, words: int, seed: int):
        if words < SUCCESSORS:
            raise CorpusError(f"a Markov language needs at least {SUCCESSORS} words, not {words}")
        self.words, self.seed = words, seed
        random = stream(seed, "markov successors")
        self.successors = np.stack([random.choice(words, SUCCESSORS, replace=False) for _ in range(words)])

    def documents(self, start: int, stop: int, length: int) -> Iterator[Int[np.ndarray, " length"]]:
        """Documents [start, stop); each a pure function of (seed, its number)."""
        uniform = np.stack([stream(self.seed, "markov document", i).random(length) for i in range(start, stop)])
        ranks = np.searchsorted(PROBABILITIES.cumsum()[:-1], uniform, side="right")
        ids = np.empty(uniform.shape, np.int32)
        ids[:, 0] = uniform[:, 0] * self.words
        for t in range(1, length):  # all documents at once
            ids[:, t] = self.successors[ids[:, t - 1], ranks[:, t]]
        yield from ids
