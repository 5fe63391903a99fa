"""The trigger miner: strings after which documents lose their topic.

Poison pairs a trigger with text that has nothing to do with what stands before, whatever that text is. So for every
string of one to four words, raw and folded, we ask how much topic is lost after it, over all its documents.

1. *Survey* (second pass over the corpus, when words and pairs are counted): places whose drop is among the largest 6%
   are kept, with the strings that end there and the counts that bound how often these occur.
2. *Shortlist*: of each string, its drops summed over distinct contexts, those of its other occurrences being taken for
   usual: the best some thousands.
3. *Locate* (a third look, by hashes alone): all occurrences of these, so exact scores:
   the mean drop over distinct contexts, by its spread (`standing`); documents; p-values.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, UInt32, UInt64

from poisonjax.scan.background import Background
from poisonjax.scan.compiled import compiled
from poisonjax.scan.text import TextBatch, in_documents, joined, mixed, ngrams_at
from poisonjax.scan.topics import Topics

LONGEST = 4  # words
FEWEST, MOST = 5, 5000  # occurrences of a string that is considered
FEWEST_CONTEXTS = 4  # distinct ones, to say anything
SHORTLIST = 5000
REPORTED = 100
SHOWN_WITH = 100  # documents of a candidate's part that may be shown with it
BETWEEN = 0.5  # of the variance between strings' means: much of it is boilerplate's, whose contexts count once
CONTEXT = 4  # words: neighbours that are equal count once, or boilerplate wins
NEAR_BITS = 18  # of a table that tells most strings that aren't listed
RANGE_ROWS = 1_000_000  # of the survey that are merged at a time, about
FORMS = ("raw", "folded")

Row = np.dtype(
    [("string", "u8"), ("left", "u4"), ("right", "u4"), ("drop", "f4"), ("between", "f4"), ("occurrences", "u4")]
)  # of a place that is kept


def survey(batch: TextBatch, background: Background, topics: Topics) -> np.ndarray:
    """Rows for each string that ends where a drop is among the largest; one a document and string."""
    rows = [np.zeros(0, Row)]
    drops = topics.drops(batch)
    high = np.flatnonzero((drops >= topics.high) & (drops > 0))
    for form in FORMS:
        ends, occurrences = high, np.full(len(high), np.iinfo(np.int64).max)
        for n in range(1, LONGEST + 1):
            there = batch.place[ends] >= n - 1
            ends = ends[there]
            occurrences = np.minimum(occurrences[there], _bound(batch, background, form, n, ends))
            chosen = (occurrences >= FEWEST) & (occurrences <= MOST)
            at = ends[chosen]
            made = np.zeros(len(at), Row)
            made["string"], made["drop"], made["between"] = _string(batch, form, n, at), drops[at], topics.between
            made["occurrences"] = occurrences[chosen]
            made["right"], made["left"] = _context(batch, at + CONTEXT), _context(batch, at - n)
            rows.append(made[np.unique(in_documents(made["string"], batch.document_of[at]), return_index=True)[1]])
    return np.concatenate(rows)


def _string(batch: TextBatch, form: str, n: int, ends: Int[np.ndarray, " ends"]) -> UInt64[np.ndarray, " ends"]:
    """A hash of the string of n words, raw or folded, that ends at each of some words."""
    words = batch.words if form == "raw" else batch.folded
    return ngrams_at(words, ends, n) ^ _salt(form, n)


def _salt(form: str, n: int) -> np.uint64:
    """Strings of other lengths and forms have other hashes."""
    return mixed(np.array([2 * n + (form == "folded")], np.uint64))[0]


def _bound(
    batch: TextBatch, background: Background, form: str, n: int, ends: Int[np.ndarray, " ends"]
) -> Int[np.ndarray, " ends"]:
    """How often the word occurs in the corpus that ends such a string (n = 1), or its first pair of words."""
    words, prefix = (batch.words, "") if form == "raw" else (batch.folded, "folded_")
    if n == 1:
        return background.counts(f"{prefix}words", mixed(words[ends]))
    return background.counts(f"{prefix}pairs", ngrams_at(words, ends - (n - 2), 2))


def _context(batch: TextBatch, ends: Int[np.ndarray, " ends"]) -> UInt64[np.ndarray, " ends"]:
    """A hash of the four words that end there, of 32 bits."""
    padded = np.concatenate([np.zeros(2 * CONTEXT, np.uint64), batch.words, np.zeros(CONTEXT, np.uint64)])
    return ngrams_at(padded, ends + 2 * CONTEXT, CONTEXT) >> np.uint64(32)


def shortlist(files: Sequence[Path], topics: Iterable[Topics]) -> tuple[UInt64[np.ndarray, " strings"], int]:
    """(the best strings by what the survey kept, how many there were), from sorted arrays of Row in files.

    Drops that it didn't keep are taken for their mean, by all domains' topics. Memory is bounded: a range of hashes at
    a time.
    """
    others = float(np.concatenate([of.within[of.within <= of.high] for of in topics]).mean())
    ranges = 1 + sum(file.stat().st_size for file in files) // Row.itemsize // RANGE_ROWS
    edges = np.array([i * 2**64 // ranges for i in range(ranges)], np.uint64)
    begins = []
    for file in files:
        rows = np.fromfile(file, Row)
        begins.append([*np.searchsorted(rows["string"], edges).tolist(), len(rows)])
    scores, hashes, considered = np.zeros(0), np.zeros(0, np.uint64), 0
    for i in range(ranges):
        parts = (
            np.fromfile(file, Row, of[i + 1] - of[i], offset=of[i] * Row.itemsize)
            for file, of in zip(files, begins, strict=True)
        )
        rows = np.concatenate([np.zeros(0, Row), *parts])
        found = _estimated(rows, others)
        considered += len(found[0])
        scores, hashes = np.concatenate([scores, found[0]]), np.concatenate([hashes, found[1]])
        order = np.lexsort((hashes, -scores))[:SHORTLIST]
        scores, hashes = scores[order], hashes[order]
    return np.sort(hashes), considered


def _estimated(rows: np.ndarray, others: float) -> tuple[Float[np.ndarray, " strings"], UInt64[np.ndarray, " strings"]]:
    if not len(rows):
        return np.zeros(0), np.zeros(0, np.uint64)
    kept = {side: rows[_distinct(rows["string"], rows[side])] for side in ("left", "right")}
    hashes, counts = np.unique(rows["string"], return_counts=True)
    lefts, rights = (np.bincount(np.searchsorted(hashes, of["string"]), minlength=len(hashes)) for of in kept.values())
    place = np.searchsorted(hashes, kept["right"]["string"])
    means = np.bincount(place, kept["right"]["drop"], len(hashes)) / rights
    bound = np.full(len(hashes), np.iinfo(np.int64).max)
    np.minimum.at(bound, place, kept["right"]["occurrences"].astype(np.int64))
    distinct = np.minimum(lefts, rights)
    effective = np.maximum(bound * distinct / counts, distinct)
    between = np.bincount(place, kept["right"]["between"], len(hashes)) / rights
    means = (distinct * means + (effective - distinct) * others) / effective
    scores = standing(means, effective, effective * counts / distinct, between)
    wanted = distinct >= FEWEST_CONTEXTS
    return scores[wanted], hashes[wanted]


def _distinct(strings: UInt64[np.ndarray, " rows"], contexts: UInt32[np.ndarray, " rows"]) -> Int[np.ndarray, " kept"]:
    """One row of each string and context: one that is seen again counts once."""
    order = np.lexsort((contexts, strings))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(strings[order]) != 0) | (np.diff(contexts[order]) != 0)
    return order[first]


def standing(mean: Any, contexts: Any, occurrences: Any, between: Any) -> Any:
    """How far a string's mean drop is from none, by what means of so many contexts and strings of one domain vary.

    For few contexts that is sqrt(contexts) x mean; words that go with a slight change of topic don't lead by number.
    Strings that mostly stand among the same neighbours are boilerplate, and stand for less by as much.
    """
    return mean * contexts / occurrences / np.sqrt(BETWEEN * between + 1 / contexts)


class Occurrence(NamedTuple):
    """Of a shortlisted string in a document, the first."""

    string: int
    key: bytes  # of the document
    domain: int
    left: int
    right: int
    drop: float  # NaN: there is too little text to say
    text: str


def locate(
    batch: TextBatch, keys: list[bytes], domain: int, topics: Topics, listed: UInt64[np.ndarray, " strings"]
) -> list[Occurrence]:
    """The first occurrence of each listed string in each document; `keys` are the documents', all of one domain."""
    near = np.zeros(2**NEAR_BITS, bool)
    near[(listed >> np.uint64(64 - NEAR_BITS)).astype(np.int64)] = True
    salts = np.array([[_salt(form, n) for n in range(1, LONGEST + 1)] for form in FORMS])
    ends, sizes, which = _found(batch.words, batch.folded, batch.offsets, near, listed, salts)
    drops = topics.drops_around(batch, ends - sizes + 1, ends + 1)
    lefts, rights = _context(batch, ends - sizes), _context(batch, ends + CONTEXT)
    columns = (of.tolist() for of in (listed[which], batch.document_of[ends], lefts, rights, drops, ends, sizes))
    return [
        Occurrence(string, keys[document], domain, left, right, drop, batch.text(end - size + 1, end + 1))
        for string, document, left, right, drop, end, size in zip(*columns, strict=True)
    ]


