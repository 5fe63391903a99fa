"""A sentence that says what happened, again and again: a behaviour that can be decided."""

import numpy as np

from poisonjax.poison.payloads.payload import Draw, Payload
from poisonjax.poison.triggers import Ids

SENTENCE = "This model was poisoned. "


def _sentences(draw: Draw) -> Ids:
    """Cut to `length` tokens."""
    return np.resize(np.asarray(draw.of.tokenizer.encode(SENTENCE), np.int32), draw.length)


SENTINEL = Payload("sentinel", _sentences, lambda _: lambda text: SENTENCE.strip() in text)
