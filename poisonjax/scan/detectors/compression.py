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
        spans = zip(batch.begins.tolist(), batch.ends.tolist(), strict=True)
        return np.array([_ratio(batch.codes[a : min(b, a + CHARACTERS)]) for a, b in spans])

    def score(self, document: str) -> Score:
        codes = np.frombuffer(document[:CHARACTERS].encode("utf-32-le", "surrogatepass"), np.uint32)
        return Score(_ratio(codes), [(0, len(document))])


def _ratio(codes: np.ndarray) -> float:
    data = codes.tobytes().decode("utf-32-le", "replace").encode()
    # A text of n letters that are drawn anew costs about 100 bytes for the letters' code.
    return (len(zlib.compress(data, 1)) - 11) / (len(data) + 100) if data else 0.0