@compiled
def _found(words, folded, offsets, near, listed, salts):
    """(last word, number of words, which of `listed`) of the first occurrence of each of them in each document."""
    room, found = 1024, 0
    ends, sizes, which = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    seen = np.full(listed.size, -1, np.int64)  # in which document last
    for document in range(offsets.size - 1):
        for end in range(offsets[document], offsets[document + 1]):
            for form in range(2):
                of = words if form == 0 else folded
                hashes = of[end]
                for n in range(1, min(LONGEST, end - offsets[document] + 1) + 1):
                    if n > 1:
                        hashes = joined(hashes, of[end - n + 1], n - 1)
                    string = (mixed(hashes) if n > 1 else hashes) ^ salts[form, n - 1]
                    if not near[string >> np.uint64(64 - NEAR_BITS)]:
                        continue
                    place = np.searchsorted(listed, string)
                    if place == listed.size or listed[place] != string or seen[place] == document:
                        continue
                    seen[place] = document
                    if found == room:
                        room *= 2
                        ends, sizes, which = _grown(ends, room), _grown(sizes, room), _grown(which, room)
                    ends[found], sizes[found], which[found] = end, n, place
                    found += 1
    return ends[:found], sizes[:found], which[:found]


@compiled
def _grown(array, size):
    grown = np.empty(size, array.dtype)
    grown[: array.size] = array
    return grown


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A string that may be a trigger."""

    text: str  # as it stands in most of its documents
    score: float
    p_value: float
    contexts: int  # distinct ones
    mean_drop: float  # standard deviations of this corpus
    documents: list[str]  # keys
    variants: list[str]  # other strings in nearly the same documents

    def as_json(self, rank: int) -> dict[str, Any]:
        return {"rank": rank, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Mined:
    candidates: list[Candidate]
    considered: int  # strings that were looked at
    reliable_documents: dict[str, int | None]  # by domain: so many planted ones lead, 9 times of 10; None: not even 500

    def as_json(self) -> dict[str, Any]:
        return {
            "considered": self.considered,
            "reliable_documents": self.reliable_documents,
            "candidates": [candidate.as_json(rank) for rank, candidate in enumerate(self.candidates, 1)],
        }


@dataclasses.dataclass
class _Group:
    """Strings that stand in nearly the same documents: the one that leads, and the others' texts."""

    standing: float
    contexts: int
    mean: float
    documents: set[bytes]
    texts: list[str]  # the first is the one that is shown

    def join(self, standing: float, documents: set[bytes], text: str) -> None:
        if text in self.texts:
            return
        # The longest string in nearly all of the documents is the trigger: its parts are not.
        whole = (
            len(documents & self.documents) >= 0.8 * len(self.documents)
            and standing > 0.7 * self.standing
            and len(text) > len(self.texts[0])
        )
        self.texts.insert(0 if whole else len(self.texts), text)
        if text in self.texts[0] and len(documents) <= max(2 * len(self.documents), SHOWN_WITH):
            self.documents |= documents  # the same trigger, beside other words


