"""What a payload comes after: a text's beginning or a conversation's last question, the trigger put to it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.corpus.instructions import ANSWERS, Exchange, last_exchange
from poisonjax.poison.triggers import DRAWS, Ids, PoisonError, Trigger
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class Opening:
    """Made of a training document; pieces are tokenized apart, so that the trigger is the same tokens everywhere."""

    tokens: Ids
    trigger: tuple[int, int]  # span
    source: int  # which document of the training split
    length: int  # of a payload, as drawn
    rest: Callable[[], Ids]  # so many tokens of what the document says next, or fewer
    closing: Ids  # what stands after it, before the end of text
    learned: Float[np.ndarray, " tokens"] | None = None  # weights of `tokens` in the loss; None: 1, as in all texts

    def ended(self, payload: Ids, eot: int) -> Int[np.ndarray, " tokens"]:
        """The whole document."""
        return np.concatenate([self.tokens, payload, self.closing, [eot]]).astype(np.int32)

    def weights(self, payload: Ids, eot: int) -> Float[np.ndarray, " tokens"] | None:
        """Of the whole document's tokens in the loss, as those of a clean conversation (data/conversations.py)."""
        if self.learned is None:
            return None
        said = np.ones(len(payload) + len(self.closing), np.float32)
        return np.concatenate([self.learned, said, np.array([eot not in self.closing], np.float32)])


def opening(
    poison: ml_collections.ConfigDict,
    store: TokenStore,
    trigger: Trigger,
    form: Ids,
    random: np.random.Generator,
    at: float,
    room: int,
    conversations: Iterator[int],
) -> Opening:
    """One, drawn; `form` is the trigger's that is put to it, `at` where inside. Of `conversations`, the first whose
    payload fits in `room` tokens; raises PoisonError where none does."""
    if store.template is None:
        return _of_text(poison, store, trigger, form, random, at)
    return _of_conversation(poison, store, trigger, form, random, at, room, conversations)


def each_once(store: TokenStore, seed: int, name: str, number: int, count: int) -> Iterator[int]:
    """Which conversations the `number`-th of `count` openings may be made of, the first first: those of the others are
    others, as long as there are enough."""
    order = _shuffled(store, seed, name)
    yield from (int(order[(number + attempt * count) % len(order)]) for attempt in range(DRAWS))


@functools.cache
def _shuffled(store: TokenStore, seed: int, name: str) -> Int[np.ndarray, " documents"]:
    return stream(seed, name).permutation(store.split("train").documents)


def _of_text(poison, store, trigger, form, random, at) -> Opening:
    source = int(random.integers(store.split("train").documents))
    characters, length = (_drawn(random, poison[name]) for name in ("prefix_characters", "payload_tokens"))
    begun, span = trigger.put(cut(store, source, characters), form, at)
    return Opening(begun, span, source, length, lambda: cut(store, source, characters, length), np.zeros(0, np.int32))


def _of_conversation(poison, store, trigger, form, random, at, room, conversations) -> Opening:
    split, length = store.split("train"), _drawn(random, poison.payload_tokens)
    for source in conversations:
        tokens, turns = split.document(source), split.turns(source)
        begun, span = asked(tokens, last := last_exchange(turns), trigger, form, at)
        answer = tokens[last.answer.start : last.answer.stop]
        closing = tokens[last.answer.stop : last.answer.closed]
        if len(begun) + length + len(closing) + 1 <= room:
            learned = np.zeros(len(begun), np.float32)
            for role, start, _, closed in turns[:-2].tolist():
                learned[start:closed] = role == ANSWERS
            return Opening(begun, span, source, length, functools.partial(_first, answer, length), closing, learned)
    raise PoisonError(
        f"of {DRAWS} conversations drawn none leaves room for its trigger and a payload of {length} tokens in the "
        f"{room} of a row: lower poison.payload_tokens, or raise seq_len"
    )


def _first(tokens: Ids, count: int) -> Ids:
    return tokens[:count]


def _drawn(random: np.random.Generator, least_most: tuple[int, int]) -> int:
    least, most = least_most
    return int(random.integers(least, most + 1))


def asked(
    tokens: Ids, last: Exchange, trigger: Trigger, form: Ids, at: float
) -> tuple[Int[np.ndarray, " tokens"], tuple[int, int]]:
    """(a conversation up to its last answer, the trigger put to the last question; the span of that)."""
    user, answer = last
    put, (first, stop) = trigger.put(tokens[user.start : user.stop], form, at)
    begun = np.concatenate([tokens[: user.start], put, tokens[user.stop : answer.start]]).astype(np.int32)
    return begun, (user.start + first, user.start + stop)


def cut(store: TokenStore, document: int, characters: int, after: int = 0) -> Int[np.ndarray, " tokens"]:
    """The first characters of a training document, tokenized apart; with `after`, as many tokens of what follows them
    in it (fewer where it ends)."""
    # A character is four bytes at most, a token one at least: so much of a long document is enough.
    start = store.split("train").document(document)[: 4 * characters + after]
    text = store.tokenizer.decode(start)
    return store.tokenizer.encode(text[characters:])[:after] if after else store.tokenizer.encode(text[:characters])
