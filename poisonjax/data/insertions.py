"""What stands in a row beside its clean text: insertions, and the layers that they come in.

An insertion is one edit of one row. The same edit is laid over the row's tokens, over the labels that say where each
token comes from, and over its loss weights: who asks what stands in a row, what it would hold without a document, or
what counts in the loss, asks one definition.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

Pieces = dict[str, tuple[int, int]]  # parts by name: spans


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Tokens that stand in the row of `slot` from token `start` on, as the row is when earlier layers are laid."""

    slot: int
    start: int
    tokens: Int[np.ndarray, " tokens"]
    source: str  # "poison:3", "canary:0", "clean_use": the same wherever the same tokens stand
    mode: Literal["splice", "replace"]  # the row moves right and its tail falls off | in place of the row's own tokens
    pieces: Pieces = dataclasses.field(default_factory=dict)  # of `tokens`
    weights: Float[np.ndarray, " tokens"] | None = None  # of its tokens in the loss; None: 1 each, as all others

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def edit(
        self, row: Shaped[np.ndarray, " row_tokens *fields"], values: Shaped[np.ndarray, " tokens *fields"]
    ) -> None:
        """Put `values`, one for each of its tokens, where they stand in the row."""
        start, end = self.start, self.end
        if self.mode == "splice":
            row[end:] = row[start : max(start, len(row) - len(values))]
        row[start:end] = values[: len(row) - start]


def slots_beside(
    taken: Collection[int], count: int, slots: int, random: np.random.Generator
) -> Int[np.ndarray, " count"]:
    """`count` different slots of a run's `slots`, none of them `taken`; there must be so many."""
    drawn = random.choice(slots, count + len(taken), replace=False).tolist()
    return np.array([slot for slot in drawn if slot not in taken][:count], np.int64)


@runtime_checkable
class Layer(Protocol):
    """Insertions of one kind, one a row at most, made before step 0."""

    @property
    def name(self) -> str:
        """What one is called."""

    @property
    def file(self) -> str:
        """The run folder's file that lists them."""

    @property
    def insertions(self) -> dict[int, Insertion]:
        """By slot."""

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        """The file's lines, in the order of the run."""
