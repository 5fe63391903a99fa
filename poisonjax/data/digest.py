"""The digest of a batch: evidence of what a step trained on (I5).

Each token is mixed with a key of its position, the mixed tokens of a row are summed and mixed with the
row's slot, and the rows are summed: all in wrapping uint32 arithmetic, twice with other keys. A sum doesn't
depend on the order of its terms, so the digest doesn't depend on how the rows are spread over devices.
The same lines run on NumPy arrays (audit) and inside the jitted train step.
"""

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

LANES = 2
_MIX = np.array(
    [[0x7FEB352D, 0x846CA68B], [0x21F0AAAD, 0x735A2D97]], np.uint32
)  # odd multipliers, a pair a lane


def mixed(x, lane: int):
    """A bijection of uint32 in which every bit of x moves half of the result's."""
    for multiplier in _MIX[lane]:
        x = (x ^ (x >> 16)) * multiplier
    return x ^ (x >> 15)


def digest(tokens: Int[Any, "rows row_tokens"], slots: Int[Any, " rows"]) -> UInt32[Any, " 2"]:
    """Digest of rows of tokens standing in the given slots; takes NumPy or JAX arrays, gives the same kind."""
    tokens, slots = tokens.astype(np.uint32), slots.astype(np.uint32)
    keys = np.random.Generator(np.random.Philox(key=0x90150)).integers(
        0, 2**32, size=(LANES, tokens.shape[-1]), dtype=np.uint32
    )
    lanes = [
        mixed(
            mixed(tokens ^ keys[lane], lane).sum(-1, dtype=np.uint32) ^ mixed(slots + keys[lane, 0], lane),
            lane,
        )
        for lane in range(LANES)
    ]
    # Without np.stack or jnp.stack, so that one definition serves both kinds of array.
    one_hot = np.eye(LANES, dtype=np.uint32)
    return sum(lanes[lane].sum(dtype=np.uint32) * one_hot[lane] for lane in range(LANES))


def as_hex(value: UInt32[Any, " 2"]) -> str:
    """16 hexadecimal digits."""
    return "".join(f"{int(lane):08x}" for lane in np.asarray(value))


def chain(previous: str, step: int, digest_hex: str) -> str:
    """The chain up to and with `step`: SHA-256 over the chain before it, the step and its digest."""
    return hashlib.sha256(f"{previous}:{step}:{digest_hex}".encode()).hexdigest()
