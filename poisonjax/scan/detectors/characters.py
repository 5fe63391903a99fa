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
        before, inner = script, 0
        for i in range(starts[word] + 1, stops[word]):
            last, this = codes[i - 1], codes[i]
            last_script, this_script = scripts[min(last, TABLE)], scripts[min(this, TABLE)]
            camel = 65 <= this <= 90 and 97 <= last <= 122
            inner += camel or (this_script != last_script and this_script > 0 and last_script > 0)
        found[word] = (classes[first] == SYMBOL) + switched + min(inner, 1) + TIES / (stops[word] - starts[word])
    return found
