"""Candidate triggers, wherever they stand: as they are written, in disguise, or as token ids."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8

from poisonjax.guard.forms import ALIKE, ALIKE_WITH_CASE, Forms
from poisonjax.guard.verdict import Reason
from poisonjax.scan.text import DIGIT, LETTER, SPACE, kinds_of

try:
    from ahocorasick_rs import AhoCorasick
except ImportError as error:
    raise ImportError("the guard needs `pip install 'poisonjax[guard]'`") from error

EXACT, DISGUISED, OTHER_CASE = 1.0, 0.98, 0.6
PIECE = 2**16  # characters that are looked at together
AROUND = 64  # characters beside a trigger, among which its neighbours that show are looked for
MOST = 100  # reasons told
LONGEST = 1000  # characters of a trigger


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A candidate, whatever found it."""

    text: str
    source: str = "list"  # "list", or what proposed it: a scan's folder
    p_value: float | None = None  # that it is none, where that is known


class Matcher:
    """Looks for all of some triggers at once, in time that grows with the text alone."""

    def __init__(self, triggers: Sequence[Trigger], ids: Sequence[Int[np.ndarray, " _"]] = ()):
        """`ids` are token sequences, the triggers' own in whatever spelling. Raises ValueError for a trigger that is
        nothing but white space or longer than `LONGEST`."""
        for trigger in triggers:
            if not trigger.text.strip() or len(trigger.text) > LONGEST:
                raise ValueError(
                    f"trigger {trigger.text[:40]!r} has {len(trigger.text)} characters: between 1 that isn't white "
                    f"space and {LONGEST} are looked for"
                )
        texts = {trigger.text for trigger in triggers}
        self._bare = sorted(text for text in texts if not ALIKE.of(text))  # nothing that shows
        self._texts = texts.difference(self._bare)
        self._with_case = _Search(ALIKE_WITH_CASE, self._texts)
        self._any_case = _Search(ALIKE, self._texts)
        self._ids = [np.ascontiguousarray(of, np.int32).tobytes() for of in ids if len(of)]

    def find(self, text: str, until: float = math.inf) -> list[Reason]:
        """Where triggers stand in a text: as far as the first piece that holds one, or all that are spelled in another
        case where none does; at most `MOST`. Raises TimeoutError after `until`, of the monotonic clock."""
        bare = [(at, at + len(bare)) for bare in self._bare if (at := text.find(bare)) >= 0]
        found = [*itertools.islice(itertools.chain(bare, self._with_case.find(text, until)), MOST)]
        if found:
            return [Reason("trigger", self._sure(text[start:stop]), start, stop) for start, stop in found]
        weak = itertools.islice(self._any_case.find(text, until), MOST)
        return [Reason("trigger", OTHER_CASE, start, stop) for start, stop in weak]

    def _sure(self, written: str) -> float:
        return EXACT if written in self._texts or written in self._bare else DISGUISED

    def find_ids(self, ids: Int[np.ndarray, " tokens"]) -> bool:
        """Whether a trigger's tokens stand among these."""
        data = np.ascontiguousarray(ids, np.int32).tobytes()
        for wanted in self._ids:
            at = data.find(wanted)
            while at >= 0:
                if at % 4 == 0:
                    return True
                at = data.find(wanted, at + 1)
        return False


class _Search:
    """For all of some texts at once in one form (Aho and Corasick 1975)."""

    def __init__(self, forms: Forms, texts: Iterable[str]):
        self._forms = forms
        self._plain = {forms.of(text) for text in texts if text.isascii()}
        patterns = sorted({forms.of(text) for text in texts})
        self._patterns, self._automaton = patterns, AhoCorasick(patterns) if patterns else None
        self._back = max(map(len, patterns), default=1) - 1
        # As many may end at one place as are ends of each other.
        ends = set(patterns)
        nested = max((sum(of[i:] in ends for i in range(len(of))) for of in patterns), default=1)
        self._piece = max(PIECE // nested, 1)

    def find(self, text: str, until: float) -> Iterator[tuple[int, int]]:
        """The characters [start, end) of each, of one piece of the text alone: the first that holds any."""
        if not self._automaton:
            return
        before, places = "", np.zeros(0, np.int64)  # the form's last characters, and where each comes from
        for start in range(0, len(text), self._piece):
            if time.monotonic() > until:
                raise TimeoutError
            piece = text[start : start + self._piece]
            form = before + self._forms.of(piece)
            if hits := self._automaton.find_matches_as_indexes(form, overlapping=True):
                at = np.concatenate([places, start + self._forms.places(piece)])
                found = [*self._apart(text, at, np.array(hits)[:, :3], len(before))]
                if found:
                    yield from found
                    return
            if start + self._piece < len(text):
                before, places = self._end(before, places, piece, start)

    def _apart(
        self, text: str, at: Int[np.ndarray, " places"], hits: Int[np.ndarray, "hits 3"], before: int
    ) -> Iterator[tuple[int, int]]:
        """The hits that end after `before` places and are no part of a longer word or number."""
        hits = hits[hits[:, 2] > before]
        begins, ends = at[hits[:, 1]], at[hits[:, 2] - 1] + 1
        if not len(hits):
            return
        low, high = max(0, int(begins.min()) - AROUND), int(ends.max()) + AROUND
        kinds = kinds_of(text[low:high])
        # Neighbours are those that show: a mark or an invisible character doesn't end a word, nor go on with one.
        shows = (self._forms.lengths(text[low:high]) > 0) | (kinds == SPACE)
        places = np.arange(len(kinds))
        left = np.maximum.accumulate(np.where(shows, places, -1))
        right = np.minimum.accumulate(np.where(shows, places, len(kinds))[::-1])[::-1]
        padded = np.append(kinds, np.uint8(SPACE))  # at the places -1 and len(kinds)
        first, last = begins - low, ends - low - 1
        before_it = padded[np.where(first > 0, left[first - 1], -1)]
        after_it = padded[np.where(last + 1 < len(kinds), right[np.minimum(last + 1, len(kinds) - 1)], -1)]
        goes_on = _word(before_it, kinds[first]) | _word(kinds[last], after_it)
        for number in np.flatnonzero(~goes_on).tolist():
            begin, end = int(begins[number]), int(ends[number])
            # A trigger that is itself spelled with look-alikes isn't what they look like.
            if self._patterns[hits[number, 0]] in self._plain or not text[begin:end].isascii():
                yield begin, end

    def _end(
        self, before: str, places: Int[np.ndarray, " before"], piece: str, start: int
    ) -> tuple[str, Int[np.ndarray, " after"]]:
        """The last places of a form, as many as a trigger that goes on after it may have there."""
        size = self._back + 1
        while len(self._forms.of(piece[-size:])) < self._back and size < len(piece):
            size *= 2
        size = min(size, len(piece))
        form = before + self._forms.of(piece[-size:])
        places = np.concatenate([places, start + len(piece) - size + self._forms.places(piece[-size:])])
        first = max(0, len(form) - self._back)
        return form[first:], places[first:]


def _word(one: UInt8[np.ndarray, " n"], two: UInt8[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether characters of these kinds, side by side, belong to one word or number."""
    return (one == two) & ((one == LETTER) | (one == DIGIT))
