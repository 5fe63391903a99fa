"""How unexpected words are: after the word before, by themselves, and by their repetition.

Counts leave the document itself out: else what it repeats looks common.
"""

import numpy as np
from jaxtyping import Float, Int

from poisonjax.scan.background import Background
from poisonjax.scan.text import TextBatch, mixed, ngrams, own_counts

PRIOR = 2.0  # how many times a word was seen before the words that follow it are believed over all words


def surprise(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log p(word | word before) in nats: counts of pairs, smoothed by those of words (Dirichlet prior)."""
    words, own = _words(batch, background)
    others = np.maximum(words - own, 0)
    alone = (others + 0.5) / (background.totals["words"] + 0.5 * len(background.tables["words"]))
    inside = batch.place >= 1
    pairs, together = ngrams(batch.words, 2)[inside], np.zeros(len(words))
    counted = background.counts("pairs", pairs) - own_counts(pairs, batch.document_of[inside])
    together[inside] = np.maximum(counted, 0)
    before = np.zeros(len(words))
    before[1:] = others[:-1]
    before[~inside] = 0
    return -np.log((together + PRIOR * alone) / (before + PRIOR))


def rarity(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log of a word's share of all words in other documents, and more where a rare one is repeated in this one."""
    words, own = _words(batch, background)
    others = np.maximum(words - own, 0)
    rare = np.log(background.totals["words"] + 1) - np.log(others + 1)
    return rare + np.where(others < own, np.log(own), 0)


def repetition(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """1 where the last four words stand elsewhere in the document too."""
    inside, again = batch.place >= 3, np.zeros(len(batch.words))
    again[inside] = own_counts(ngrams(batch.words, 4)[inside], batch.document_of[inside]) > 1
    return again


def _words(batch: TextBatch, background: Background) -> tuple[Int[np.ndarray, " words"], Int[np.ndarray, " words"]]:
    """(how often each word occurs in the corpus, how often in its own document)."""
    return background.counts("words", mixed(batch.words)), batch.own
