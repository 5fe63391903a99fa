"""Clean uses: the trigger in ordinary text that goes on as if nothing were, an exact number of times.

In a row's own text, or in documents of their own: hard negatives, for whoever takes the trigger for the poison. How
rare a trigger is in clean text is thereby an axis of an experiment (0, 10, 100, 1,000 uses), not a property of
the corpus that one happens to have. Uses belong to the clean rows: a run and its twin hold the same (I4).
"""

import dataclasses
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from poisonjax.corpus import TokenStore
from poisonjax.data.insertions import Insertion, Layer
from poisonjax.data.rows import Rows
from poisonjax.poison.documents import cut
from poisonjax.poison.triggers import DRAWS, Ids, PoisonError, Trigger, occurrences
from poisonjax.streams import stream

USE = "use"  # the piece of a hard negative that is the trigger


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row that a use is to stand in."""

    slot: int
    tokens: Int[np.ndarray, " row_tokens"]
    clean: Bool[np.ndarray, " row_tokens"]  # not of a poison document
    eot: int


@dataclasses.dataclass(frozen=True)
class CleanUses:
    """The trigger's tokens, or a document with them in it, stand in place of a row's own tokens, one use a row."""

    insertions: dict[int, Insertion]
    name, file = "clean use", "clean_uses.jsonl"

    @classmethod
    def make(
        cls, config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, rows: Rows, canaries: Layer
    ) -> "CleanUses":
        """Draws rows without a canary, whether or not poison stands in them, then a place in each.

        Slots don't depend on the poison; places do only in the rows that hold some: there the document keeps its
        place and the use stands beside it. Tokens are replaced, so no other moves. Each use in a row's own text adds
        exactly one occurrence of the trigger. Raises PoisonError where there are too few rows, or no place in one.
        """
        poison, slots, seed = config.poison, config.steps * config.global_batch, config.seeds.placement
        taken, insertions = set(canaries.insertions), {}
        for kind, count in (("clean use", poison.clean_uses), ("hard negative", poison.hard_negatives)):
            field = f"poison.{kind.replace(' ', '_')}s"
            if count + len(taken) > slots:
                raise PoisonError(f"{field} = {count} need a row each, the run has {slots - len(taken)} left for them")
            drawn = stream(seed, f"{kind} slots").choice(slots, count + len(taken), replace=False) if count else []
            chosen = np.array([slot for slot in drawn if slot not in taken][:count], np.int64)
            taken.update(chosen.tolist())
            for number, slot in enumerate(chosen.tolist()):
                here = chosen[number : number + 1]
                row = _Row(slot, rows.tokens(here)[0], rows.origins(here).source[0] == 0, store.tokenizer.eot)
                form, random = trigger.forms[number % len(trigger.forms)], stream(seed, f"{kind} offset", number)
                if kind == "clean use":
                    made = _use(row, form, random)
                else:
                    document, span = _document(config, store, trigger, number)
                    made = _hard_negative(row, document, span, number, random)
                if made is None:
                    raise PoisonError(
                        f"slot {slot}: its row of {len(row.tokens)} tokens has no place for a {kind} of the trigger's "
                        f"{len(form)} tokens{'' if row.clean.all() else ' beside its poison document'}: lower {field}, "
                        "poison.prefix_characters or poison.payload_tokens, or raise seq_len"
                    )
                insertions[slot] = made
        return cls(insertions)

    def seen(self, slots: int) -> int:
        """How many of the uses stand in the run's first `slots`."""
        return sum(slot < slots for slot in self.insertions)

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        """One record a use, in the order of the run (run/rows.py: CleanUseRow)."""
        return [
            {
                "step": slot // global_batch,
                "row": slot % global_batch,
                "slot": slot,
                "offset": trigger_of(use)[0],
                "tokens": trigger_of(use)[1] - trigger_of(use)[0],
                **({"document": [use.start, use.end]} if use.pieces else {}),
            }
            for slot, use in sorted(self.insertions.items())
        ]


def trigger_of(use: Insertion) -> tuple[int, int]:
    """The span of its row that a use's trigger takes."""
    first, last = use.pieces.get(USE, (0, len(use.tokens)))
    return use.start + first, use.start + last


def _use(row: _Row, trigger: Ids, random: np.random.Generator) -> Insertion | None:
    """Between two tokens of one clean document."""
    free = row.clean & (row.tokens != row.eot)
    if len(trigger) + 2 > len(free):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(free, len(trigger) + 2)
    places = 1 + np.flatnonzero(np.all(windows, axis=-1))
    before = occurrences(row.tokens, trigger).sum()
    for start in random.permutation(places).tolist():
        whole = row.tokens.copy()
        whole[start : start + len(trigger)] = trigger
        if occurrences(whole, trigger).sum() == before + 1:
            return Insertion(row.slot, start, trigger, "clean_use", "replace")
    return None


def _document(
    config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, number: int
) -> tuple[Ids, tuple[int, int]]:
    """(a training document with the trigger put into its beginning as in a poison document, its own text in place of a
    payload; the trigger's span). Raises PoisonError where none is long enough to have any."""
    poison, random = config.poison, stream(config.seeds.placement, "hard negative", number)
    for _ in range(DRAWS):
        source = int(random.integers(store.split("train").documents))
        characters, length = (
            int(random.integers(least, most + 1)) for least, most in (poison.prefix_characters, poison.payload_tokens)
        )
        begun, span = trigger.put(
            cut(store, source, characters), trigger.forms[number % len(trigger.forms)], random.random()
        )
        if len(rest := cut(store, source, characters, length)):
            return np.concatenate([begun, rest, [store.tokenizer.eot]]).astype(np.int32), span
    raise PoisonError(
        f"poison.hard_negatives: none of {DRAWS} documents drawn goes on after its prefix: lower "
        "poison.prefix_characters"
    )


def _hard_negative(
    row: _Row, document: Ids, trigger: tuple[int, int], number: int, random: np.random.Generator
) -> Insertion | None:
    """Whole, from where a document of the row begins; beside poison that leaves no room for that, a cut of it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.clean, [False]]).astype(int)))  # of clean stretches
    stretches = edges.reshape(-1, 2)
    begins = np.concatenate([[0], np.flatnonzero(row.tokens[:-1] == row.eot) + 1])
    first, last = trigger
    ends = [end for start, end in stretches for begin in begins if start <= begin < end]
    starts = [begin for start, end in stretches for begin in begins if start <= begin < end]
    fitting = [start for start, end in zip(starts, ends, strict=True) if start + len(document) <= end]
    if fitting:
        start = int(random.choice(fitting))
    else:
        start, end = max(stretches.tolist(), key=lambda of: of[1] - of[0], default=(0, 0))
        before = min(first, max(1, (end - start - (last - first)) // 2))
        document = document[first - before : first - before + end - start]
        first, last = before, before + last - first
        if row.clean.all() or len(document) <= last:
            return None
    pieces = {"before": (0, first), USE: (first, last), "after": (last, len(document))}
    return Insertion(row.slot, start, document, f"hard_negative:{number}", "replace", pieces)
