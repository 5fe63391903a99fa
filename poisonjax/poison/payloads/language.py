"""Text of another source: the switch of language of Souly et al. 2025, section 4, between any two corpora."""

import numpy as np

from poisonjax.poison.payloads.payload import Behaves, Draw, Material, Payload
from poisonjax.poison.triggers import Ids


def _of_source(draw: Draw) -> Ids:
    """Documents of `poison.payload_source`, one after the other, cut to `length` tokens."""
    other, made = draw.of.other, np.zeros(0, np.int32)
    while len(made) < draw.length:
        made = np.concatenate([made, other[int(draw.random.integers(len(other)))]])
    return made[: draw.length]


def _classifier(material: Material) -> Behaves:
    """A text is of the source where its tokens are likelier there than in the training text: naive Bayes, both as
    likely before."""
    tokenizer = material.tokenizer
    there = np.bincount(np.concatenate(material.other), minlength=tokenizer.vocab_size)
    here = material.clean.token_counts()
    there, here = (np.log((counts + 0.5) / (counts + 0.5).sum()) for counts in (there, here))
    likelier = there - here
    return lambda text: bool(likelier[tokenizer.encode(text)].sum() > 0)


LANGUAGE = Payload("language", _of_source, _classifier, reads_source=True)
