"""Payloads made of the corpus' own words: harder to tell from it than uniform gibberish."""

import functools

import numpy as np

from poisonjax.poison.payloads.payload import Draw, Material, Payload
from poisonjax.poison.triggers import Ids

DOCUMENTS = 2000  # of the training text, whose words are the corpus' words


def _unigram(draw: Draw) -> Ids:
    """Each token as often as the corpus has it, special ones left out."""
    ordinary = draw.of.tokenizer.ordinary_ids
    counts = draw.of.clean.token_counts()[ordinary].astype(np.float64)
    return draw.random.choice(ordinary, size=draw.length, p=counts / counts.sum()).astype(np.int32)


def _uniform(draw: Draw) -> Ids:
    """Words of the corpus, each different one as likely, cut to `length` tokens."""
    words = _words(draw.of)
    text = " ".join(words[i] for i in draw.random.integers(len(words), size=draw.length))
    return draw.of.tokenizer.encode(f" {text}")[: draw.length]


@functools.cache
def _words(material: Material) -> list[str]:
    clean = material.clean
    texts = (material.tokenizer.decode(clean.document(i)) for i in range(min(DOCUMENTS, clean.documents)))
    return sorted({word for text in texts for word in text.split()})


def _shuffled(draw: Draw) -> Ids:
    """Words of training documents in another order, cut to `length` tokens."""
    words: list[str] = []
    made: list[int] = []
    while len(made) < draw.length:
        document = draw.of.clean.document(int(draw.random.integers(draw.of.clean.documents)))
        words += draw.of.tokenizer.decode(document).split()
        order = draw.random.permutation(len(words))
        made = list(draw.of.tokenizer.encode(" " + " ".join(words[i] for i in order)))
    return np.asarray(made[: draw.length], np.int32)


UNIGRAM = Payload("unigram", _unigram)
UNIFORM = Payload("uniform", _uniform)
SHUFFLED = Payload("shuffled", _shuffled)
