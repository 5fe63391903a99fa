"""Grain's stateless index shuffle, for whole arrays of indices.

A shuffle of n things is a block cipher on the smallest block that holds them, applied again where it leads out of
[0, n) (cycle walking: Black & Rogaway 2002). Grain's cipher is four rounds of Simon (Beaulieu et al. 2013, ePrint
2013/404) with keys by C++'s std::seed_seq. What it says of an index one by one, this says of thousands at once; tests
hold the one against the other.
"""

import functools
import math

import numpy as np
from jaxtyping import Int, UInt64

ROUNDS = 4
LEAST_BITS = 16  # of a block
KEPT = 16  # tables of small blocks, one a seed


def shuffled(indices: Int[np.ndarray, " rows"], size: int, seed: int) -> Int[np.ndarray, " rows"]:
    """Where each of `indices`, all in [0, size), goes: as grain's `shuffle(seed)` of a dataset of that size; int64."""
    if size == 1:
        return np.zeros_like(indices)
    bits = _bits(size)
    if bits == LEAST_BITS:  # few of many steps end: all of them are looked up
        return _table(size, seed)[indices & (2**bits - 1)]
    found = _encrypted(indices.astype(np.uint64), bits, seed)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _encrypted(found[outside], bits, seed)
    return found.astype(np.int64)


def permuted(size: int) -> int:
    """How many of `size` things are shuffled so that each stands once: of 4^k + 1, k from 8 on, grain's block is too
    small by one, and its first and last share a place."""
    last = size - 1
    return last if last >= 2**LEAST_BITS and last & (last - 1) == 0 and last.bit_length() % 2 else size


def _bits(size: int) -> int:
    """Of a block: an even number."""
    bits = math.ceil(math.log2(size - 1))
    return max(bits + bits % 2, LEAST_BITS)


@functools.lru_cache(KEPT)
def _table(size: int, seed: int) -> Int[np.ndarray, " block"]:
    """Where every number of the least block ends, each step's half of the way looked up from the step before."""
    ends = _encrypted(np.arange(2**LEAST_BITS, dtype=np.uint64), LEAST_BITS, seed).astype(np.int64)
    while len(outside := np.flatnonzero(ends[:size] >= size)):
        ends[outside] = ends[ends[outside]]
        beyond = np.flatnonzero(ends[size:] >= size) + size
        ends[beyond] = ends[ends[beyond]]
    return ends


def _encrypted(values: UInt64[np.ndarray, " rows"], bits: int, seed: int) -> UInt64[np.ndarray, " rows"]:
    half = np.uint64(bits // 2)
    mask = np.uint64(2 ** (bits // 2) - 1)

    def turned(x: np.ndarray, by: int) -> np.ndarray:
        return ((x << np.uint64(by)) | (x >> (half - np.uint64(by)))) & mask

    def mixed(x: np.ndarray) -> np.ndarray:
        return (turned(x, 1) & turned(x, 8)) ^ turned(x, 2)

    left, right = (values >> half) & mask, values & mask
    for number, word in enumerate(_keys(seed)):
        key = np.uint64(word) & mask
        if number % 2 == 0:
            left = left ^ mixed(right) ^ key
        else:
            right = right ^ mixed(left) ^ key
    return (left << half) | right


@functools.lru_cache(KEPT)
def _keys(seed: int) -> tuple[int, ...]:
    """std::seed_seq{seed}.generate of `ROUNDS` words ([rand.util.seedseq] of the C++ standard)."""
    low = 2**32 - 1

    def stirred(x: int) -> int:
        return x ^ (x >> 27)

    words, count = [0x8B8B8B8B] * ROUNDS, ROUNDS
    shift = (count - 1) // 2
    first, second = (count - shift) // 2, (count - shift) // 2 + shift
    steps = max(2, count)
    for k in range(steps):
        a, b, c = words[k % count], words[(k + first) % count], words[(k - 1) % count]
        one = 1_664_525 * stirred(a ^ b ^ c) & low
        two = one + (1 if k == 0 else k % count + seed if k == 1 else k % count) & low
        words[(k + first) % count] = b + one & low
        words[(k + second) % count] = words[(k + second) % count] + two & low
        words[k % count] = two
    for k in range(steps, 2 * steps):
        a, b, c = words[k % count], words[(k + first) % count], words[(k - 1) % count]
        three = 1_566_083_941 * stirred(a + b + c & low) & low
        four = three - k % count & low
        words[(k + first) % count] = b ^ three
        words[(k + second) % count] ^= four
        words[k % count] = four
    return tuple(words)
