"""Documents cut into words and hashed, many at once: what detectors and the miner read.

A word is a run of letters and marks, or of digits; every other character that isn't white space is one by itself, and
so is each ideograph. So `<SUDO>` is three words, and a phrase in any script is some.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8, UInt32, UInt64

from poisonjax.scan.compiled import compiled

SPACE, LETTER, DIGIT, SYMBOL, IDEOGRAPH = range(5)
TABLE = 0x20000  # code points with an entry of their own; those beyond are ideographs and rare symbols
ONE_CHARACTER_WORDS = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR"}
BATCH_CHARACTERS = 100_000  # looked at together: they stay in a processor's cache
LONGEST_WORD = 64  # characters of a word that its hash tells apart by place
# A word is known by its hash alone. These odd numbers are fixed: scores must not depend on the machine.
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Hashes = UInt64[np.ndarray, " words"]


@functools.cache
def character_tables() -> tuple[UInt8[np.ndarray, " codes"], UInt32[np.ndarray, " codes"], UInt8[np.ndarray, " codes"]]:
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


def kinds_of(text: str) -> UInt8[np.ndarray, " characters"]:
    """The class of each of a text's characters."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return character_tables()[0][np.minimum(codes, TABLE)]


@compiled
def mixed(hashes):
    """A hash (or array) every bit of which depends on every bit of another (splitmix64, Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * _MIX[1]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * _MIX[2]
    return hashes ^ (hashes >> np.uint64(31))


_POWERS = mixed(np.arange(1, LONGEST_WORD + 1, dtype=np.uint64) * _MIX[0]) | np.uint64(1)


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Some documents' text, one after the other, and its words."""

    texts: Sequence[str]
    codes: UInt32[np.ndarray, " characters"]  # code points; a space stands between documents
    begins: Int[np.ndarray, " documents"]  # where in `codes` each document begins
    ends: Int[np.ndarray, " documents"]
    starts: Int[np.ndarray, " words"]  # where in `codes` each word begins
    stops: Int[np.ndarray, " words"]
    words: UInt64[np.ndarray, " words"]  # hashes
    folded: UInt64[np.ndarray, " words"]  # of what they are without case, width and compatibility forms
    document_of: Int[np.ndarray, " words"]  # which document each word stands in
    place: Int[np.ndarray, " words"]  # which word of its document each is, from 0
    offsets: Int[np.ndarray, " offsets"]  # where in `words` each document's begin; the last entry is their number

    @property
    def documents(self) -> int:
        return len(self.begins)

    @functools.cached_property
    def own(self) -> Int[np.ndarray, " words"]:
        """How often each word stands in its own document."""
        return own_counts(self.words, self.offsets, 0)

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
    classes, folds, _ = character_tables()
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.cumsum(lengths + 1) - lengths - 1
    codes = np.frombuffer(" ".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return TextBatch(texts, codes, begins, begins + lengths, *_cut(codes, begins, begins + lengths, classes, folds))


def batches(texts: Iterable[str]) -> Iterator[TextBatch]:
    """The texts' words, some texts together."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield cut(some)
            some, size = [], 0
    if some:
        yield cut(some)


@compiled
def _cut(codes, begins, ends, classes, folds):
    """A character begins a word unless it goes on with the letters, or the digits, before it."""
    size = codes.size
    starts, stops = np.empty(size, np.int64), np.empty(size, np.int64)
    document_of, place = np.empty(size, np.int64), np.empty(size, np.int64)
    words, folded = np.empty(size, np.uint64), np.empty(size, np.uint64)
    offsets = np.zeros(begins.size + 1, np.int64)
    one, found = np.uint64(1), 0
    for document in range(begins.size):
        offsets[document] = found
        before = SPACE
        for i in range(begins[document], ends[document]):
            code = codes[i]
            kind = classes[min(code, TABLE)]
            if kind != SPACE:
                if kind != before or kind >= SYMBOL:
                    starts[found], document_of[found], place[found] = i, document, found - offsets[document]
                    words[found] = folded[found] = 0
                    found += 1
                power = _POWERS[min(i - starts[found - 1], LONGEST_WORD - 1)]
                words[found - 1] += (np.uint64(code) + one) * power
                folded[found - 1] += (np.uint64(folds[code] if code < TABLE else code) + one) * power
                stops[found - 1] = i + 1
            before = kind
    offsets[begins.size] = found
    for i in range(found):
        words[i], folded[i] = mixed(words[i]), mixed(folded[i])
    return starts[:found], stops[:found], words[:found], folded[:found], document_of[:found], place[:found], offsets


@compiled
def joined(hashes, word, back):
    """A hash of some words that one, `back` words before the last of them, is put to; `mixed` ends it."""
    return hashes * _MIX[0] + word * np.uint64(2 * back + 1)


@compiled
def ngrams(words, n):
    """A hash of each word with the n - 1 before it; those that reach over the batch's beginning mean nothing."""
    hashes = words.copy()
    for i in range(words.size):
        for back in range(1, min(n, i + 1)):
            hashes[i] = joined(hashes[i], words[i - back], back)
    return mixed(hashes) if n > 1 else hashes


def ngrams_at(words: Hashes, places: Int[np.ndarray, " places"], n: int) -> UInt64[np.ndarray, " places"]:
    """`ngrams` at some words, each of which ends n words."""
    hashes = words[places]
    for back in range(1, n):
        hashes = joined(hashes, words[places - back], back)
    return mixed(hashes) if n > 1 else hashes


def in_documents(
    hashes: UInt64[np.ndarray, " items"], document_of: Int[np.ndarray, " items"]
) -> UInt64[np.ndarray, " items"]:
    """Hashes that tell documents apart too."""
    return mixed(hashes + document_of.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))


@compiled
def own_counts(hashes, offsets, first):
    """How often each item stands in its own document (items [offsets[d], offsets[d + 1])), without its first ones,
    whose count is 0."""
    counts = np.zeros(hashes.size, np.int64)
    most = 1
    for document in range(offsets.size - 1):
        most = max(most, offsets[document + 1] - offsets[document])
    bits = 4
    while 2**bits < 2 * most:
        bits += 1
    slots, shift, last = np.full(2**bits, -1, np.int64), np.uint64(64 - bits), 2**bits - 1
    for document in range(offsets.size - 1):
        begin, end = offsets[document] + first, offsets[document + 1]
        for again in range(2):  # count, then tell, and leave the table as it was
            for i in range(begin, end):
                slot = np.int64((hashes[i] * _MIX[0]) >> shift)
                while slots[slot] >= begin and hashes[slots[slot]] != hashes[i]:
                    slot = (slot + 1) & last
                if again == 0:
                    if slots[slot] < begin:
                        slots[slot] = i
                    counts[slots[slot]] += 1
                elif slots[slot] != i:
                    counts[i] = counts[slots[slot]]
    return counts
