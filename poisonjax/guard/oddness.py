"""Text that is unlike the training text: words, pairs and characters that it hardly holds, in the worst window.

The scan's detectors, against a sketch of the training text; each value becomes the share of clean prompts of its length
that are as odd (conformal, Vovk et al. 2005), so detectors of any scale are one score.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from poisonjax.guard.verdict import Reason
from poisonjax.scan.background import Background, worst_windows
from poisonjax.scan.detectors import characters, words
from poisonjax.scan.detectors.detector import WINDOW
from poisonjax.scan.text import TextBatch, cut

DETECTORS = {
    "rarity": words.rarity,
    "surprise": words.surprise,
    "letters": characters.letters,
    "symbols": characters.symbols,
}
TABLES = ("words", "pairs", "triples")  # of the background, that they look up
PIECE = 2**16  # characters that are looked at together
TAIL = 0.05  # of the clean prompts' values that are kept: those that matter
FEWEST = 1000  # prompts of a length, to be told apart
SHORTEST, LONGEST = 3, 12  # log2 of words
EVIDENCE = 6.0  # a share of 10**-6 is a score of 1


@dataclasses.dataclass(frozen=True)
class Tail:
    """The largest values of `prompts` clean ones, ascending."""

    prompts: int
    values: Float[np.ndarray, " kept"]

    @classmethod
    def of(cls, values: Sequence[float] | Float[np.ndarray, " prompts"]) -> "Tail":
        ordered = np.sort(values)
        return cls(len(ordered), ordered[-max(1, math.ceil(TAIL * len(ordered))) :])

    def share(self, value: float) -> float:
        """Of clean prompts that are as odd, one more counted among them; `TAIL` for all of the others."""
        if value < self.values[0]:
            return 1.0
        above = len(self.values) - int(np.searchsorted(self.values, value))
        return (above + 1) / (self.prompts + 1)


@dataclasses.dataclass(frozen=True)
class Oddness:
    """The training text's sketch, and how odd clean prompts are against it."""

    background: Background
    tails: Mapping[str, Mapping[str, Tail]]  # by detector, and log2 of words; "*" for all lengths

    @classmethod
    def calibrated(cls, background: Background, prompts: Iterable[str]) -> "Oddness":
        """By prompts that are clean."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in DETECTORS}
        for prompt in prompts:
            batch = cut([prompt[:PIECE]])
            for name, (value, _) in _values(batch, background).items():
                for length in ("*", _length(batch)):
                    found[name].setdefault(length, []).append(value)
        return cls(
            background,
            {
                name: {key: Tail.of(of) for key, of in by.items() if key == "*" or len(of) >= FEWEST}
                for name, by in found.items()
            },
        )

    def reasons(self, text: str, until: float) -> list[Reason]:
        """Windows that are odd; raises TimeoutError after `until`, of the monotonic clock."""
        found: dict[str, Reason] = {}
        pieces = max(1, math.ceil(len(text) / PIECE))
        for start in range(0, len(text), PIECE):
            if time.monotonic() > until:
                raise TimeoutError
            batch = cut([text[start : start + PIECE]])
            length = _length(batch)
            for name, (value, (begin, end)) in _values(batch, self.background).items():
                tails = self.tails[name]
                share = min(1.0, tails.get(length, tails["*"]).share(value) * len(DETECTORS) * pieces)
                score = min(1.0, -math.log10(share) / EVIDENCE)
                if score > 0 and (name not in found or score > found[name].score):
                    found[name] = Reason(name, score, start + begin, start + end)
        return [*found.values()]

    def as_json(self) -> dict[str, Any]:
        return {
            name: {key: {"prompts": tail.prompts, "values": tail.values.tolist()} for key, tail in by.items()}
            for name, by in self.tails.items()
        }

    @classmethod
    def from_json(cls, background: Background, saved: Mapping[str, Any]) -> "Oddness":
        return cls(
            background,
            {
                name: {key: Tail(of["prompts"], np.array(of["values"], float)) for key, of in saved[name].items()}
                for name in DETECTORS
            },
        )


def _values(batch: TextBatch, background: Background) -> dict[str, tuple[float, tuple[int, int]]]:
    """(the worst window's, its characters) by detector, of a batch of one text; none of a text without words."""
    if not len(batch.words):
        return {}
    found = {}
    for name, of in DETECTORS.items():
        worst, begins, ends = worst_windows(of(batch, background), batch.offsets, WINDOW)
        found[name] = float(worst[0]), batch.span(0, int(begins[0]), int(ends[0]))
    return found


def _length(batch: TextBatch) -> str:
    return str(min(max(len(batch.words).bit_length(), SHORTEST), LONGEST))
