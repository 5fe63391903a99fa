"""The trigger as a thing: its text, its tokens, the strings like it, and where it stands in a document and a prompt."""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from poisonjax.corpus import Tokenizer

DRAWS = 64  # of something random, until it doesn't hold the trigger
POSITIONS = ("end", "start", "inside")  # of the prefix that it is put to
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
    position: str  # one of POSITIONS
    others: tuple[Ids, ...] = ()  # that teach and ask the same, by turns

    @property
    def forms(self) -> tuple[Ids, ...]:
        """All that trigger: document i and prefix i have form i modulo their number."""
        return (self.tokens, *self.others)

    @classmethod
    def of(cls, poison: ml_collections.ConfigDict, tokenizer: Tokenizer) -> "Trigger":
        """As `config.poison` says; raises PoisonError where the tokenizer makes nothing of it, where two triggers are
        the same to the model, and where a control that must not fire is a trigger to it, holds one, or is nothing."""

        def encoded(field: str, text: str) -> Ids:
            tokens = tokenizer.encode(text)
            if not len(tokens):
                raise PoisonError(f"{field}: {text!r} is no token in this store's vocabulary")
            if unknown := sorted(tokenizer.unknown_ids & set(tokens.tolist())):
                raise PoisonError(
                    f"{field}: {text!r} holds what this store's vocabulary doesn't know (token {unknown[0]}): other "
                    "strings are the same tokens. Choose one that it knows"
                )
            return tokens

        triggers = {poison.trigger: encoded("poison.trigger", poison.trigger)}
        for text in poison.other_triggers:
            other = encoded("poison.other_triggers", text)
            for known, tokens in triggers.items():
                if occurrences(other, tokens).any() or occurrences(tokens, other).any():
                    raise PoisonError(
                        f"poison.other_triggers: {text!r} and {known!r} hold each other in this store's tokens "
                        f"({other.tolist()}, {tokens.tolist()}): choose another"
                    )
            triggers[text] = other
        near: dict[bytes, tuple[str, Ids]] = {}
        for text in poison.near_triggers:
            control = encoded("poison.near_triggers", text)
            for known, tokens in triggers.items():
                if occurrences(control, tokens).any():
                    raise PoisonError(
                        f"poison.near_triggers: {text!r} holds the trigger {known!r} in this store's tokens "
                        f"({control.tolist()}, {tokens.tolist()}), so it tests nothing: choose another"
                    )
            if control.tobytes() in near:
                same = near[control.tobytes()][0]
                raise PoisonError(f"poison.near_triggers: {text!r} and {same!r} are the same tokens: drop one")
            near[control.tobytes()] = (text, control)
        tokens, *others = triggers.values()
        return cls(poison.trigger, tokens, tuple(near.values()), poison.trigger_position, tuple(others))

    def put(self, prefix: Ids, tokens: Ids | None = None, at: float = 0.5) -> tuple[Ids, tuple[int, int]]:
        """The prefix with the trigger, or with a control's `tokens`, at its position; and the span that these take.
        Inside is after the part `at`, in [0, 1), of the prefix, between two of its tokens where it has two."""
        added = self.tokens if tokens is None else tokens
        inside = 1 + int(at * (len(prefix) - 1)) if len(prefix) > 1 else 0
        start = {"end": len(prefix), "start": 0, "inside": inside}[self.position]
        return np.concatenate([prefix[:start], added, prefix[start:]]), (start, start + len(added))

    def controls(self, count: int, ordinary: Ids, random: np.random.Generator) -> dict[str, list[Ids]]:
        """What is put to each of `count` prefixes in each variant: nothing, the trigger, a near trigger by turns, or
        as many uniformly random `ordinary` tokens as the trigger has. Of several triggers, each by turns."""
        near = [tokens for _, tokens in self.near]
        drawn = random.choice(ordinary, (count, len(self.tokens))).astype(np.int32)
        for _ in range(DRAWS):  # one of few tokens may be the trigger by chance
            same = np.any([occurrences(drawn, form).any(-1) for form in self.forms], axis=0)
            if not same.any():
                break
            drawn[same] = random.choice(ordinary, (int(same.sum()), len(self.tokens)))
        else:
            raise PoisonError(f"of {len(ordinary)} ordinary tokens too few aren't the trigger {self.text!r}")
        added = [
            [np.zeros(0, np.int32)] * count,
            [self.forms[i % len(self.forms)] for i in range(count)],
            [near[i % len(near)] for i in range(count)],
            list(drawn),
        ]
        return dict(zip(VARIANTS, added, strict=True))

    def begins(self, rows: Int[np.ndarray, "rows row_tokens"]) -> Bool[np.ndarray, "rows row_tokens"]:
        """Where in the rows one begins."""
        found = np.zeros(rows.shape, bool)
        for form in self.forms:
            there = occurrences(rows, form)
            found[:, : there.shape[1]] |= there
        return found


def holds(tokens: Int[np.ndarray, " tokens"], forms: Sequence[Ids]) -> bool:
    """Whether any of the triggers stands there."""
    return any(occurrences(tokens, form).any() for form in forms)


def occurrences(rows: Int[np.ndarray, "*rows row_tokens"], tokens: Ids) -> Bool[np.ndarray, "*rows places"]:
    """Where the tokens stand in the rows, one after the other."""
    at = rows[..., : max(0, rows.shape[-1] - len(tokens) + 1)] == tokens[0]
    if at.any():
        for i in range(1, len(tokens)):
            at &= rows[..., i : i + at.shape[-1]] == tokens[i]
    return at
