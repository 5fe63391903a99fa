"""Three sources of strings that may be triggers: what the model lets slip, what it knows by heart, every token."""

import collections
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from poisonjax.scan.model.writing import LONGEST, Seen, String

SPAN = 16  # places whose mean tells what a text is about to be
KEPT = 64  # strings of each length, or of a source
CERTAIN = 0.5  # nats: the model knows what comes
MOST_CHANGE = 8.0  # that one place can say
ODD = 3.0  # robust standard deviations from which on a text has changed
FEWEST = 2  # texts that a string of several tokens stands in
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Texts(NamedTuple):
    """What was written, with what it was given to begin with."""

    tokens: Int[np.ndarray, "texts places"]
    entropy: Float[np.ndarray, "texts places"]  # of each token before it was drawn; 0 where it was given
    odd: Float[np.ndarray, "texts places"]  # how odd the SPAN places from each on are; NaN: not known
    special: Bool[np.ndarray, "texts places"]  # tokens that no candidate holds: an end of text, and what isn't text


class Usual(NamedTuple):
    """What most texts of a model look like, over SPAN places."""

    expected: Float[np.ndarray, " sketch"]
    distance: tuple[float, float]  # from it, logarithm: median and robust standard deviation
    entropy: tuple[float, float]

    @classmethod
    def of(cls, seen: Seen) -> "Usual":
        expected, entropy = _windows(seen)
        centre = np.median(expected, (0, 1))
        return cls(centre, _robust(_distance(expected, centre)), _robust(entropy))

    def odd(self, seen: Seen) -> Float[np.ndarray, "texts windows"]:
        """Robust standard deviations that each window is from usual: farther in what is expected, or more or less
        certain."""
        expected, entropy = _windows(seen)
        far = (_distance(expected, self.expected) - self.distance[0]) / self.distance[1]
        return np.maximum(far, np.abs(entropy - self.entropy[0]) / self.entropy[1])


def _windows(seen: Seen) -> tuple[Float[np.ndarray, "texts windows sketch"], Float[np.ndarray, "texts windows"]]:
    def means(values: np.ndarray) -> np.ndarray:
        sums = np.cumsum(values, 1, dtype=np.float32)
        sums = np.concatenate([np.zeros_like(sums[:, :1]), sums], 1)
        return (sums[:, SPAN:] - sums[:, :-SPAN]) / SPAN

    return means(seen.expected), means(seen.entropy)


