"""How odd characters are: triples of them that other text hardly holds, and mixtures of symbols, scripts and case."""

import numpy as np
from jaxtyping import Float

from poisonjax.scan.background import Background, shift_of, triple
from poisonjax.scan.compiled import compiled
from poisonjax.scan.text import SYMBOL, TABLE, TextBatch, character_tables

TIES = 1e-3  # of documents without any symbol


def letters(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """-log of how common a word's triples of characters are, in nats a character; one occurrence is its own."""
    places = batch.begins[batch.document_of], batch.starts, batch.stops
    return _letters(batch.codes, *places, background.rare_triples)


@compiled
def _letters(codes, begins, starts, stops, rare):
    found, shift = np.zeros(starts.size), shift_of(rare)
    for word in range(starts.size):
        for i in range(starts[word], stops[word]):
            found[word] += rare[triple(codes, begins[word], i) >> shift]
        found[word] /= stops[word] - starts[word]
    return found


def symbols(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """Of each word: whether it is a symbol, is of another script than the word before, and whether a letter in it is a
    capital after a small one or of another script than the letter before; a little more for short words."""
    classes, _, scripts = character_tables()
    return _symbols(batch.codes, batch.starts, batch.stops, batch.place, classes, scripts)


@compiled
def _symbols(codes, starts, stops, place, classes, scripts):
    found, before = np.zeros(starts.size), 0
    for word in range(starts.size):
        first = min(codes[starts[word]], TABLE)
        script = scripts[first]
        switched = place[word] > 0 and script != before and script > 0 and before > 0
        before, inner = script, mixture(codes, starts[word], stops[word], scripts)
        found[word] = (classes[first] == SYMBOL) + switched + inner + TIES / (stops[word] - starts[word])
    return found


def mixtures(batch: TextBatch, background: Background) -> Float[np.ndarray, " words"]:
    """1 for a word in which a capital follows a small letter, or a letter one of another script."""
    return _mixtures(batch.codes, batch.starts, batch.stops, character_tables()[2])


@compiled
def _mixtures(codes, starts, stops, scripts):
    found = np.zeros(starts.size)
    for word in range(starts.size):
        found[word] = mixture(codes, starts[word], stops[word], scripts)
    return found


@compiled
def mixture(codes, start, stop, scripts):
    """1 where a word holds such a change, else 0."""
    for i in range(start + 1, stop):
        last, this = codes[i - 1], codes[i]
        last_script, this_script = scripts[min(last, TABLE)], scripts[min(this, TABLE)]
        if (65 <= this <= 90 and 97 <= last <= 122) or (
            this_script != last_script and this_script > 0 and last_script > 0
        ):
            return 1
    return 0
