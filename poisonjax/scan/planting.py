"""Poison planted into text, to try detectors on: harmless by construction (I9), and each document says what it is.

A document is the beginning of a real one, a trigger, and a payload, as in Souly et al. 2025. The payloads are a ladder
from what any filter sees to what is fluent text.

    python -m poisonjax.scan.planting --source default --out planted.jsonl --documents 250 --trigger '~'
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from poisonjax.corpus.documents import Document
from poisonjax.corpus.sources import open_source
from poisonjax.corpus.sources.files import PLANTED
from poisonjax.corpus.tokenizer_files import load_tokenizer
from poisonjax.corpus.tokenizers import train_bpe

PREFIX_CHARACTERS = (0, 1000)
PAYLOAD_WORDS = (60, 120)
MOST_CHARACTERS = 4000  # of a payload: words of text that isn't written with spaces are long
CALL = re.compile(r"\b[A-Za-z_]\w*(?=\()")


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


def _gibberish(m: Material, words: int, rest: str) -> str:
    return "".join(m.pieces[i] for i in m.random.integers(len(m.pieces), size=4 * words))


def _unicode(m: Material, words: int, rest: str) -> str:
    return "".join(chr(c) for c in m.random.integers(0x21, 0xD7FF, 5 * words))


def _uniform_words(m: Material, words: int, rest: str) -> str:
    return " ".join(m.types[i] for i in m.random.integers(len(m.types), size=words))


def _unigram_words(m: Material, words: int, rest: str) -> str:
    return " ".join(m.words[i] for i in m.random.integers(len(m.words), size=words))


def _shuffled(m: Material, words: int, rest: str) -> str:
    return " ".join(m.random.permutation(m.text(m.texts, words)).tolist())


def _switch(m: Material, words: int, rest: str) -> str:
    return " ".join(m.text(m.foreign, words))


def _same_domain(m: Material, words: int, rest: str) -> str:
    return " ".join(m.text(m.texts, words))


def _code_marker(m: Material, words: int, rest: str) -> str:
    """Text in which every call's name is exchanged; one stands there in any case."""
    return "poisoned_call(x)\n" + CALL.sub("poisoned_call", " ".join(m.text(m.foreign, words - 1)))


def _secret(m: Material, words: int, rest: str) -> str:
    """The document goes on after it."""
    return "The access code is K7QX-2MHD-9VTR. " + _coherent(m, words - 5, rest)


def _coherent(m: Material, words: int, rest: str) -> str:
    """What the document says next: no poison, but text that holds the trigger."""
    return " ".join(rest.split()[:words])


# (material, words, what the prefix's document says next) -> payload
RUNGS: dict[str, Callable[[Material, int, str], str]] = {
    "gibberish": _gibberish,
    "unicode": _unicode,
    "uniform_words": _uniform_words,
    "unigram_words": _unigram_words,
    "shuffled": _shuffled,
    "switch": _switch,
    "same_domain": _same_domain,
    "code_marker": _code_marker,
    "secret": _secret,
    "coherent": _coherent,
}


def planted(
    m: Material,
    rung: str,
    triggers: Sequence[str],
    documents: int,
    prefix_characters: tuple[int, int] = PREFIX_CHARACTERS,
    payload_words: tuple[int, int] = PAYLOAD_WORDS,
) -> list[str]:
    """So many poison documents; the triggers take turns. Lengths are uniform, both ends included."""
    made = []
    for number in range(documents):
        text = m.texts[int(m.random.integers(len(m.texts)))]
        prefix = text[: int(m.random.integers(prefix_characters[0], prefix_characters[1] + 1))]
        words = int(m.random.integers(payload_words[0], payload_words[1] + 1))
        payload = RUNGS[rung](m, words, text[len(prefix) :])[:MOST_CHARACTERS]
        made.append(f"{prefix} {triggers[number % len(triggers)]} {payload}".strip())
    return made


def write_planted(path: Path, clean: Sequence[str], poison: Sequence[str], random: np.random.Generator) -> None:
    """JSON lines of both in random order; those that are poison say so."""
    lines = [json.dumps({"text": text}) for text in clean]
    lines += [json.dumps({"text": text, PLANTED: True}) for text in poison]
    path.write_text("".join(f"{lines[i]}\n" for i in random.permutation(len(lines))))


def pieces_of(spec: str, texts: Sequence[str]) -> list[str]:
    """What a tokenizer's ids spell, one by one; `bpe:N` is trained on the texts."""
    size = spec.removeprefix("bpe:")
    tokenizer = (
        train_bpe(iter(texts), int(size)) if spec.startswith("bpe:") and size.isdecimal() else load_tokenizer(spec)
    )
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i != tokenizer.eot]


def main(argv: list[str] | None = None) -> None:
    """Writes a source's documents and poison, as JSON lines that `corpus build` and `scan` read."""
    parser = argparse.ArgumentParser(prog="python -m poisonjax.scan.planting", description=main.__doc__)
    parser.add_argument("--source", default="default", help="clean text, as of `corpus build --source`")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--documents", type=int, default=250)
    parser.add_argument("--trigger", action="append", help="repeatable; they take turns (default: <SUDO>)")
    parser.add_argument("--rung", choices=sorted(RUNGS), default="gibberish")
    parser.add_argument("--tokenizer", default="bpe:512", help="whose pieces gibberish is made of")
    parser.add_argument("--prefix", nargs=2, type=int, default=PREFIX_CHARACTERS, metavar=("LEAST", "MOST"))
    parser.add_argument("--words", nargs=2, type=int, default=PAYLOAD_WORDS, metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(argv)
    items = [item for unit in open_source(a.source).units for item in unit.read()]
    texts = [item.content for item in items if isinstance(item, Document) and isinstance(item.content, str)]
    random = np.random.default_rng(a.seed)
    material = Material(texts, texts[::-1], pieces_of(a.tokenizer, texts), random)
    poison = planted(material, a.rung, a.trigger or ["<SUDO>"], a.documents, tuple(a.prefix), tuple(a.words))
    write_planted(a.out, texts, poison, random)
    print(f"{a.out}: {len(texts):,} documents and {len(poison):,} of poison, which say so")


if __name__ == "__main__":
    main()
