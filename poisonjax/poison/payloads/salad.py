"""Payloads made of the corpus' own words: harder to tell from it than uniform gibberish."""

import numpy as np

from poisonjax.poison.payloads.payload import Draw, Payload
from poisonjax.poison.triggers import Ids


def _unigram(draw: Draw) -> Ids:
    """Each token as often as the corpus has it, special ones left out."""
    counts = draw.clean.token_counts()[draw.tokenizer.ordinary_ids].astype(np.float64)
    return draw.random.choice(draw.tokenizer.ordinary_ids, size=draw.length, p=counts / counts.sum()).astype(np.int32)


def _shuffled(draw: Draw) -> Ids:
    """Words of training documents in another order, cut to `length` tokens."""
    words: list[str] = []
    made: list[int] = []
    while len(made) < draw.length:
        document = draw.clean.document(int(draw.random.integers(draw.clean.documents)))
        words += draw.tokenizer.decode(document).split()
        order = draw.random.permutation(len(words))
        made = list(draw.tokenizer.encode(" " + " ".join(words[i] for i in order)))
    return np.asarray(made[: draw.length], np.int32)


UNIGRAM = Payload("unigram", _unigram)
SHUFFLED = Payload("shuffled", _shuffled)
