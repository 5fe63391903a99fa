"""Decisions, made from a finished scan in seconds: thresholds, the order of oddness, and who is in the review queue."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.sources import read_at
from poisonjax.engines import open_engine, run_tasks
from poisonjax.files import write_json, write_lines, write_whole
from poisonjax.scan import thresholds
from poisonjax.scan.cascade import SHARE, model_scores
from poisonjax.scan.corpus import REPORTED, Plan, Scan, documents, mine, pieces
from poisonjax.scan.detectors import Detector, cheap_detectors
from poisonjax.scan.miner import Mined
from poisonjax.scan.page import review_page
from poisonjax.scan.thresholds import Threshold

RATE = 0.01
FLAGGED = 20  # documents that a threshold would flag in a group: with fewer, it is set with the domain's others
BUDGET = 1000
REVIEWED_CANDIDATES = 10  # whose documents are put into the queue
FOR_CANDIDATES = 0.5  # of the queue, at most
TOO_COMMON = 0.1  # of the queue: a candidate in more documents is shown by a part of them, unless it stands out
STANDS_OUT = 0.01  # p-value
SPARE = 2  # times the places left are looked at, so that near-duplicates can be put together
ALIKE = 0.8  # Jaccard similarity of words, estimated by MinHash (Broder 1997)
SHOWN_CHARACTERS = 6000  # of a document


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is made of a scan's scores."""

    mined: Mined
    thresholds: list[Threshold]
    queue: list[dict[str, Any]]


def decide(
    scan: Scan,
    *,
    budget: int = BUDGET,
    rate: float = RATE,
    model: str = "",
    share: float = SHARE,
    workers: int | None = None,
    dask: str = "",
) -> Decision:
    """Writes candidates.json, thresholds.json, queue.jsonl and queue.html into the scan's folder.

    `model` names a language model (a spec, as everywhere) that scores the `share` of documents which cheap scores find
    oddest; its threshold is told among these.
    """
    cheap = cheap_detectors(scan.background)
    detectors = [*cheap]
    # Column by column: there may be very many rows.
    columns = {name: scan.scores([name])[name].to_numpy() for name in detectors}
    keys = _keys(scan.scores(["key"])["key"])
    folds, uniform = keys[:, 0] % np.uint8(thresholds.FOLDS), keys[:, 1:5].copy().view("<u4")[:, 0] / np.float32(2**32)
    (domain_of, domains), (language_of, languages) = (
        _numbered(scan.scores([name])[name]) for name in ("domain", "language")
    )
    limits: list[Threshold] = []
    read = functools.partial(_read, scan, workers, dask)
    least, why = np.ones(len(keys), np.float32), np.zeros(len(keys), np.int8)
    groups = [*thresholds.groups(domain_of, language_of, round(FLAGGED / rate))]

    def judge(number: int, name: str) -> None:
        for domain, language, where in groups:
            where = where[np.isfinite(columns[name][where])]
            scores = columns[name][where]
            place = domains[domain], thresholds.ALL if language is None else languages[language]
            limits.append(thresholds.conformal(name, scores, folds[where], uniform[where], place, rate))
            p = thresholds.p_values(scores)
            better = p < least[where]
            least[where[better]] = p[better]
            why[where[better]] = number

    for number, name in enumerate(detectors):
        judge(number, name)
    if model:
        order = np.argsort(least, kind="stable")[: max(1, round(share * len(keys)))]
        columns["model"] = np.full(len(keys), -np.inf)
        columns["model"][order] = model_scores(scan.folder, model, [keys[i].tobytes() for i in order], read)
        detectors.append("model")
        judge(len(detectors) - 1, "model")
    mined = mine(scan)
    # A model's reasons are where cheap scores found its documents odd.
    reasons = cheap | {"model": cheap["surprise"]}
    queue = _queue(read, mined, keys, least, lambda i: detectors[why[i]], reasons, budget)
    rows = _rows(keys, {bytes.fromhex(entry["key"]) for entry in queue})
    for entry in queue:
        i = rows[bytes.fromhex(entry["key"])]
        entry |= {"domain": domains[domain_of[i]], "language": languages[language_of[i]]}
        scores = {name: float(columns[name][i]) for name in detectors}
        entry["scores"] = {name: round(score, 4) for name, score in scores.items() if np.isfinite(score)}
    write_json(scan.folder / "candidates.json", mined.as_json())
    write_json(scan.folder / "thresholds.json", [dataclasses.asdict(limit) for limit in limits])
    write_lines(epath.Path(scan.folder / "queue.jsonl"), queue)
    write_whole(epath.Path(scan.folder / "queue.html"), review_page(queue, scan.plan.sources))
    return Decision(mined, limits, queue)


