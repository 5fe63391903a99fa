"""The digest of a batch: evidence of what a step trained on (I5).

Each token is mixed with a key of its position, the mixed tokens of a row are summed and mixed with the
row's slot, and the rows are summed: all in wrapping uint32 arithmetic, twice with other keys. A sum doesn't
depend on the order of its terms, so the digest doesn't depend on how the rows are spread over devices. A
third lane sums the first one's rows weighted by their slots: where one row differs, the quotient of the two
differences is its slot (`differing_rows`). The same lines run on NumPy arrays (audit) and inside the jitted
train step. Where tokens have loss weights, a mixed token is mixed with
its weight's bits.
"""

import functools
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt32

from poisonjax.streams import stream

HASH_LANES = 2
KEY = 0x90150
_MIX = np.array([[0x7FEB352D, 0x846CA68B], [0x21F0AAAD, 0x735A2D97]], np.uint32)  # odd multipliers, a pair a lane


def mixed(x, lane: int):
    """A bijection of uint32 in which every bit of x moves half of the result's."""
    for multiplier in _MIX[lane]:
        x = (x ^ (x >> 16)) * multiplier
    return x ^ (x >> 15)


def digest(
    tokens: Int[Any, "rows row_tokens"],
    slots: Int[Any, " rows"] | UInt32[Any, " rows"],
    weights: Float[Any, "rows row_tokens"] | None = None,
) -> UInt32[Any, " 3"]:
    """Digest of rows of tokens standing in the given slots; takes NumPy or JAX arrays, gives the same kind.

    `weights` are the float32 loss weights of the tokens, where there are any.
    """
    slots = slots.astype(np.uint32)
    sums = row_sums(tokens, weights)
    lanes = [in_slots(sums[lane], slots, lane) for lane in range(HASH_LANES)]
    totals = [*(lane.sum(dtype=np.uint32) for lane in lanes), (lanes[0] * slots).sum(dtype=np.uint32)]
    # Without np.stack or jnp.stack, so that one definition serves both kinds of array.
    one_hot = np.eye(len(totals), dtype=np.uint32)
    return sum(total * one_hot[i] for i, total in enumerate(totals))


def row_sums(
    tokens: Int[Any, "rows row_tokens"], weights: Float[Any, "rows row_tokens"] | None = None
) -> list[UInt32[Any, " rows"]]:
    """Each row's keyed sum, a lane after the other."""
    tokens, keys = tokens.astype(np.uint32), _keys(tokens.shape[-1])
    words = [mixed(tokens ^ keys[lane][None], lane) for lane in range(HASH_LANES)]
    if weights is not None:
        words = [mixed(words[lane] ^ weights.view(np.uint32), lane) for lane in range(HASH_LANES)]
    return [word.sum(-1, dtype=np.uint32) for word in words]


def in_slots(sums: UInt32[Any, "*#shape"], slots: UInt32[Any, "*#shape"], lane: int) -> UInt32[Any, "..."]:
    """What a row of that keyed sum adds to a lane when it stands in that slot; the arguments broadcast."""
    return mixed(sums ^ mixed(slots + _keys(1)[lane, 0], lane), lane)


@functools.cache
def _keys(row_tokens: int) -> UInt32[np.ndarray, "lanes row_tokens"]:
    """A key a position; those of a shorter row begin those of a longer one."""
    draws = [stream(KEY + lane, "digest keys").integers(0, 2**32, row_tokens, np.uint32) for lane in range(HASH_LANES)]
    return np.stack(draws)


def differing_rows(
    recorded: UInt32[np.ndarray, " 3"],
    tokens: Int[np.ndarray, "rows row_tokens"],
    slots: Int[np.ndarray, " rows"],
    weights: Float[np.ndarray, "rows row_tokens"] | None = None,
) -> list[int]:
    """Which rows of a batch explain its recorded digest, where a single row or two swapped rows do; else [].

    `tokens` and `weights` are the rows as they should have been.
    """
    slots = slots.astype(np.uint32)
    sums = row_sums(tokens, weights)
    first, _, weighted = difference = recorded - digest(tokens, slots, weights)
    single = np.flatnonzero(first * slots == weighted)
    if len(single) == 1 and difference.any():
        return single.tolist()
    # [i, j]: what row i would have added in slot j.
    moved = [in_slots(sums[lane][:, None], slots, lane) for lane in range(HASH_LANES)]
    own = [np.diagonal(lane) for lane in moved]
    swapped = np.ones((len(slots), len(slots)), bool)
    for lane in range(HASH_LANES):
        swapped &= moved[lane] + moved[lane].T - own[lane] - own[lane][:, None] == difference[lane]
    pairs = np.argwhere(np.triu(swapped, 1))
    return pairs[0].tolist() if len(pairs) == 1 else []


def as_hex(value: UInt32[Any, " lanes"]) -> str:
    """8 hexadecimal digits a lane."""
    return "".join(f"{int(lane):08x}" for lane in np.asarray(value))


def from_hex(text: str) -> UInt32[np.ndarray, " lanes"]:
    """What `as_hex` wrote; raises ValueError for other text."""
    return np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32)


def chain(previous: str, step: int, digest_hex: str) -> str:
    """The chain up to and with `step`: SHA-256 over the chain before it, the step and its digest."""
    return hashlib.sha256(f"{previous}:{step}:{digest_hex}".encode()).hexdigest()
