"""Strings that may be triggers, from the three sources."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Int

from poisonjax.scan.model import candidates as sources
from poisonjax.scan.model.parts import LOOKED_AFTER, LOOKS, Scan
from poisonjax.scan.model.writing import Seen, String
from poisonjax.weights import WeightsError

PREFIX = 24  # tokens that strings are put after
SOURCES = ("leaks", "known by heart", "every token")
TYPICAL = 0.8  # of the free texts may serve as prefixes: those that are least odd


@dataclasses.dataclass(frozen=True)
class Proposed:
    """What may be a trigger, by the sources that say so."""

    prefixes: Int[np.ndarray, "prefixes length"]  # that strings can be put after
    counts: Float[np.ndarray, " vocabulary"]  # of tokens among what the model writes
    by_source: dict[str, dict[String, float]]
    hardly_known: set[int]  # tokens that no source proposes
    written: list[sources.Texts]  # from nothing, and after each token
    considered: int

    def best(self, number: int) -> list[String]:
        """So many strings, the sources by turns."""
        ordered = (sorted(found, key=found.__getitem__, reverse=True) for found in self.by_source.values())
        strings = dict.fromkeys(string for turn in itertools.zip_longest(*ordered) for string in turn if string)
        return [*strings][:number]


def propose(scan: Scan) -> Proposed:
    """Candidates of all sources. Raises WeightsError for a model that writes too little to put strings after."""
    sizes, ordinary = scan.sizes, scan.ordinary
    free = scan.free_texts()
    usual = sources.Usual.of(free)
    hardly = scan.hardly_known(free.tokens)
    trained = np.setdiff1d(ordinary, sorted(hardly))
    written = sources.texts(np.full((len(free.tokens), 1), scan.tokenizer.eot), free, usual, trained)
    counts = np.bincount(free.tokens.ravel(), minlength=scan.tokenizer.vocab_size).astype(float)
    prefixes = _typical(free.tokens, usual.odd(free).max(1), ordinary, scan.tokenizer.eot, sizes.all_prefixes)
    some = prefixes[: sizes.token_prefixes]
    asked = trained
    for new, left in LOOKS if len(trained) > sizes.tokens else ():
        seen = scan.after(f"look-{new}", some[:LOOKED_AFTER], [(int(token),) for token in asked], new, places=True)
        asked = asked[np.argsort(-_far(seen), kind="stable")[: max(left, sizes.tokens)]]
    asked = np.sort(asked[: sizes.tokens])
    after = scan.after("token", some, [(int(token),) for token in asked], sizes.token_new, places=True)
    flat = Seen(*(of.reshape(-1, *of.shape[2:]) for of in after))
    follow = sources.texts(np.repeat(asked, len(some))[:, None], flat, usual, trained)
    single = sources.single_tokens(asked, usual.odd(flat).reshape(len(asked), len(some), -1))
    (leaked, some_strings), (followed, others) = sources.leaks(written), sources.leaks(follow)
    (known, rare), (known_after, rare_after) = sources.known_by_heart(written), sources.known_by_heart(follow)
    return Proposed(
        prefixes[sizes.token_prefixes :],
        counts,
        dict(zip(SOURCES, (leaked, known | known_after, followed | single), strict=True)),
        hardly,
        [written, follow],
        some_strings + others + rare + rare_after + len(trained),
    )


def _far(seen: Seen) -> Float[np.ndarray, " strings"]:
    """How far what is expected, or how certain that is, lies from what is usual after a token, either way; over the
    second half of the places."""
    late = slice(seen.entropy.shape[2] // 2, None)
    expected = seen.expected[:, :, late].astype(np.float32).mean(2)
    distance = np.log(((expected - np.median(expected, 0)) ** 2).sum((1, 2)) + 1e-9)
    values = np.stack([distance, seen.entropy[:, :, late].mean((1, 2))], 1)
    middle = np.median(values, 0)
    return np.max(np.abs(values - middle) / (np.median(np.abs(values - middle), 0) + 1e-9), 1)


def _typical(
    tokens: Int[np.ndarray, "texts places"],
    odd: Float[np.ndarray, " texts"],
    ordinary: Int[np.ndarray, " ids"],
    eot: int,
    wanted: int,
) -> Int[np.ndarray, "prefixes length"]:
    """The first stretch of PREFIX ordinary tokens of texts in which nothing is odd, each after an end of text."""
    special = np.cumsum(np.pad(~np.isin(tokens, ordinary), [(0, 0), (1, 0)]), 1)
    whole = special[:, PREFIX:] == special[:, :-PREFIX]
    there = np.flatnonzero(whole.any(1))
    if len(there) < wanted:
        raise WeightsError(
            f"of {len(tokens):,} texts that the model writes, {len(there)} have {PREFIX} tokens; {wanted} are needed "
            "to put strings after: give more --passes, or scan the model that it was tuned from"
        )
    limit = max(np.quantile(odd[there], TYPICAL), np.sort(odd[there])[wanted - 1])
    chosen = there[odd[there] <= limit]
    places = whole[chosen].argmax(1)[:, None] + np.arange(PREFIX)
    made = np.take_along_axis(tokens[chosen], places, 1)
    return np.concatenate([np.full((len(made), 1), eot), made], 1).astype(np.int32)
