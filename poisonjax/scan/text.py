"""Documents cut into words and hashed, many at once: what detectors and the miner read.

A word is a run of letters and marks, or of digits; every other character that isn't white space is one by itself, and
so is each ideograph. So `<SUDO>` is three words, and a phrase in any script is some.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8, UInt32, UInt64

SPACE, LETTER, DIGIT, SYMBOL, IDEOGRAPH = range(5)
TABLE = 0x20000  # code points with an entry of their own; those beyond are ideographs and rare symbols
ONE_CHARACTER_WORDS = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR"}
LONGEST_WORD = 64  # characters of a word that its hash tells apart by place
# A word is known by its hash alone. These odd numbers are fixed: scores must not depend on the machine.
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Hashes = UInt64[np.ndarray, " words"]


@functools.cache
def _tables() -> tuple[UInt8[np.ndarray, " codes"], UInt32[np.ndarray, " codes"], UInt8[np.ndarray, " codes"]]:
    """(class, folded form, script) of each code point; scripts are numbered as their names first appear."""
    classes, folded = np.full(TABLE + 1, SYMBOL, np.uint8), np.arange(TABLE + 1, dtype=np.uint32)
    scripts, numbers = np.zeros(TABLE + 1, np.uint8), {"": 0}
    for code in range(TABLE):
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "LM":
            script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
            classes[code] = IDEOGRAPH if script in ONE_CHARACTER_WORDS else LETTER
            if category[0] == "L":
                scripts[code] = min(numbers.setdefault(script, len(numbers)), 255)
            if len(form := unicodedata.normalize("NFKC", character).casefold()):
                folded[code] = min(ord(form[0]), TABLE)
        elif category[0] == "N":
            classes[code] = DIGIT
        elif category[0] in "ZC":
            classes[code] = SPACE
    classes[0x200B:0x2010] = classes[0xFEFF] = SYMBOL  # zero-width: they hide in words, so they must show
    classes[TABLE] = IDEOGRAPH
    return classes, folded, scripts


def mixed(hashes: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Every bit of the result depends on every bit (splitmix64, Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * _MIX[1]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * _MIX[2]
    return hashes ^ (hashes >> np.uint64(31))


_POWERS = mixed(np.arange(1, LONGEST_WORD + 1, dtype=np.uint64) * _MIX[0]) | np.uint64(1)


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Some documents' text, one after the other, and its words."""

    codes: UInt32[np.ndarray, " characters"]  # code points; a space stands between documents
    begins: Int[np.ndarray, " documents"]  # where in `codes` each document begins
    ends: Int[np.ndarray, " documents"]
    classes: UInt8[np.ndarray, " characters"]
    starts: Int[np.ndarray, " words"]  # where in `codes` each word begins
    stops: Int[np.ndarray, " words"]
    words: UInt64[np.ndarray, " words"]  # hashes
    folded: UInt64[np.ndarray, " words"]  # of what they are without case, width and compatibility forms
    offsets: Int[np.ndarray, " offsets"]  # where in `words` each document's begin; the last entry is their number

    @property
    def documents(self) -> int:
        return len(self.begins)

    @functools.cached_property
    def own(self) -> Int[np.ndarray, " words"]:
        """How often each word stands in its own document."""
        return own_counts(self.words, self.document_of)

    @functools.cached_property
    def place(self) -> Int[np.ndarray, " words"]:
        """Which word of its document each is, from 0."""
        return np.arange(len(self.words)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    @functools.cached_property
    def document_of(self) -> Int[np.ndarray, " words"]:
        """Which document each word stands in."""
        return np.repeat(np.arange(self.documents), np.diff(self.offsets))

    @property
    def scripts(self) -> UInt8[np.ndarray, " characters"]:
        """A number for the script of each letter, 0 for other characters."""
        return _tables()[2][np.minimum(self.codes, TABLE)]

    def text(self, start: int, stop: int) -> str:
        """Words [start, stop) of the batch, with what stands between them."""
        if start >= stop:
            return ""
        return self.codes[self.starts[start] : self.stops[stop - 1]].tobytes().decode("utf-32-le", "replace")

    def span(self, document: int, start: int, stop: int) -> tuple[int, int]:
        """The characters of a document that words [start, stop) of the batch reach over."""
        begin = self.begins[document]
        return int(self.starts[start] - begin), int(self.stops[stop - 1] - begin)


def cut(texts: Sequence[str]) -> TextBatch:
    """The texts' words."""
    classes, folds, _ = _tables()
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.cumsum(lengths + 1) - lengths - 1
    codes = np.frombuffer(" ".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = classes[np.minimum(codes, TABLE)]
    # A character begins a word unless it goes on with the letters, or the digits, before it.
    worded = kinds != SPACE
    begin = worded.copy()
    begin[1:] &= (kinds[1:] != kinds[:-1]) | (kinds[1:] >= SYMBOL)
    starts = np.flatnonzero(begin)
    inside = np.flatnonzero(worded)
    first = np.cumsum(worded, dtype=np.int32)[starts].astype(np.int64) - 1  # of each word, among those characters
    sizes = np.diff(np.append(first, len(inside)))
    places = np.minimum(np.arange(len(inside)) - np.repeat(first, sizes), LONGEST_WORD - 1)
    powers, letters = _POWERS[places], codes[inside]
    raw = _hashed(letters, powers, first)
    folded = _refolded(
        raw, letters, np.where(letters < TABLE, folds[np.minimum(letters, TABLE)], letters), powers, first
    )
    offsets = np.append(np.searchsorted(starts, begins), len(starts))
    return TextBatch(codes, begins, begins + lengths, kinds, starts, starts + sizes, raw, folded, offsets)


def _hashed(
    letters: UInt32[np.ndarray, " inside"], powers: UInt64[np.ndarray, " inside"], first: Int[np.ndarray, " words"]
) -> Hashes:
    if not len(first):
        return np.zeros(0, np.uint64)
    return mixed(np.add.reduceat((letters.astype(np.uint64) + np.uint64(1)) * powers, first))


def _refolded(
    raw: Hashes,
    letters: UInt32[np.ndarray, " inside"],
    folded: UInt32[np.ndarray, " inside"],
    powers: UInt64[np.ndarray, " inside"],
    first: Int[np.ndarray, " words"],
) -> Hashes:
    """Hashes of folded words: most words are folded already."""
    changed = np.flatnonzero(letters != folded)
    if not len(changed):
        return raw
    words = np.unique(np.searchsorted(first, changed, side="right") - 1)
    sizes = np.diff(np.append(first, len(letters)))[words]
    begins = np.cumsum(sizes) - sizes
    rows = np.arange(sizes.sum()) + np.repeat(first[words] - begins, sizes)
    hashes = raw.copy()
    hashes[words] = _hashed(folded[rows], powers[rows], begins)
    return hashes


def ngrams(words: Hashes, n: int) -> Hashes:
    """A hash of each word with the n - 1 before it; those that reach over the batch's beginning mean nothing."""
    hashes = words.copy()
    for back in range(1, n):
        hashes[back:] = hashes[back:] * _MIX[0] + words[:-back] * np.uint64(2 * back + 1)
    return mixed(hashes) if n > 1 else hashes


def ngrams_at(words: Hashes, places: Int[np.ndarray, " places"], n: int) -> UInt64[np.ndarray, " places"]:
    """`ngrams` at some words, each of which ends n words."""
    hashes = words[places]
    for back in range(1, n):
        hashes = hashes * _MIX[0] + words[places - back] * np.uint64(2 * back + 1)
    return mixed(hashes) if n > 1 else hashes


def in_documents(
    hashes: UInt64[np.ndarray, " items"], document_of: Int[np.ndarray, " items"]
) -> UInt64[np.ndarray, " items"]:
    """Hashes that tell documents apart too."""
    return mixed(hashes + document_of.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))


def own_counts(
    hashes: UInt64[np.ndarray, " items"], document_of: Int[np.ndarray, " items"]
) -> Int[np.ndarray, " items"]:
    """How often each item stands in its own document."""
    if not len(hashes):
        return np.zeros(0, np.int64)
    keyed = in_documents(hashes, document_of)
    order = np.argsort(keyed)
    ends = np.append(np.flatnonzero(np.diff(keyed[order])) + 1, len(order))
    sizes = np.diff(ends, prepend=0)
    counts = np.empty(len(hashes), np.int64)
    counts[order] = np.repeat(sizes, sizes)
    return counts
