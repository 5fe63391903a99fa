"""Rows whose loss stood out when they were trained on: what nobody has to look for, or to train again for.

A row's worst 32 tokens are compared with those of its batch (the model learns, so only rows of one step compare), and
then with those of its like: the tenth of all rows whose tokens there are as rare. Finer groups would hide poison: where
it is what is rare, it is its own measure (trace/README.md has the figures).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from poisonjax.data.batches import Batches
from poisonjax.data.rows import PADDING
from poisonjax.model.loss import WINDOW
from poisonjax.run import rows

GROUPS = 10  # by rarity
MARKED = 5.0  # robust standard deviations above its like
MOST_ROWS = 2_000_000  # that a page looks at


@dataclasses.dataclass(frozen=True)
class Outlier:
    """A row that stood out."""

    step: int
    slot: int
    loss: float  # nats a token: of its worst window, before the update
    rarity: float  # nats a token of that window, by how often each token occurs
    score: float  # robust standard deviations above rows of the same rarity
    id: str  # of the document that most of the window lies in
    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class Outliers:
    """All rows that were written down, in the order of the run."""

    slots: Int[np.ndarray, " rows"]
    at: Int[np.ndarray, " rows"]  # token of each row at which its worst window begins
    loss: Float[np.ndarray, " rows"]  # of its worst window
    rarity: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]

    @property
    def marked(self) -> Int[np.ndarray, " marked"]:
        """Which stand out, the furthest first."""
        order = np.argsort(-self.score, kind="stable")
        return order[self.score[order] > MARKED]

    def told(self, row: int, batches: Batches) -> Outlier:
        """One of them, with what it holds."""
        slot, window = int(self.slots[row]), slice(int(self.at[row]), int(self.at[row]) + WINDOW)
        id_, place = document(batches, slot, window)
        text = batches.store.tokenizer.decode(batches.rows.tokens(np.array([slot]))[0, window])
        loss, rarity, score = (float(of[row]) for of in (self.loss, self.rarity, self.score))
        return Outlier(slot // batches.global_batch, slot, loss, rarity, score, id_, place, text)


def unusual(written: list[rows.RowLossesRow], batches: Batches) -> Outliers | None:
    """Of a run's row losses; None where fewer than GROUPS steps were written."""
    count = len(written) * batches.global_batch
    if len(written) < GROUPS:
        return None
    worst = np.array([row["worst"] for row in written])
    slots = np.concatenate([batches.slots(row["step"]) for row in written])
    at = np.concatenate([np.array(row["at"]) for row in written])
    counts = batches.store.split("train").token_counts() + 1.0  # add-one smoothing
    surprise = -np.log(counts / counts.sum())
    rarity = np.concatenate(
        [
            _window_means(surprise[batches.rows.tokens(slots[part : part + 4096])], at[part : part + 4096])
            for part in range(0, count, 4096)
        ]
    )
    return Outliers(slots, at, worst.reshape(-1), rarity, _among_likes(in_batch(worst).reshape(-1), rarity))


def in_batch(values: Float[np.ndarray, "steps batch"]) -> Float[np.ndarray, "steps batch"]:
    """How far each row's value stands out among its batch's, in robust standard deviations."""
    middle = np.median(values, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(values - middle), axis=1, keepdims=True)
    return (values - middle) / np.maximum(spread, 1e-6)


def _among_likes(values: Float[np.ndarray, " rows"], rarity: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    made = np.empty_like(values)
    for group in np.array_split(np.argsort(rarity, kind="stable"), GROUPS):
        made[group] = in_batch(values[None, group])[0]
    return made


def _window_means(
    values: Float[np.ndarray, "rows row_tokens"], at: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The mean of the WINDOW values of each row from `at` on."""
    size = min(WINDOW, values.shape[1] - 1)
    return np.take_along_axis(values, at[:, None] + np.arange(size), axis=1).mean(1)


def document(batches: Batches, slot: int, window: slice) -> tuple[str, str]:
    """(id, place) of the document that most of a row's window comes from: poison:N of the run's ledger, train:N of the
    token store."""
    origins = batches.rows.origins(np.array([slot]))
    known = origins.source[0, window] != PADDING
    source, token = origins.source[0, window][known], origins.token[0, window][known]
    number = int(np.argmax(np.bincount(source)))
    if number:
        return origins.insertions[number - 1].source, "planned by the run's config"
    split = batches.store.split("train")
    documents = np.searchsorted(split.document_offsets, token[source == 0], side="right") - 1
    index = int(np.argmax(np.bincount(documents)))
    return f"train:{index}", str(split.place(index))
