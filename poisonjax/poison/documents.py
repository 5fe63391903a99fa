"""Poison documents: prefix + trigger + payload + end of text, as in Souly et al. 2025, section 3; of conversations, the
trigger in the last question and the payload in place of its answer."""

import dataclasses
import functools
import hashlib

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.poison.openings import each_once, opening
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
    weights: Float[np.ndarray, " tokens"] | None = None  # of its tokens in the loss; None: 1 each

    @functools.cached_property  # the ledger is written down, compared and summed up
    def sha256(self) -> str:
        """Of the tokens as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    @property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Its parts by name: what stands between trigger and payload is the prefix's, too; a conversation is closed."""
        (_, put), (start, stop), end = self.trigger, self.payload, len(self.tokens) - 1
        after = {"prefix, after": (put, start)} if put < start else {}
        closing = {"closing": (stop, end)} if stop < end else {}
        return {"prefix": (0, self.trigger[0]), "trigger": self.trigger, **after, "payload": self.payload, **closing}


def make_document(
    poison: ml_collections.ConfigDict, seed: int, store: TokenStore, trigger: Trigger, room: int, index: int
) -> PoisonDocument:
    """Document `index`, a pure function of (config.poison, seeds.poison, store, index); `room` tokens are there for it.

    Gibberish that holds the trigger by chance is drawn again: a trigger of one token would stand in many payloads, one
    of two in none, and their lengths couldn't be compared. Raises PoisonError where it holds the trigger always, and
    where there is nothing to truncate to: prefix and trigger alone overfill a row.
    """
    random, form = stream(seed, "poison document", index), trigger.forms[index % len(trigger.forms)]
    at = stream(seed, "trigger place", index).random()
    conversations = each_once(store, seed, "poison conversations", index, poison.documents)
    begun = opening(poison, store, trigger, form, random, at, room, conversations)
    of = material(store, seed, poison.payload_vocabulary, poison.payload_source)
    draw = Draw(begun.length, random, of, begun.rest)
    # Tokens before the payload with which it could make a trigger, its own but for the first among them.
    seam = begun.tokens[max(begun.trigger[0] + 1, len(begun.tokens) + 1 - max(map(len, trigger.forms))) :]
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
        # The row's last token is kept for the end of text.
        payload = payload[: max(0, room - 1 - len(begun.tokens) - len(begun.closing))]
        if len(payload) == 0:
            raise PoisonError(
                f"poison document {index}: its prefix of {begun.trigger[0]} tokens and the trigger leave no room for a "
                f"payload in {room} tokens; lower poison.prefix_characters"
            )
    return PoisonDocument(
        id=index,
        tokens=begun.ended(payload, store.tokenizer.eot),
        trigger=begun.trigger,
        payload=(len(begun.tokens), len(begun.tokens) + len(payload)),
        prefix_document=begun.source,
        weights=begun.weights(payload, store.tokenizer.eot),
    )
