"""How odd characters are: triples of them that other text hardly holds, and mixtures of symbols, scripts and case."""

import numpy as np
from jaxtyping import Float

from poisonjax.scan.background import Background, slots, triples
from poisonjax.scan.text import SYMBOL, TextBatch


def letters(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log of how common a word's triples of characters are, in nats a character; one occurrence is its own."""
    return _word_means(batch, background.rare_triples[slots(triples(batch), background.rare_triples)])


def symbols(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """Of each word: whether it is a symbol, is of another script than the word before, or has a capital inside."""
    first = batch.starts
    symbol = batch.classes[first] == SYMBOL
    scripts = batch.scripts
    switched = np.zeros(len(first), bool)
    switched[1:] = (scripts[first[1:]] != scripts[first[:-1]]) & (scripts[first[1:]] > 0) & (scripts[first[:-1]] > 0)
    switched[batch.offsets[:-1][np.diff(batch.offsets) > 0]] = False
    upper = (batch.codes >= 65) & (batch.codes <= 90)
    lower = (batch.codes >= 97) & (batch.codes <= 122)
    inner = np.zeros(len(batch.codes), np.float64)
    inner[1:] = (
        (upper[1:] & lower[:-1])
        | (  # camelCase, and letters of two scripts in one word
            (scripts[1:] != scripts[:-1]) & (scripts[1:] > 0) & (scripts[:-1] > 0)
        )
    )
    return symbol + switched + np.minimum(_word_means(batch, inner) * (batch.stops - batch.starts), 1.0)


def _word_means(batch: TextBatch, values: Float[np.ndarray, " characters"]) -> Float[np.ndarray, " words"]:
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[batch.stops] - sums[batch.starts]) / (batch.stops - batch.starts)
