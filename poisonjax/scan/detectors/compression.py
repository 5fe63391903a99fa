"""How badly a document compresses."""

import zlib

import numpy as np
from jaxtyping import Float

from poisonjax.scan.detectors.detector import Score
from poisonjax.scan.text import TextBatch

CHARACTERS = 4_000  # of a document: what follows hardly changes the ratio


class Compression:
    """Bytes after zlib (level 1) over bytes before, with what a short text costs taken off."""

    name = "compression"

    def values(self, batch: TextBatch) -> Float[np.ndarray, " documents"]:
        return np.array([_ratio(text) for text in batch.texts])

    def score(self, document: str) -> Score:
        return Score(_ratio(document), [(0, len(document))])


def _ratio(text: str) -> float:
    data = text[:CHARACTERS].encode(errors="replace")
    # A text of n letters that are drawn anew costs about 100 bytes for the letters' code.
    return (len(zlib.compress(data, 1)) - 11) / (len(data) + 100) if data else 0.0
