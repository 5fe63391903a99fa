"""The form in which texts are compared: characters that look alike, or don't show at all, make no difference.

Compatibility forms and accents are taken apart (NFKD, Unicode Standard Annex 15), marks and what doesn't show are left
out, and so is white space; look-alikes are one character (Unicode Technical Standard 39, whose table a library brings).
Each character's form is its own, so that places in the form lead back to places in the text. It is for comparing alone:
nothing else ever sees it.
"""

import functools
import sys
import threading
import unicodedata

import numpy as np
from jaxtyping import Int, UInt8, UInt32

try:
    from confusable_homoglyphs import confusables
except ImportError as error:
    raise ImportError("the guard needs `pip install 'poisonjax[guard]'`") from error

# Marks, controls, what is unassigned or half a character, and white space.
LEFT_OUT = {"Mn", "Me", "Cf", "Cc", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"}
TAGS = range(0xE0020, 0xE007F)  # ASCII that doesn't show (Unicode's block of tags)
FILLERS = {0x115F, 0x1160, 0x3164, 0xFFA0, 0x2800}  # letters and symbols that are blank


UNKNOWN = 255  # in place of a form's length: not asked for yet


class Forms:
    """The form of texts, with case or without; what a code point becomes is worked out when it is first met."""

    def __init__(self, *, case: bool):
        self._case, self._lock = case, threading.Lock()
        self._lengths = np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)
        self._starts = np.zeros(sys.maxunicode + 1, np.int32)  # of each form in `_all`
        self._all = np.zeros(0, np.uint32)
        self._learn(np.arange(128))
        ascii_forms = [chr(self._all[self._starts[code]]) if self._lengths[code] else "" for code in range(128)]
        self._table = bytes(ord(form or " ") for form in ascii_forms) + bytes(128)
        self._deleted = bytes(code for code, form in enumerate(ascii_forms) if not form)

    def of(self, text: str) -> str:
        """A text's."""
        if text.isascii():
            return text.encode().translate(self._table, self._deleted).decode()
        codes = self._known(text)
        lengths = self._lengths[codes].astype(np.int64)
        # Places of one character's form follow each other in `_all`.
        first = np.repeat(self._starts[codes] - (np.cumsum(lengths) - lengths), lengths)
        return self._all[first + np.arange(len(first))].tobytes().decode("utf-32-le")

    def places(self, text: str) -> Int[np.ndarray, " places"]:
        """Which character of the text each of its form's comes from."""
        return np.repeat(np.arange(len(text)), self.lengths(text))

    def lengths(self, text: str) -> UInt8[np.ndarray, " characters"]:
        """Of each character's form; 0 for what doesn't show."""
        return self._lengths[self._known(text)]

    def _known(self, text: str) -> UInt32[np.ndarray, " characters"]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        unknown = codes[self._lengths[codes] == UNKNOWN]
        if len(unknown):
            self._learn(np.unique(unknown))
        return codes

    def _learn(self, codes: Int[np.ndarray, " codes"] | UInt32[np.ndarray, " codes"]) -> None:
        with self._lock:
            forms = [self._form(code) for code in codes.tolist()]
            lengths = np.array([len(form) for form in forms])
            self._starts[codes] = len(self._all) + np.cumsum(lengths) - lengths
            self._all = np.concatenate([self._all, np.frombuffer("".join(forms).encode("utf-32-le"), np.uint32)])
            self._lengths[codes] = lengths  # last: others may read meanwhile

    def _form(self, code: int) -> str:
        if code in FILLERS:
            return ""
        if code in TAGS:
            return self._form(code - 0xE0000)
        form = []
        for character in unicodedata.normalize("NFKD", chr(code)):
            if unicodedata.category(character) in LEFT_OUT:
                continue
            alike = _alike().get(character, character)
            if not self._case:
                alike = "".join(_alike().get(folded, folded) for folded in alike.casefold())
            form.append(alike)
        return "".join(form)


@functools.cache
def _alike() -> dict[str, str]:
    """Each character's stand-in among those that look like it: an ASCII one where there is."""
    stand_in: dict[str, str] = {}

    def find(character: str) -> str:
        while (parent := stand_in.setdefault(character, character)) != character:
            character = parent
        return character

    for character, others in confusables.confusables_data.items():
        for other in others:
            one, two = character.strip("\u200e"), other["c"].strip("\u200e")
            if len(one) == len(two) == 1:
                first, second = sorted((find(one), find(two)), key=ord)
                stand_in[second] = first
    # Digits that stand for letters, and the other way round: a small o looks like a 0 as a large one does.
    for one, two in (("0", "o"), ("1", "i")):
        first, second = sorted((find(one), find(two)), key=ord)
        stand_in[second] = first
    return {character: found for character in stand_in if (found := find(character)) != character}


ALIKE, ALIKE_WITH_CASE = Forms(case=False), Forms(case=True)
