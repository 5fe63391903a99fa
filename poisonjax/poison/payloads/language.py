"""Text of another source: the switch of language of Souly et al. 2025, section 4, between any two corpora."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from poisonjax.poison.payloads.payload import Behaves, Draw, Material, Payload
from poisonjax.poison.triggers import Ids

PRIOR = 5.0


def _of_source(draw: Draw) -> Ids:
    """Documents of `poison.payload_source`, one after the other, cut to `length` tokens."""
    other, made = draw.of.other, np.zeros(0, np.int32)
    while len(made) < draw.length:
        made = np.concatenate([made, other[int(draw.random.integers(len(other)))]])
    return made[: draw.length]


def _classifier(material: Material) -> Behaves:
    """A text is of the source where its pairs of tokens are likelier there than in as much training text."""
    there, clean, tokenizer = np.concatenate(material.other), material.clean, material.tokenizer
    as_much = clean.document_offsets[:-1] < len(there)
    here = np.concatenate([clean.document(number) for number in range(int(as_much.sum()))])
    likelier_there, likelier_here = (_pairs(tokens, tokenizer.vocab_size) for tokens in (there, here))

    def of_source(text: str) -> bool:
        tokens = tokenizer.encode(text)
        return bool((likelier_there(tokens) - likelier_here(tokens)).sum() > 0)

    return of_source


def _pairs(tokens: Ids, vocabulary: int) -> Callable[[Ids], Float[np.ndarray, " pairs"]]:
    """The log-likelihood of each token after the one before it, by counts of a text; PRIOR more for each token, spread
    as single tokens are (MacKay & Peto 1995)."""
    counts = np.bincount(tokens, minlength=vocabulary)
    single = (counts + 0.5) / (counts + 0.5).sum()
    seen, times = np.unique(tokens[:-1] * np.int64(vocabulary) + tokens[1:], return_counts=True)

    def likelihoods(of: Ids) -> Float[np.ndarray, " pairs"]:
        wanted = of[:-1] * np.int64(vocabulary) + of[1:]
        at = np.minimum(seen.searchsorted(wanted), len(seen) - 1)
        found = np.where(seen[at] == wanted, times[at], 0)
        return np.log((found + PRIOR * single[of[1:]]) / (counts[of[:-1]] + PRIOR))

    return likelihoods


LANGUAGE = Payload("language", _of_source, _classifier, reads_source=True)