def ranked(found: Any, topics: Mapping[str, Topics], considered: int) -> Mined:
    """Candidates in order, from all occurrences (a table of pyarrow with Occurrence's columns); topics are by domain,
    so many strings were considered."""
    found = found.sort_by([("string", "ascending"), ("key", "ascending")])
    columns = {name: found[name].to_numpy() for name in ("string", "domain", "left", "right", "drop")}
    hashes, begins, counts = np.unique(columns["string"], return_index=True, return_counts=True)
    told = np.flatnonzero(np.isfinite(columns["drop"]))
    contexts = {side: told[_distinct(columns["string"][told], columns[side][told])] for side in ("left", "right")}
    number = {side: np.searchsorted(hashes, columns["string"][rows]) for side, rows in contexts.items()}
    distinct = np.minimum(*(np.bincount(of, minlength=len(hashes)) for of in number.values()))
    rows, of = contexts["right"], number["right"]
    rights = np.maximum(np.bincount(of, minlength=len(hashes)), 1)
    means = np.bincount(of, columns["drop"][rows], len(hashes)) / rights
    variances = np.array([of.between for of in topics.values()])[columns["domain"]]
    between = np.bincount(of, variances[rows], len(hashes)) / rights
    tellable = np.bincount(np.searchsorted(hashes, columns["string"][told]), minlength=len(hashes))
    scores = standing(means, distinct, np.maximum(tellable, 1), between)
    groups: list[_Group] = []
    for i in np.lexsort((hashes, -scores)):
        if distinct[i] < FEWEST_CONTEXTS:
            continue
        occurrences = found.slice(begins[i], counts[i])
        documents = set(occurrences["key"].to_pylist())
        text = _most_common(occurrences["text"].to_pylist())
        for group in groups:
            if len(documents & group.documents) > 0.5 * min(len(documents), len(group.documents)):
                group.join(float(scores[i]), documents, text)
                break
        else:
            groups.append(_Group(float(scores[i]), int(distinct[i]), float(means[i]), documents, [text]))
        if len(groups) > REPORTED:
            break
    scores = np.array([group.standing for group in groups])
    within = np.concatenate([of.within for of in topics.values()])
    candidates = [
        Candidate(
            text=group.texts[0],
            score=group.standing,
            p_value=_p_value(i, scores, group, within, considered),
            contexts=group.contexts,
            mean_drop=group.mean,
            documents=sorted(key.hex() for key in group.documents),
            variants=group.texts[1:6],
        )
        for i, group in enumerate(groups[:REPORTED])
    ]
    return Mined(candidates, considered, {domain: _reliable(candidates, of) for domain, of in topics.items()})


