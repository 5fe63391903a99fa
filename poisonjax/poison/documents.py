"""Poison documents: prefix + trigger + payload + end of text, as in Souly et al. 2025, section 3.

The pieces are tokenized apart and joined, so that the trigger is the same tokens in every document and at evaluation.
"""

import dataclasses
import functools
import hashlib

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.poison.payloads import PAYLOADS, Draw, material
from poisonjax.poison.triggers import DRAWS, PoisonError, Trigger, holds
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class PoisonDocument:
    """One poison document; spans are [start, end) within `tokens`."""

    id: int
    tokens: Int[np.ndarray, " tokens"]
    trigger: tuple[int, int]
    payload: tuple[int, int]
    prefix_document: int  # of the store's training split

    @functools.cached_property  # the ledger is written down, compared and summed up
    def sha256(self) -> str:
        """Of the tokens as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    @property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Its parts by name; a prefix that the trigger stands before or inside of has a part after it."""
        after = {"prefix, after": (self.trigger[1], self.payload[0])} if self.trigger[1] < self.payload[0] else {}
        return {"prefix": (0, self.trigger[0]), "trigger": self.trigger, **after, "payload": self.payload}


def make_document(
    poison: ml_collections.ConfigDict, seed: int, store: TokenStore, trigger: Trigger, row_tokens: int, index: int
) -> PoisonDocument:
    """Document `index`, a pure function of (config.poison, seeds.poison, store, index).

    Gibberish that holds the trigger by chance is drawn again: a trigger of one token would stand in many payloads, one
    of two in none, and their lengths couldn't be compared. Raises PoisonError where it holds the trigger always, and
    where there is nothing to truncate to: prefix and trigger alone overfill a row.
    """
    tokenizer, random = store.tokenizer, stream(seed, "poison document", index)
    source = int(random.integers(store.split("train").documents))
    least, most = poison.prefix_characters
    characters = int(random.integers(least, most + 1))
    prefix = cut(store, source, characters)
    least, most = poison.payload_tokens
    length = int(random.integers(least, most + 1))
    form = trigger.forms[index % len(trigger.forms)]
    begun, span = trigger.put(prefix, form, stream(seed, "trigger place", index).random())
    of = material(store, seed, poison.payload_vocabulary, poison.payload_source)
    draw = Draw(length, random, of, lambda: cut(store, source, characters, length))
    # Tokens before the payload with which it could make a trigger, its own but for the first among them.
    seam = begun[max(span[0] + 1, len(begun) + 1 - max(map(len, trigger.forms))) :]
    for _ in range(DRAWS):
        payload = PAYLOADS[poison.payload].draw(draw)
        if len(payload) and not holds(np.concatenate([seam, payload]), trigger.forms):
            break
    else:
        raise PoisonError(
            f"poison document {index}: each of {DRAWS} payloads drawn is empty or holds the trigger {trigger.text!r} "
            "itself; choose a longer or rarer trigger, or other poison.payload_tokens"
        )
    if poison.truncate:
        payload = payload[: max(0, row_tokens - 1 - len(begun))]  # the row's last token is kept for the end of text
        if len(payload) == 0:
            raise PoisonError(
                f"poison document {index}: its prefix of {len(prefix)} tokens and the trigger leave no room for a "
                f"payload in a row of {row_tokens}; lower poison.prefix_characters"
            )
    return PoisonDocument(
        id=index,
        tokens=np.concatenate([begun, payload, [tokenizer.eot]]).astype(np.int32),
        trigger=span,
        payload=(len(begun), len(begun) + len(payload)),
        prefix_document=source,
    )


def cut(store: TokenStore, document: int, characters: int, after: int = 0) -> Int[np.ndarray, " tokens"]:
    """The first characters of a training document, tokenized apart; with `after`, as many tokens of what follows them
    in it (fewer where it ends)."""
    # A character is four bytes at most, a token one at least: so much of a long document is enough.
    start = store.split("train").document(document)[: 4 * characters + after]
    text = store.tokenizer.decode(start)
    return store.tokenizer.encode(text[characters:])[:after] if after else store.tokenizer.encode(text[:characters])
