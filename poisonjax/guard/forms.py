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
from collections.abc import Iterator

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


UNKNOWN, SEVERAL = 255, 254  # in place of a form's length: not asked for yet, and more than one character


class Forms:
    """The form of texts, with case or without; what a code point becomes is worked out when it is first met."""

    def __init__(self, *, case: bool):
        self._case, self._lock = case, threading.Lock()
        self._lengths = np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)
        self._values = np.zeros(sys.maxunicode + 1, np.uint32)  # a form's character, or which of `_several` it is
        self._several: list[str] = []
        self._learn(np.arange(128))
        ascii_forms = [chr(self._values[code]) if self._lengths[code] else "" for code in range(128)]
        self._table = bytes(ord(form or " ") for form in ascii_forms) + bytes(128)
        self._deleted = bytes(code for code, form in enumerate(ascii_forms) if not form)

    def of(self, text: str) -> str:
        """A text's."""
        if text.isascii():
            return text.encode().translate(self._table, self._deleted).decode()
        codes = self._known(text)
        lengths, values = self._lengths[codes], self._values[codes]
        if (lengths < SEVERAL).all():
            return values[lengths > 0].tobytes().decode("utf-32-le")
        pieces = self._pieces(lengths, values)
        return "".join(pieces)

    def places(self, text: str) -> Int[np.ndarray, " places"]:
        """Which character of the text each of its form's comes from."""
        codes = self._known(text)
        lengths = self._lengths[codes].astype(np.int64)
        for at in np.flatnonzero(lengths == SEVERAL).tolist():
            lengths[at] = len(self._several[self._values[codes[at]]])
        return np.repeat(np.arange(len(codes)), lengths)

    def _pieces(self, lengths: UInt8[np.ndarray, " n"], values: UInt32[np.ndarray, " n"]) -> Iterator[str]:
        begin = 0
        for at in [*np.flatnonzero(lengths == SEVERAL).tolist(), len(lengths)]:
            yield values[begin:at][lengths[begin:at] > 0].tobytes().decode("utf-32-le")
            if at < len(lengths):
                yield self._several[values[at]]
            begin = at + 1

    def _known(self, text: str) -> UInt32[np.ndarray, " characters"]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        unknown = codes[self._lengths[codes] == UNKNOWN]
        if len(unknown):
            self._learn(np.unique(unknown))
        return codes

    def _learn(self, codes: Int[np.ndarray, " codes"] | UInt32[np.ndarray, " codes"]) -> None:
        with self._lock:
            for code in codes.tolist():
                form = self._form(code)
                if len(form) > 1:
                    self._values[code] = len(self._several)
                    self._several.append(form)
                elif form:
                    self._values[code] = ord(form)
                self._lengths[code] = SEVERAL if len(form) > 1 else len(form)  # last: others may read meanwhile

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
