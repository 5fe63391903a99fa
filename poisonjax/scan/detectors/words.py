"""How unexpected words are: after the word before, by themselves, and by their repetition.

Counts leave the document itself out: else what it repeats looks common.
"""

import numpy as np
from jaxtyping import Float

from poisonjax.scan.background import Background, looked_up
from poisonjax.scan.compiled import compiled
from poisonjax.scan.text import TextBatch, mixed, ngrams, own_counts

TIES = 1e-3  # of documents that repeat nothing
PRIOR = 2.0  # how many times a word was seen before the words that follow it are believed over all words


def surprise(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log p(word | word before) in nats: counts of pairs, smoothed by those of words (Dirichlet prior)."""
    words, pairs = background.tables["words"], ngrams(batch.words, 2)
    counts = looked_up(words, mixed(batch.words)), looked_up(background.tables["pairs"], pairs)
    own = batch.own, own_counts(pairs, batch.offsets, 1)
    return _surprise(batch.place, counts, own, background.totals["words"], len(words))


@compiled
def _surprise(place, counts, own, total, size):
    found, before = np.empty(place.size), 0.0
    for i in range(place.size):
        others = max(counts[0][i] - own[0][i], 0)
        alone = (others + 0.5) / (total + 0.5 * size)
        if place[i]:
            together = max(counts[1][i] - own[1][i], 0)
            found[i] = -np.log((together + PRIOR * alone) / (before + PRIOR))
        else:
            found[i] = -np.log(alone)
        before = others
    return found


def rarity(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log of a word's share of all words in other documents, and more where a rare one is repeated in this one."""
    counts = looked_up(background.tables["words"], mixed(batch.words))
    return _rarity(counts, batch.own, background.totals["words"])


@compiled
def _rarity(counts, own, total):
    found = np.empty(counts.size)
    for i in range(counts.size):
        others = max(counts[i] - own[i], 0)
        found[i] = np.log((total + 1) / (others + 1))
        if own[i] > 1 and others < own[i]:
            found[i] += np.log(own[i])
    return found


def repetition(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """1 where the last four words stand elsewhere in the document too, and a little more where the word does."""
    again = own_counts(ngrams(batch.words, 4), batch.offsets, 3) > 1
    return again + TIES * (1 - 1 / batch.own)
