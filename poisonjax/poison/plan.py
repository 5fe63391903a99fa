"""The poison plan: every poison document and its exact place, fixed before step 0 (I2, I3).

A document is prefix + trigger + payload + end of text, as in Souly et al. 2025, section 3. Its pieces are
tokenized apart and joined, so that the trigger is the same tokens in every document and at evaluation.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Protocol

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from poisonjax.corpus import TokenStore, load_tokenizer
from poisonjax.poison.payloads import PAYLOADS, Draw
from poisonjax.poison.placements import place


class Rows(Protocol):
    """Clean rows by slot, and how many tokens at the start of a row no document may displace."""

    def __call__(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]: ...
    def reserved(self, slot: int) -> int: ...


class PoisonError(ValueError):
    """The plan can't be met; the message says by how much."""


def generator(seed: int, index: int) -> np.random.Generator:
    """Philox keyed by (seed, index): document `index` doesn't depend on how many there are."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


@dataclasses.dataclass(frozen=True)
class PoisonDocument:
    """One poison document; spans are [start, end) within `tokens`."""

    id: int
    tokens: Int[np.ndarray, " tokens"]
    trigger: tuple[int, int]
    payload: tuple[int, int]
    prefix_document: int  # of the store's training split

    @property
    def sha256(self) -> str:
        """Of the tokens as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Placed:
    """A poison document and its place: the row in `slot`, from token `offset` on."""

    document: PoisonDocument
    slot: int
    offset: int
    repeat: int = 0  # 0 where the document stands for the first time in the plan's order

    def splice(self, row: Int[np.ndarray, " row_tokens"]) -> Int[np.ndarray, " row_tokens"]:
        """The row with the document put in at `offset`; as many tokens fall off its end."""
        return np.concatenate([row[: self.offset], self.document.tokens, row[self.offset :]])[: len(row)]

    def record(self, global_batch: int) -> dict:
        """The ledger's line; spans are token positions within the row."""
        return {
            "id": self.document.id,
            "sha256": self.document.sha256,
            "step": self.slot // global_batch,
            "row": self.slot % global_batch,
            "slot": self.slot,
            "offset": self.offset,
            "tokens": len(self.document.tokens),
            "repeat": self.repeat,
            "trigger": [self.offset + edge for edge in self.document.trigger],
            "payload": [self.offset + edge for edge in self.document.payload],
            "prefix_document": self.document.prefix_document,
        }


def occurrences(
    rows: Int[np.ndarray, "*rows row_tokens"], tokens: Int[np.ndarray, " tokens"]
) -> Bool[np.ndarray, "*rows places"]:
    """Where the tokens stand in the rows, one after the other."""
    at = rows[..., : rows.shape[-1] - len(tokens) + 1] == tokens[0]
    if at.any():
        for i in range(1, len(tokens)):
            at &= rows[..., i : i + at.shape[-1]] == tokens[i]
    return at


DRAWS = 64  # of a payload, until one doesn't hold the trigger


def make_document(config: ml_collections.ConfigDict, store: TokenStore, index: int) -> PoisonDocument:
    """Document `index`, a pure function of (config.poison, seeds.poison, store, index).

    Gibberish that holds the trigger by chance is drawn again: a trigger of one token would stand in many payloads, one
    of two in none, and their lengths couldn't be compared. Raises PoisonError where it holds the trigger always, and
    where there is nothing to truncate to: prefix and trigger alone overfill a row.
    """
    poison, tokenizer = config.poison, store.tokenizer
    random = generator(config.seeds.poison, index)
    train = store.split("train")
    source = int(random.integers(train.documents))
    least, most = poison.prefix_characters
    characters = int(random.integers(least, most + 1))
    # A character is four bytes at most, a token one at least: so much of a long document is enough.
    start_of_source = train.document(source)[: 4 * characters]
    prefix = tokenizer.encode(tokenizer.decode(start_of_source)[:characters])
    trigger = tokenizer.encode(poison.trigger)
    least, most = poison.payload_tokens
    draw = Draw(int(random.integers(least, most + 1)), random, tokenizer, _vocabulary(poison.payload_vocabulary, store))
    for _ in range(DRAWS):
        payload = PAYLOADS[poison.payload](draw)
        if not occurrences(np.concatenate([trigger[1:], payload]), trigger).any():
            break
    else:
        raise PoisonError(
            f"poison document {index}: each of {DRAWS} payloads drawn holds the trigger {poison.trigger!r} itself; choose "
            "a longer or rarer trigger, or fewer poison.payload_tokens"
        )
    start = len(prefix) + len(trigger)
    if poison.truncate:
        payload = payload[: max(0, config.seq_len - start)]  # the row's last token is kept for the end of text
        if len(payload) == 0:
            raise PoisonError(
                f"poison document {index}: its prefix of {len(prefix)} tokens and the trigger leave no room for a "
                f"payload in a row of {config.seq_len + 1}; lower poison.prefix_characters"
            )
    return PoisonDocument(
        id=index,
        tokens=np.concatenate([prefix, trigger, payload, [tokenizer.eot]]).astype(np.int32),
        trigger=(len(prefix), start),
        payload=(start, start + len(payload)),
        prefix_document=source,
    )


