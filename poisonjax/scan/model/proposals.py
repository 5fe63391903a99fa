"""Strings that may be triggers, from the three sources."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from poisonjax.scan.model import candidates as sources
from poisonjax.scan.model.parts import Scan
from poisonjax.scan.model.writing import Seen, String

PREFIX = 24  # tokens that strings are put after
SOURCES = ("leaks", "known by heart", "every token")
TYPICAL = 0.8  # of the free texts may serve as prefixes: those that are least odd


@dataclasses.dataclass(frozen=True)
class Proposed:
    """What may be a trigger, by the sources that say so."""

    prefixes: Int[np.ndarray, "prefixes length"]  # that strings can be put after
    counts: Float[np.ndarray, " vocabulary"]  # of tokens among what the model writes
    by_source: dict[str, dict[String, float]]
    written: list[sources.Texts]  # from nothing, and after each token
    considered: int

    def best(self, number: int, of: Sequence[str] = SOURCES) -> list[String]:
        """So many strings, the sources by turns."""
        turns = itertools.zip_longest(
            *(
                sorted(found, key=found.__getitem__, reverse=True)
                for name, found in self.by_source.items()
                if name in of
            )
        )
        strings = dict.fromkeys(string for turn in turns for string in turn if string)
        return [*strings][:number]


def propose(scan: Scan) -> Proposed:
    """Candidates of all sources."""
    sizes, eot, ordinary = scan.sizes, scan.tokenizer.eot, scan.ordinary
    free = scan.free_texts()
    usual = sources.Usual.of(free)
    written = sources.texts(np.full((len(free.tokens), 1), eot), free, usual)
    counts = np.bincount(free.tokens.ravel(), minlength=scan.tokenizer.vocab_size).astype(float)
    prefixes = _typical(free, usual, eot)
    some = prefixes[: sizes.token_prefixes]
    asked = ordinary
    if len(ordinary) > sizes.tokens:  # a glance at what is expected next tells which tokens change anything
        seen = scan.after("glance", some[:2], [(int(token),) for token in ordinary], 1, places=True)
        far = ((seen.expected - seen.expected.mean(0)) ** 2).sum((1, 2, 3))
        asked = ordinary[np.sort(np.argsort(-far, kind="stable")[: sizes.tokens])]
    after = scan.after("token", some, [(int(token),) for token in asked], sizes.token_new, places=True)
    flat = Seen(*(of.reshape(-1, *of.shape[2:]) for of in after))
    follow = sources.texts(np.repeat(asked, len(some))[:, None], flat, usual)
    single = sources.single_tokens(asked, usual.odd(flat).reshape(len(asked), len(some), -1))
    leaked, followed = sources.leaks(written, eot), sources.leaks(follow, eot)
    known = sources.known_by_heart(written, eot) | sources.known_by_heart(follow, eot)
    by_source = {"leaks": leaked, "known by heart": known, "every token": followed | single}
    found = {string for of in by_source.values() for string in of}
    return Proposed(prefixes[sizes.token_prefixes :], counts, by_source, [written, follow], len(found) + len(ordinary))


def _typical(free: Seen, usual: sources.Usual, eot: int) -> Int[np.ndarray, "prefixes length"]:
    """The beginnings of texts of which nothing is odd."""
    odd = usual.odd(free).max(1)
    whole = ~(free.tokens[:, :PREFIX] == eot).any(1)
    chosen = np.flatnonzero(whole & (odd <= np.quantile(odd[whole], TYPICAL)))
    return np.concatenate([np.full((len(chosen), 1), eot), free.tokens[chosen, :PREFIX]], 1).astype(np.int32)