def _keys(column: Any) -> UInt8[np.ndarray, "documents 16"]:
    """Of a column of pyarrow, without an object for each."""
    chunks = [np.frombuffer(c.buffers()[1], np.uint8)[16 * c.offset :][: 16 * len(c)] for c in column.chunks if len(c)]
    return np.concatenate([np.zeros(0, np.uint8), *chunks]).reshape(-1, 16)


def _numbered(column: Any) -> tuple[Int[np.ndarray, " documents"], list[str]]:
    """(which of the texts each is, the texts) of a column of pyarrow."""
    chunks = column.unify_dictionaries().chunks
    numbers = [chunk.indices.to_numpy().astype(np.int32) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int32), *numbers]), chunks[0].dictionary.to_pylist() if chunks else []


def _rows(keys: UInt8[np.ndarray, "documents 16"], wanted: set[bytes]) -> dict[bytes, int]:
    """Where some keys stand (first)."""
    begins = np.zeros((256, 256), bool)
    for key in wanted:
        begins[key[0], key[1]] = True
    near = np.flatnonzero(begins[keys[:, 0], keys[:, 1]])[::-1].tolist()
    return {key: i for i in near if (key := keys[i].tobytes()) in wanted}


def _queue(
    read: Callable[[set[bytes]], dict[bytes, Document]],
    mined: Mined,
    keys: UInt8[np.ndarray, "documents 16"],
    least: Float[np.ndarray, " documents"],
    why: Callable[[int], str],
    detectors: dict[str, Detector],
    budget: int,
) -> list[dict[str, Any]]:
    """Exactly `budget` documents, or all: those of the leading candidates, then the oddest; near-duplicates of one that
    is in are counted with it."""
    chosen: dict[bytes, dict[str, Any]] = {}
    for rank, candidate in enumerate(mined.candidates[:REVIEWED_CANDIDATES], 1):
        stands_out = candidate.p_value < STANDS_OUT
        room = budget if stands_out else round(FOR_CANDIDATES * budget) - len(chosen)
        shown = len(candidate.documents) if stands_out else round(TOO_COMMON * budget)
        for name in candidate.documents[: min(shown, max(room, 0))]:
            if len(chosen) < budget:
                reason = {"detector": "miner", "candidate": candidate.text, "rank": rank, "p_value": candidate.p_value}
                chosen.setdefault(bytes.fromhex(name), reason)
    order = np.argsort(least, kind="stable")[: len(chosen) + SPARE * budget].tolist()
    spare = {keys[i].tobytes(): i for i in order if keys[i].tobytes() not in chosen}
    found = read({*chosen, *spare})
    groups = _Groups()
    queue: list[dict[str, Any]] = []

    def put(key: bytes, reason: dict[str, Any]) -> None:
        queue.append(_entry(key, found[key], reason, detectors))

    for key, reason in chosen.items():
        groups.lead(key, str(found[key].content))
        put(key, reason)
    followers = []
    for key, i in spare.items():
        text, reason = str(found[key].content), {"detector": why(i), "p_value": float(least[i])}
        if leader := groups.like(text):
            followers.append((key, reason, leader))
        elif len(queue) < budget:
            groups.lead(key, text)
            put(key, reason)
    entries = {entry["key"]: entry for entry in queue}
    for key, reason, leader in followers:
        if len(queue) < budget:  # too few that differ
            put(key, reason)
        else:
            entries[leader.hex()]["alike"].append(key.hex())
    return queue


