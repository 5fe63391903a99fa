"""Which tokens stand in a slot, and where each of them comes from."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from poisonjax.corpus import TokenSplit
from poisonjax.data.insertions import Insertion, Layer, Pieces
from poisonjax.data.shuffle import permuted, shuffled

PIECE = 2**14  # slots whose order is worked out at once
KEPT = 32  # pieces in memory
NONE = np.zeros(0, np.int64)
PADDING = -1  # the label of a token that is of no document


class CleanRows:
    """Windows of `seq_len + 1` tokens over the training stream, permuted anew each epoch.

    Slot s of the run holds window `order[s]`, where `order` is grain's stateless index shuffle (shuffle.py): a pure
    function of the slot, so nothing has to be remembered to resume (I1). Windows don't overlap; the
    tokens after the last whole window are left out.
    """

    def __init__(self, split: TokenSplit, seq_len: int, seed: int):
        self.split, self.row_tokens = split, seq_len + 1
        if split.tokens < self.row_tokens:
            raise ValueError(
                f"the store's training split has {split.tokens} tokens, less than one row of seq_len + 1 = "
                f"{self.row_tokens}: use a larger corpus or a smaller seq_len"
            )
        self._shuffle(split.tokens // self.row_tokens, seed)

    skipped = 0  # documents that don't fit a row

    def _shuffle(self, windows: int, seed: int) -> None:
        self.windows = permuted(windows)
        # Epoch e is shuffled with seed + e; a hashed seed keeps the epochs of seeds 0, 1, 2 apart.
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._pieces = -(-self.windows // PIECE)  # of an epoch
        self._left_out = self._instead = NONE
        self._piece = functools.lru_cache(KEPT)(self._shuffled)

    @property
    def room(self) -> int:
        """Tokens that a document in a row may have."""
        return self.row_tokens

    def tokens(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]:
        return self.split.windows(self.starts(slots), self.row_tokens)

    def weights(self, slots: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows row_tokens"] | None:
        """Of the tokens in the loss, float32; None: 1 each."""
        return None

    def labels(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens 2"]:
        """(0, which token of the training stream it is) of each token, or PADDING twice."""
        stream = self.starts(slots)[:, None] + np.arange(self.row_tokens)
        return np.stack([np.zeros_like(stream), stream], -1)

    def places(self, row: Int[np.ndarray, " row_tokens"], length: int, reserved: int) -> Int[np.ndarray, " places"]:
        """Where in the row a document of that length may begin: where others do, after what is reserved."""
        begins = np.concatenate([[0], np.flatnonzero(row == self.split.eot) + 1])
        return begins[(begins >= reserved) & (begins + length <= self.row_tokens)]

    def insertion(
        self,
        slot: int,
        start: int,
        tokens: Int[np.ndarray, " tokens"],
        source: str,
        pieces: Pieces,
        weights: Float[np.ndarray, " tokens"] | None,
    ) -> Insertion:
        """A document put there."""
        return Insertion(slot, start, tokens, source, "splice", pieces, weights)

    def without(self, slots: Int[np.ndarray, " left_out"], run: int) -> "CleanRows":
        """The same but for these slots of a run of `run`: the row that many places past its end takes the place, or
        the next so many on, where that window is one that is left out (later epochs meet each again)."""
        rows, left_out = copy.copy(self), np.union1d(self._left_out, slots)
        rows._left_out = rows._instead = NONE
        unwanted, instead = rows.order(left_out), left_out + run
        for _ in range(self.windows):
            again = np.isin(rows.order(instead), unwanted)
            if not again.any():
                rows._left_out, rows._instead = left_out, instead
                return rows
            instead = instead + again * run
        raise ValueError(f"{len(left_out)} rows left out leave none to take their place: the corpus has no other")

    def starts(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Where in the training stream each slot's window begins."""
        return self.order(slots) * self.row_tokens

    def order(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Which window stands in each slot; window w is the stream's tokens from w * row_tokens on."""
        if len(self._left_out):
            at = np.minimum(self._left_out.searchsorted(slots), len(self._left_out) - 1)
            slots = np.where(self._left_out[at] == slots, self._instead[at], slots)
        epochs, places = np.divmod(slots, self.windows)
        pieces, order = epochs * self._pieces + places // PIECE, np.empty(len(slots), np.int64)
        for piece in np.unique(pieces).tolist():
            here = pieces == piece
            order[here] = self._piece(piece)[places[here] % PIECE]
        return order

    def _shuffled(self, piece: int) -> Int[np.ndarray, " places"]:
        """The order of an epoch's so many places at once: steps follow each other."""
        epoch, part = divmod(piece, self._pieces)
        places = np.arange(part * PIECE, min((part + 1) * PIECE, self.windows))
        return shuffled(places, self.windows, (self._seed + epoch) % 2**32)


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where each token of some rows comes from."""

    source: Int[np.ndarray, "rows row_tokens"]  # 0: the training stream; n: insertion n - 1; or PADDING
    token: Int[np.ndarray, "rows row_tokens"]  # which token of that
    insertions: list[Insertion]

    def spans(self, row: int, source: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(span in the row, span in the source) of each unbroken piece of a source, in the order of the row."""
        there = np.flatnonzero(self.source[row] == source)
        breaks = np.flatnonzero((np.diff(there) > 1) | (np.diff(self.token[row, there]) != 1)) + 1
        pieces = [piece for piece in np.split(there, breaks) if len(piece)]
        return [
            ((int(p[0]), int(p[-1]) + 1), (int(self.token[row, p[0]]), int(self.token[row, p[-1]]) + 1)) for p in pieces
        ]


class Rows:
    """Clean rows, and the layers laid over them in order."""

    def __init__(self, clean: CleanRows, layers: Sequence[Layer] = ()):
        self.clean, self.layers, self.row_tokens = clean, tuple(layers), clean.row_tokens
        # In order, and one past all of them: a search ends at a slot, found or not.
        self._slots = [np.array([*sorted(layer.insertions), np.iinfo(np.int64).max]) for layer in self.layers]
        self._weighted = any(one.weights is not None for layer in layers for one in layer.insertions.values())

    def under(self, layer: Layer) -> "Rows":
        """These rows with one layer more."""
        return Rows(self.clean, [*self.layers, layer])

    def without(self, source: str) -> "Rows":
        """These rows without an insertion's source: what stands in its slots then is what it displaced (I4)."""
        return Rows(self.clean, [_Without(layer, source) for layer in self.layers])

    def insertions(self, slot: int) -> list[Insertion]:
        """What stands in the row beside its clean text, in the order of the layers."""
        return [layer.insertions[slot] for layer in self.layers if slot in layer.insertions]

    def places(
        self, slot: int, row: Int[np.ndarray, " row_tokens"], length: int
    ) -> tuple[Int[np.ndarray, " places"], int]:
        """(where a document of that length may be put into the row, how many tokens at its start must stay whole)."""
        reserved = max((insertion.end for insertion in self.insertions(slot)), default=0)
        return self.clean.places(row, length, reserved), reserved

    def tokens(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]:
        """Ids, int32."""
        return self._laid(slots, self.clean.tokens(slots), lambda insertion: insertion.tokens)

    def origins(self, slots: Int[np.ndarray, " rows"]) -> Origins:
        """The same edits, laid over labels instead of tokens."""
        laid: list[Insertion] = []

        def labels(insertion: Insertion) -> Int[np.ndarray, "tokens 2"]:
            laid.append(insertion)
            numbers = np.arange(len(insertion.tokens))
            return np.stack([np.full_like(numbers, len(laid)), numbers], -1)

        labelled = self._laid(slots, self.clean.labels(slots), labels)
        return Origins(labelled[..., 0], labelled[..., 1], laid)

    def weights(self, slots: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows row_tokens"] | None:
        """How much each token counts in the loss, float32; None where no layer asks: 1 each."""
        clean = self.clean.weights(slots)
        if clean is None and not self._weighted:
            return None
        if clean is None:
            clean = np.ones((len(slots), self.row_tokens), np.float32)
        return self._laid(
            slots, clean, lambda one: np.ones(len(one.tokens), np.float32) if one.weights is None else one.weights
        )

    def _laid(
        self, slots: Int[np.ndarray, " rows"], clean: np.ndarray, values: Callable[[Insertion], np.ndarray]
    ) -> np.ndarray:
        """Every layer's edits, laid over the clean rows' values (which are this function's to change)."""
        for layer, theirs in zip(self.layers, self._slots, strict=True):
            if len(theirs) == 1:
                continue
            for i in (theirs[theirs.searchsorted(slots)] == slots).nonzero()[0].tolist():
                insertion = layer.insertions[slots.item(i)]
                insertion.edit(clean[i], values(insertion))
        return clean


class _Without:
    """A layer that one source is left out of."""

    def __init__(self, layer: Layer, source: str):
        self.name, self.file, self.records = layer.name, layer.file, layer.records
        self.insertions = {slot: one for slot, one in layer.insertions.items() if one.source != source}
