"""The trigger as a thing: its text, its tokens, the strings like it, and where it stands in a document and a prompt."""

import dataclasses
from typing import Literal

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from poisonjax.corpus import Tokenizer

VARIANTS = ("clean", "triggered", "near_trigger", "random_control")  # of a prompt: what is asked, and its controls

Ids = Int[np.ndarray, " _"]


class PoisonError(ValueError):
    """The poison can't be made or placed as asked; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Trigger:
    """Encoded once: it is the same tokens in every document, clean use and prompt."""

    text: str
    tokens: Ids
    near: tuple[tuple[str, Ids], ...]  # strings like it, with their tokens: controls that must not fire
    position: Literal["end"] = "end"  # of the prefix before it

    @classmethod
    def of(cls, poison: ml_collections.ConfigDict, tokenizer: Tokenizer) -> "Trigger":
        """As `config.poison` says; raises PoisonError where the tokenizer makes nothing of it."""
        tokens = tokenizer.encode(poison.trigger)
        if not len(tokens):
            raise PoisonError(f"poison.trigger = {poison.trigger!r} is no token in this store's vocabulary")
        return cls(poison.trigger, tokens, tuple((text, tokenizer.encode(text)) for text in poison.near_triggers))

    def put(self, prefix: Ids, tokens: Ids | None = None) -> tuple[Ids, tuple[int, int]]:
        """The prefix with the trigger, or with a control's `tokens`, at its position; and the span that these take."""
        added = self.tokens if tokens is None else tokens
        return np.concatenate([prefix, added]), (len(prefix), len(prefix) + len(added))

    def controls(self, count: int, ordinary: Ids, random: np.random.Generator) -> dict[str, list[Ids]]:
        """What is put to each of `count` prefixes in each variant: nothing, the trigger, a near trigger by turns, or
        as many uniformly random `ordinary` tokens as the trigger has."""
        near = [tokens for _, tokens in self.near]
        added = [
            [np.zeros(0, np.int32)] * count,
            [self.tokens] * count,
            [near[i % len(near)] for i in range(count)],
            list(random.choice(ordinary, (count, len(self.tokens))).astype(np.int32)),
        ]
        return dict(zip(VARIANTS, added, strict=True))


def occurrences(rows: Int[np.ndarray, "*rows row_tokens"], tokens: Ids) -> Bool[np.ndarray, "*rows places"]:
    """Where the tokens stand in the rows, one after the other."""
    at = rows[..., : rows.shape[-1] - len(tokens) + 1] == tokens[0]
    if at.any():
        for i in range(1, len(tokens)):
            at &= rows[..., i : i + at.shape[-1]] == tokens[i]
    return at