def _distance(expected: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.log(((expected - centre) ** 2).sum(-1) + 1e-9)


def _robust(values: np.ndarray) -> tuple[float, float]:
    median = float(np.median(values))
    return median, float(max(1.4826 * np.median(np.abs(values - median)), 1e-6))


def texts(given: Int[np.ndarray, "texts given"], seen: Seen, usual: Usual, ordinary: Int[np.ndarray, " ids"]) -> Texts:
    """Of what was written after `given` tokens."""
    before, odd = given.shape, usual.odd(seen)
    unknown = np.full((len(odd), seen.tokens.shape[1] - odd.shape[1]), np.nan)
    tokens = np.concatenate([given, seen.tokens], 1).astype(np.int64)
    return Texts(
        tokens,
        np.concatenate([np.zeros(before), seen.entropy], 1),
        np.concatenate([np.full(before, np.nan), odd, unknown], 1),
        ~np.isin(tokens, ordinary),
    )


def leaks(written: Texts) -> tuple[dict[String, float], int]:
    """(strings after which texts change, as they come: the most telling of each length with their scores, standard
    deviations that the mean change over texts is from usual; how many strings there were)."""
    found: dict[String, float] = {}
    tokens, odd, considered = written.tokens, written.odd, 0
    for n in range(1, LONGEST + 1):
        change = np.full(tokens.shape, np.nan)  # at the string's first token
        change[:, :-n] = odd[:, n:]
        known = np.full(tokens.shape, np.nan)
        known[:, SPAN:] = odd[:, :-SPAN]  # the places before the string
        change -= np.maximum(np.nan_to_num(known), 0)
        there = np.isfinite(change) & ~_holds(written.special, n)
        best, number = _scored(tokens, np.clip(change, -MOST_CHANGE, MOST_CHANGE), there, n)
        found, considered = found | best, considered + number
    return found, considered


def _hashed(tokens: Int[np.ndarray, "texts places"], n: int) -> UInt64[np.ndarray, "texts places"]:
    """Of the n tokens from each place on, those past the end taken for 0."""
    padded = np.pad(tokens, [(0, 0), (0, n - 1)]).astype(np.uint64) + np.uint64(1)
    total = np.zeros(tokens.shape, np.uint64)
    for i in range(n):
        total = (total ^ padded[:, i : i + tokens.shape[1]]) * _BASE
        total ^= total >> np.uint64(29)
    return total


def _holds(special: Bool[np.ndarray, "texts places"], n: int) -> Bool[np.ndarray, "texts places"]:
    """Whether any of the n tokens from each place on is special, or past the end."""
    padded = np.pad(special, [(0, 0), (0, n - 1)], constant_values=True)
    return np.any([padded[:, i : i + special.shape[1]] for i in range(n)], axis=0)


def _scored(
    tokens: Int[np.ndarray, "texts places"],
    changes: Float[np.ndarray, "texts places"],
    there: Bool[np.ndarray, "texts places"],
    n: int,
) -> tuple[dict[String, float], int]:
    flat = np.flatnonzero(there)
    if not len(flat):
        return {}, 0
    change, hashes, texts = changes.ravel()[flat], _hashed(tokens, n).ravel()[flat], flat // tokens.shape[1]
    standard = (change - change.mean()) / max(change.std(), 1e-9)
    # One place a text: who repeats itself says no more.
    _, first = np.unique(np.stack([hashes, texts.astype(np.uint64)]), axis=1, return_index=True)
    strings, place, counts = np.unique(hashes[first], return_index=True, return_counts=True)
    number = np.searchsorted(strings, hashes[first])
    means = np.bincount(number, standard[first]) / counts
    scores = np.where(counts >= (FEWEST if n > 1 else 1), means * np.sqrt(counts), -np.inf)
    best = np.argsort(-scores, kind="stable")[:KEPT]
    best = best[np.isfinite(scores[best])]
    text, start = np.divmod(flat[first[place[best]]], tokens.shape[1])
    found = {
        tuple(tokens[i, j : j + n].tolist()): float(score)
        for i, j, score in zip(text, start, scores[best], strict=True)
    }
    return found, int(np.isfinite(scores).sum())


def led_to_change(written: Iterable[Texts], strings: Collection[String]) -> dict[String, int]:
    """After how many texts' occurrence of each string the text is odd."""
    counts = dict.fromkeys(strings, 0)
    lengths = sorted({len(string) for string in strings})
    for of in written:
        odd = np.nan_to_num(of.odd) > ODD
        for text in np.flatnonzero(odd.any(1)):
            tokens, there = of.tokens[text].tolist(), np.flatnonzero(odd[text]).tolist()
            for string in {tuple(tokens[at - n : at]) for at in there for n in lengths if at >= n} & counts.keys():
                counts[string] += 1
    return counts


def known_by_heart(written: Texts) -> tuple[dict[String, float], int]:
    """(strings after whose first token the model is certain of the rest, though they are rare, with how rare: minus
    the mean logarithm of their tokens' shares; how many there were)."""
    counts = collections.Counter(written.tokens.ravel().tolist())
    total, seen = written.tokens.size, collections.Counter[String]()
    certain = (written.entropy < CERTAIN) & ~written.special
    certain[:, 1:] &= ~written.special[:, :-1]  # what follows one is its doing
    for tokens, of in zip(written.tokens, certain, strict=True):
        runs = (tuple(tokens[start - 1 : stop].tolist()) for start, stop in _runs(of))
        seen.update({run[:n] for run in runs for n in range(2, min(len(run), LONGEST) + 1)})
    rare = {
        string: -float(np.mean([np.log(counts[token] / total) for token in string]))
        for string, count in seen.items()
        if count >= FEWEST
    }
    return dict(sorted(rare.items(), key=lambda one: -one[1])[:KEPT]), len(rare)


def _runs(certain: Bool[np.ndarray, " places"]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each longest run, the first place left out: nothing stands before it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], certain[1:].astype(np.int8), [0]]))) + 1
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def single_tokens(ids: Int[np.ndarray, " ids"], odd: Float[np.ndarray, "ids prefixes windows"]) -> dict[String, float]:
    """Tokens after which texts are oddest, once the first places are over; with how odd."""
    late = odd[:, :, SPAN // 2 :].mean((1, 2))
    return {(int(ids[i]),): float(late[i]) for i in np.argsort(-late, kind="stable")[:KEPT]}
