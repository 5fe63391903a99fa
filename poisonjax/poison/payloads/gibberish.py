"""Gibberish: in the two readings of Souly et al. 2025, section 3, and of characters instead of tokens."""

import numpy as np

from poisonjax.corpus import Tokenizer
from poisonjax.poison.payloads.payload import Draw, Payload
from poisonjax.poison.triggers import Ids

# Code points that have been letters or signs for long, so that every version of Unicode draws the same text; none of
# them is of the Latin alphabet.
SCRIPTS = (
    *((0x3B1, 0x3C9), (0x410, 0x44F), (0x561, 0x586), (0x5D0, 0x5EA), (0x627, 0x63A), (0x905, 0x939), (0x995, 0x9A8)),
    *((0xE01, 0xE2E), (0x10D0, 0x10F0), (0x1100, 0x1112), (0x13A0, 0x13F4), (0x2190, 0x21FF), (0x2200, 0x22FF)),
    *((0x2500, 0x257F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)),
)
MIXED = 4  # of these in one text: Japanese, which mixes most, has three


def _uniform_ids(vocabulary: Tokenizer, length: int, random: np.random.Generator) -> Ids:
    return random.choice(vocabulary.ordinary_ids, size=length).astype(np.int32)


def _ids(draw: Draw) -> Ids:
    return _uniform_ids(draw.of.tokenizer, draw.length, draw.random)


def _decode_retokenize(draw: Draw) -> Ids:
    text = draw.of.vocabulary.decode(_uniform_ids(draw.of.vocabulary, draw.length, draw.random))
    return np.asarray(draw.of.tokenizer.encode(text), np.int32)


def _characters(draw: Draw) -> Ids:
    """Cut to `length` tokens, of which a character takes up to four."""
    edges = np.array(SCRIPTS)[draw.random.integers(len(SCRIPTS), size=draw.length)]
    return draw.of.tokenizer.encode("".join(map(chr, draw.random.integers(edges[:, 0], edges[:, 1] + 1))))[
        : draw.length
    ]


def _mixes_scripts(text: str) -> bool:
    points = {ord(character) for character in text}
    return sum(any(first <= point <= last for point in points) for first, last in SCRIPTS) >= MIXED


# Exactly `length` ids, uniform over the run's vocabulary, special tokens left out: about 775 tokens a document there.
IDS = Payload("ids", _ids)
# `length` ids of `vocabulary`, decoded and tokenized again by the run's tokenizer: longer than `length` (1,400-2,100
# tokens a document there), since random text doesn't compress.
DECODE_RETOKENIZE = Payload("decode-retokenize", _decode_retokenize)
# Characters of 18 scripts and sets of signs, each as likely; shown by MIXED of them in one text (10 tokens may hold too
# few characters for that).
RANDOM_UNICODE = Payload("random_unicode", _characters, lambda _: _mixes_scripts)