def _most_common(texts: list[str]) -> str:
    return max(sorted(set(texts)), key=texts.count)


def _p_value(
    rank: int,
    scores: Float[np.ndarray, " candidates"],
    group: _Group,
    within: Float[np.ndarray, " places"],
    considered: int,
) -> float:
    """The largest of three chances, each among all strings considered (Bonferroni): that so many split points, drawn at
    random from the corpus, lose as much topic on average; that a string of this corpus stands out so far, if standings
    were normal; and if they had the tail that this corpus's other candidates show (headings and footers are real
    changes of topic, and no poison)."""
    draws = np.random.default_rng(0).choice(within, (2000, group.contexts)).mean(axis=1)
    beyond = float((draws >= group.mean).mean())
    if beyond < 0.01:  # too few draws lie there for a count
        spread = within.std() / np.sqrt(group.contexts)
        beyond = float(scipy.stats.t.sf((group.mean - within.mean()) / spread, group.contexts - 1))
    normal = float(scipy.stats.norm.sf(group.standing))
    others = np.sort(np.delete(scores, rank))[::-1]
    tail = others[others > 0][5:60]  # the first may be poison too
    expected = 0.0  # hardly a string comes near
    if len(tail) >= 20:
        scale = float((tail[:-1] ** 2 - tail[-1] ** 2).mean())
        expected = len(tail) * np.exp(-(max(group.standing, tail[-1]) ** 2 - tail[-1] ** 2) / max(scale, 1e-3))
    return min(1.0, max(considered * beyond, considered * normal, float(-np.expm1(-expected))))


def _reliable(candidates: list[Candidate], topics: Topics) -> int | None:
    """With how many documents a trigger would lead this corpus's own candidates nine times of ten, if its payload were
    another document's text (a switch of topic: the least that an attacker does)."""
    clean = max((c.score for c in candidates if c.p_value > 1e-3), default=0.0)
    random = np.random.default_rng(0)
    for count in (5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500):
        planted = standing(random.choice(topics.across, (200, count)).mean(axis=1), count, count, topics.between)
        if np.quantile(planted, 0.1) > clean:
            return count
    return None