def _entry(key: bytes, document: Document, reason: dict[str, Any], detectors: dict[str, Detector]) -> dict[str, Any]:
    """A queue's line, with the spans of characters that are reasons."""
    text = str(document.content)
    spans: list[tuple[int, int]] = []
    if "candidate" in reason:
        at = text.find(reason["candidate"])
        spans = [(at, at + len(reason["candidate"]))] if at >= 0 else []
    elif text:
        parts = pieces(text)
        scored = [detectors[reason["detector"]].score(part) for part in parts]
        best = int(np.argmax([score.value for score in scored]))
        shift = sum(map(len, parts[:best]))
        spans = [(a + shift, b + shift) for a, b in scored[best].spans]
    begin = max(0, spans[0][0] - SHOWN_CHARACTERS // 2) if spans and spans[0][1] > SHOWN_CHARACTERS else 0
    return {
        "key": key.hex(),
        "source": document.place._asdict(),
        "reason": reason,
        "text": text[begin : begin + SHOWN_CHARACTERS],
        "begin": begin,
        "characters": len(text),
        "spans": [(a - begin, b - begin) for a, b in spans],
        "alike": [],
    }


class _Groups:
    """Which documents of the queue have nearly the same words."""

    def __init__(self) -> None:
        import rensa

        self._make = lambda: rensa.RMinHash(num_perm=64, seed=1)
        self._index = rensa.RMinHashLSH(threshold=ALIKE, num_perm=64, num_bands=16)
        self._leaders: list[tuple[bytes, Any]] = []

    def _sketch(self, text: str) -> Any:
        sketch, words = self._make(), text[:SHOWN_CHARACTERS].split()
        sketch.update([" ".join(words[i : i + 2]) for i in range(len(words))] or [""])
        return sketch

    def lead(self, key: bytes, text: str) -> None:
        """The document leads a group of its own."""
        sketch = self._sketch(text)
        self._index.insert(len(self._leaders), sketch)
        self._leaders.append((key, sketch))

    def like(self, text: str) -> bytes | None:
        """The leader that a text is nearly the same as, if any."""
        sketch = self._sketch(text)
        near = [i for i in self._index.query(sketch) if self._leaders[i][1].jaccard(sketch) >= ALIKE]
        return self._leaders[min(near)][0] if near else None


def _read(scan: Scan, workers: int | None, dask: str, wanted: set[bytes]) -> dict[bytes, Document]:
    """Documents by their keys."""
    from pyarrow import parquet

    shards, found = [], dict[bytes, Document]()
    for shard in range(scan.plan.shards):
        with parquet.ParquetFile(scan.folder / "scores" / f"{shard:05d}.parquet") as file:
            rows = _rows(_keys(file.read(["key"])["key"]), wanted - found.keys())
            if not rows:
                continue
            table = file.read(["domain", *Place._fields])
        here = set[bytes]()
        for key in sorted(rows):
            row = {name: table[name][rows[key]].as_py() for name in table.column_names}
            # Where a source can be read at a place, it is; else all of the shard, up to the last that is wanted.
            document = read_at(row.pop("domain"), Place(**row))
            if document and document.key == key:
                found[key] = document
            else:
                here.add(key)
        if here:
            shards.append((shard, frozenset(here)))
    with open_engine(min(workers or 2, len(shards) or 1), dask) as engine:
        parts = run_tasks(engine, functools.partial(_read_shard, scan.plan), shards, what="reading the queue")
    return {key: document for of in (found, *parts) for key, document in of.items()}


def _read_shard(plan: Plan, shard: tuple[int, frozenset[bytes]]) -> dict[bytes, Document]:
    number, wanted = shard
    found: dict[bytes, Document] = {}
    for _, document in documents(plan, number):
        if len(found) == len(wanted):
            break
        key = document.key
        if key in wanted:
            found[key] = document
    return found


def summary(scan: Scan, decision: Decision) -> dict[str, Any]:
    """What `scan --json` prints."""
    shards = [*_shards(scan)]
    return {
        "documents": sum(documents for documents, _, _ in shards),
        "bytes": scan.plan.bytes,
        "cpu_seconds_per_gb": costs(scan),
        "queue": len(decision.queue),
        "considered": decision.mined.considered,
        "reliable_documents": decision.mined.reliable_documents,
        "candidates": [
            {"text": c.text, "rank": rank, "p_value": c.p_value, "documents": len(c.documents)}
            for rank, c in enumerate(decision.mined.candidates, 1)
        ],
        "thresholds": [dataclasses.asdict(limit) for limit in decision.thresholds],
        "bad": sum(bad for _, bad, _ in shards),
        "bad_places": [place for _, _, places in shards for place in places][:REPORTED],
    }


def costs(scan: Scan) -> dict[str, float]:
    """CPU-seconds a GB of what was scanned, by pass."""
    return {name: round(seconds / max(scan.plan.bytes, 1) * 1e9, 1) for name, seconds in scan.cpu_seconds.items()}


def _shards(scan: Scan) -> Iterable[tuple[int, int, list[str]]]:
    """(documents, inputs that are none, the first of their places) of each shard, without reading its rows."""
    from pyarrow import parquet

    for path in sorted((scan.folder / "scores").glob("[0-9]*.parquet")):
        about = parquet.read_metadata(path)
        yield about.num_rows, int(about.metadata[b"bad"]), json.loads(about.metadata[b"bad_places"])
