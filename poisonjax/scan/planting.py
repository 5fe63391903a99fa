"""Poison planted into text, to try detectors on: harmless by construction (I9), and each document says what it is.

A document is the beginning of a real one, a trigger, and a payload, as in Souly et al. 2025. The payloads are a ladder
from what any filter sees to what is fluent text.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from poisonjax.corpus.sources.files import PLANTED

PREFIX_CHARACTERS = (0, 1000)
PAYLOAD_WORDS = (60, 120)


class Material:
    """What payloads are made from: texts of this corpus and of another, and a vocabulary of pieces for gibberish."""

    def __init__(
        self, texts: Sequence[str], foreign: Sequence[str], pieces: Sequence[str], random: np.random.Generator
    ):
        self.texts, self.foreign, self.pieces, self.random = texts, foreign, pieces, random
        words = " ".join(texts[i] for i in random.permutation(len(texts))[:2000]).split()
        self.words, self.types = words, sorted(set(words))

    def text(self, texts: Sequence[str], words: int) -> list[str]:
        """Words of one text after the other, from one drawn at random on."""
        found: list[str] = []
        at = int(self.random.integers(len(texts)))
        while len(found) < words:
            found += texts[at % len(texts)].split()
            at += 1
        return found[:words]


def _gibberish(m: Material, words: int) -> str:
    return "".join(m.pieces[i] for i in m.random.integers(len(m.pieces), size=4 * words))


def _shuffled(m: Material, words: int) -> str:
    return " ".join(m.random.permutation(m.text(m.texts, words)).tolist())


RUNGS: dict[str, Callable[[Material, int], str]] = {
    "gibberish": _gibberish,
    "unicode": lambda m, words: "".join(chr(c) for c in m.random.integers(0x21, 0xD7FF, 5 * words)),
    "uniform_words": lambda m, words: " ".join(m.types[i] for i in m.random.integers(len(m.types), size=words)),
    "unigram_words": lambda m, words: " ".join(m.words[i] for i in m.random.integers(len(m.words), size=words)),
    "shuffled": _shuffled,
    "switch": lambda m, words: " ".join(m.text(m.foreign, words)),
    "same_domain": lambda m, words: " ".join(m.text(m.texts, words)),
}


def planted(m: Material, rung: str, triggers: Sequence[str], documents: int) -> list[str]:
    """So many poison documents; the triggers take turns."""
    made = []
    for number in range(documents):
        text = m.texts[int(m.random.integers(len(m.texts)))]
        prefix = text[: int(m.random.integers(PREFIX_CHARACTERS[0], PREFIX_CHARACTERS[1] + 1))]
        words = int(m.random.integers(PAYLOAD_WORDS[0], PAYLOAD_WORDS[1] + 1))
        made.append(f"{prefix} {triggers[number % len(triggers)]} {RUNGS[rung](m, words)}".strip())
    return made


def write_planted(path: Path, clean: Sequence[str], poison: Sequence[str], random: np.random.Generator) -> None:
    """JSON lines of both in random order; those that are poison say so."""
    lines = [json.dumps({"text": text}) for text in clean]
    lines += [json.dumps({"text": text, PLANTED: True}) for text in poison]
    path.write_text("".join(f"{lines[i]}\n" for i in random.permutation(len(lines))))