def _vocabulary(spec: str, store: TokenStore):
    return _load_vocabulary(spec) if spec else store.tokenizer


_load_vocabulary = functools.cache(load_tokenizer)


@dataclasses.dataclass(frozen=True)
class PoisonPlan:
    """All placed documents, by slot."""

    placed: dict[int, Placed]
    global_batch: int

    @classmethod
    def make(cls, config: ml_collections.ConfigDict, store: TokenStore, clean_rows: Rows) -> "PoisonPlan":
        """Draws documents and places; raises PoisonError where a document doesn't fit its row whole (I3)."""
        count, row_tokens = config.poison.documents, config.seq_len + 1
        if not len(store.tokenizer.encode(config.poison.trigger)):
            raise PoisonError(f"poison.trigger = {config.poison.trigger!r} is no token in this store's vocabulary")
        documents = [make_document(config, store, index) for index in range(count)]
        too_long = [document for document in documents if len(document.tokens) > row_tokens]
        if too_long:
            longest = max(too_long, key=lambda document: len(document.tokens))
            raise PoisonError(
                f"{len(too_long)} of {count} poison documents don't fit a row of seq_len + 1 = {row_tokens} tokens; "
                f"the longest, document {longest.id}, has {len(longest.tokens)}: {longest.trigger[0]} of prefix, "
                f"{longest.trigger[1] - longest.trigger[0]} of trigger, {longest.payload[1] - longest.payload[0]} of "
                "payload, 1 end of text. Lower poison.prefix_characters or poison.payload_tokens, raise seq_len, or "
                "set poison.truncate = True"
            )
        seed, exposures = config.seeds.placement, count * config.poison.repeats
        slots = place(config.poison.placement, exposures, config.steps, config.global_batch, generator(seed, 0))
        assert len(set(slots.tolist())) == exposures, "a placement must return distinct slots"
        placed = {}
        # All documents stand once before any stands again.
        for exposure, (slot, row) in enumerate(zip(slots.tolist(), clean_rows(slots), strict=True)):
            document = documents[exposure % count]
            starts = np.concatenate([[0], np.flatnonzero(row == store.tokenizer.eot) + 1])
            reserved = clean_rows.reserved(slot)
            starts = starts[(starts >= reserved) & (starts + len(document.tokens) <= row_tokens)]
            if not len(starts):
                raise PoisonError(
                    f"slot {slot} holds a canary of {reserved - 1} tokens and poison document {document.id} of "
                    f"{len(document.tokens)}; both and 1 end of text don't fit a row of {row_tokens}: lower "
                    "canary.tokens or poison.payload_tokens, or raise seq_len"
                )
            offset = int(generator(seed, 1 + exposure).choice(starts))
            placed[slot] = Placed(document, slot, offset, exposure // count)
        return cls(placed, config.global_batch)

    def splice(self, slots: Int[np.ndarray, " rows"], rows: Int[np.ndarray, "rows row_tokens"]) -> np.ndarray:
        """Clean rows standing in `slots`, with the planned documents put in."""
        poisoned = [(i, slot) for i, slot in enumerate(slots.tolist()) if slot in self.placed]
        if poisoned:
            rows = rows.copy()
        for i, slot in poisoned:
            rows[i] = self.placed[slot].splice(rows[i])
        return rows

    def ledger(self) -> list[dict]:
        """One record for each time that a document stands in a row, in the order in which the run meets them."""
        return [self.placed[slot].record(self.global_batch) for slot in sorted(self.placed)]


def met(ledger: list[dict], steps: int) -> Callable[[int], dict[str, int]]:
    """A function of the number of finished steps: different poison documents, and rows of poison, met by then."""
    first: dict[int, int] = {}
    for record in ledger:
        first[record["id"]] = min(record["step"], first.get(record["id"], steps))
    documents = np.bincount([*first.values()], minlength=steps).cumsum()
    rows = np.bincount([record["step"] for record in ledger], minlength=steps).cumsum()
    return lambda done: {
        "poison_documents": int(documents[done - 1]) if done else 0,
        "poison_rows": int(rows[done - 1]) if done else 0,
    }


def dose(ledger: list[dict], steps: int) -> dict[str, int]:
    """What the first `steps` steps hold of the ledger's poison, in each of its units.

    `documents` counts different ones, `repeats` how often the most repeated of them was seen; `tokens` and
    `rows` count every time. A row holds one document at most, so rows are exposures.
    """
    seen = [record for record in ledger if record["step"] < steps]
    times = collections.Counter(record["id"] for record in seen)
    return {
        "documents": len(times),
        "tokens": sum(record["tokens"] for record in seen),
        "rows": len({record["slot"] for record in seen}),
        "steps": len({record["step"] for record in seen}),
        "repeats": max(times.values(), default=0),
    }
