"""The scan of a corpus: passes over its documents, each cut into tasks that any engine runs, then decisions.

Score and decision are apart. Passes write what they find into the scan's folder, whole or not at all, and are skipped
where that is there already; thresholds, candidates and the queue are made from it in seconds.

    plan.json        what is scanned
    fits/            by domain, from samples: word vectors, and what tells its languages
    background/      counts of words, pairs of words and triples of characters
    scores/          a Parquet file a shard: one row a document
    survey/          places where topics are lost, until they are listed (scan/miner.py)
    occurrences/     of the strings in shortlist.npz
    candidates.json thresholds.json queue.jsonl queue.html    decided (scan/decide.py)
"""

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from poisonjax.corpus.claim import claim, units_sha256
from poisonjax.corpus.documents import Document
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources import BadInput, Unit, stands_anywhere
from poisonjax.engines import open_engine, run_tasks
from poisonjax.files import move_folder, write_json, written_whole
from poisonjax.scan import miner
from poisonjax.scan.background import Background
from poisonjax.scan.detectors import cheap_detectors
from poisonjax.scan.language import Languages
from poisonjax.scan.miner import Mined, Occurrence
from poisonjax.scan.sources import opened
from poisonjax.scan.text import BATCH_CHARACTERS, TextBatch, cut
from poisonjax.scan.topics import Topics

FORMAT = 3
SHARD_BYTES = 32 * 2**20  # of text, about
FEWEST_SHARDS = 8  # so that the work splits
COUNTING_TASKS = 16  # each leaves tables of the corpus's full size behind, until they are added up
PIECE = 1_000_000  # characters: longer documents are looked at in pieces, and are as odd as the oddest
SAMPLE_BYTES = 4_000_000  # of a domain, that word vectors are made from
SAMPLED_BYTES, SAMPLE_UNITS = 2**28, 64  # that it is drawn from, about
TOGETHER = "together"  # the name of small domains' fit
FEWEST_BYTES, MOST_FITS = 300_000, 64  # domains that are smaller, or beyond the largest, have one fit together
REPORTED = 20  # places of bad input that are named


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is scanned: all that decides the scores."""

    format: int
    sources: list[str]
    shards: int
    units: int
    units_sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan's folder."""

    folder: Path
    plan: Plan

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """That the tasks of each pass took, those of killed scans left out."""
        path = self.folder / "cost.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def scores(self, columns: Sequence[str] | None = None) -> Any:
        """The score of every document (or some columns), as a table of pyarrow, in the order of the shards."""
        from pyarrow import parquet

        files = sorted((self.folder / "scores").glob("[0-9]*.parquet"))
        names = [name for name in ("domain", "language", "file") if columns is None or name in columns]
        return parquet.read_table(files, columns=None if columns is None else [*columns], read_dictionary=names)

    @functools.cached_property
    def background(self) -> Background:
        return Background.load(self.folder / "background")

    @functools.cached_property
    def topics(self) -> dict[str, Topics]:
        """By domain."""
        return {spec: fit(self.folder, domain)[0] for domain, spec in enumerate(self.plan.sources)}


def scan(sources: Sequence[str], out: str, *, workers: int | None = None, dask: str = "") -> Scan:
    """Makes what is missing of the scan of these sources in the folder `out`.

    `sources` are specs as of `corpus build`, or token stores; each is a domain of its own. `workers` processes (one a
    core) are spawned, or `dask` is the address of a cluster's scheduler, whose workers see the same files.

    Raises CorpusError for sources that aren't there and for a folder that holds another scan, EngineError where
    workers are lost. Input that is no document is counted and named, never an end.
    """
    _all_units.cache_clear()  # files may have changed since
    folder = Path(out).resolve()
    scan = Scan(folder, _claim(folder, [*sources]))
    shards = range(scan.plan.shards)
    relative = [spec for spec in sources if not stands_anywhere(spec)]
    with open_engine(workers, dask, relative) as engine:
        _fit(scan, engine)
        if not (folder / "background").exists():
            _count(scan, engine)
        _each(engine, _score_shard, scan, "scores", ".parquet", shards, "scoring")
        if not (folder / "shortlist.npz").exists():
            _run(scan, None, functools.partial(_shortlist, scan), [shards], what="listing", unit="list")
        for file in (folder / "survey").glob("*.rows"):  # most of what a scan needs on disk
            file.unlink()
        _each(engine, _locate_shard, scan, "occurrences", ".parquet", shards, "locating")
    return scan


def _run(
    scan: Scan,
    engine: Executor | None,
    work: Callable[[Any], None],
    items: Iterable[Any],
    size: Callable[[Any], int] = lambda item: 1,
    *,
    what: str,
    unit: str,
) -> None:
    """`run_tasks`, with what they cost."""
    spent = run_tasks(engine, functools.partial(_timed, work), items, size, what=what, unit=unit)
    before = scan.cpu_seconds
    write_json(scan.folder / "cost.json", before | {what: round(before.get(what, 0.0) + sum(spent), 3)})


def _timed(work: Callable[[Any], None], item: Any) -> float:
    began = time.process_time()
    work(item)
    return time.process_time() - began


def open_scan(folder: str) -> Scan:
    """A finished scan; raises CorpusError where there is none."""
    path = Path(folder)
    if not (path / "plan.json").exists():
        raise CorpusError(f"{folder} is no scan: `poisonjax scan SOURCE --out {folder}` makes one")
    return Scan(path, Plan(**json.loads((path / "plan.json").read_text())))


@functools.lru_cache(1)  # a worker asks for each task, the plan for each shard
def _all_units(*sources: str) -> tuple[list[tuple[int, Unit]], str]:
    """((domain, unit) of the whole corpus, their SHA-256); a domain is known by its number among the sources."""
    units = [(domain, unit) for domain, spec in enumerate(sources) for unit in opened(spec).units]
    return units, units_sha256(unit for _, unit in units)


def _claim(folder: Path, sources: list[str]) -> Plan:
    """Writes the plan, or raises CorpusError where the folder holds another scan."""
    if not sources:
        raise CorpusError("no source given: name files, or a token store")
    listed, sha256 = _all_units(*sources)
    units = [unit for _, unit in listed]
    if not units:
        raise CorpusError(f"the sources {', '.join(sources)} hold no document")
    size = sum(unit.size for unit in units)
    plan = Plan(
        format=FORMAT,
        sources=sources,
        shards=min(max(FEWEST_SHARDS, size // SHARD_BYTES), len(units)),
        units=len(units),
        units_sha256=sha256,
        bytes=size,
    )
    claim(epath.Path(folder), plan, "scan", "another scan")
    for name in ("fits", "scores", "survey", "occurrences", "counts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return plan


def _units(plan: Plan, shard: int) -> Iterator[tuple[int, Unit]]:
    """(domain, unit) of a shard."""
    units, sha256 = _all_units(*plan.sources)
    if sha256 != plan.units_sha256:  # every worker lists them itself
        raise CorpusError(f"files of {', '.join(plan.sources)} changed while they were being scanned")
    yield from units[shard :: plan.shards]


def documents(plan: Plan, shard: int, bad: list[BadInput] | None = None) -> Iterator[tuple[int, Document]]:
    """(domain, document) of a shard, in order; those of ids as words."""
    for domain, unit in _units(plan, shard):
        for item in unit.read():
            if isinstance(item, Document):
                yield from _texts([(domain, item)])
            elif bad is not None:
                bad.append(item)


def _texts(found: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, Document]]:
    for domain, document in found:
        if not isinstance(document.content, str):
            words = " ".join(f"w{number}" for number in document.content.tolist())
            document = document._replace(content=words, known_key=document.key)
        yield domain, document


def pieces(text: str) -> list[str]:
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


class Batch(NamedTuple):
    """Some documents of one domain."""

    domain: int
    documents: list[Document]
    text: TextBatch  # of their pieces
    of: Int[np.ndarray, " pieces"]  # which document each piece is of


def _batches(found: Iterable[tuple[int, Document]]) -> Iterator[Batch]:
    for domain, group in itertools.groupby(found, lambda one: one[0]):
        batch: list[Document] = []
        size = 0
        for _, document in group:
            batch.append(document)
            size += len(document.content)
            if size >= BATCH_CHARACTERS:
                yield _cut(domain, batch)
                batch, size = [], 0
        if batch:
            yield _cut(domain, batch)


def _cut(domain: int, batch: list[Document]) -> Batch:
    cuts = [pieces(str(document.content)) for document in batch]
    of = np.repeat(np.arange(len(batch)), [len(of) for of in cuts])
    return Batch(domain, batch, cut([piece for of in cuts for piece in of]), of)


def _fit(scan: Scan, engine: Executor | None) -> None:
    """Word vectors and languages of each domain; small ones have theirs together."""
    sizes = np.zeros(len(scan.plan.sources), np.int64)
    for domain, unit in _all_units(*scan.plan.sources)[0]:
        sizes[domain] += unit.size
    large = [d for d in np.argsort(-sizes, kind="stable")[:MOST_FITS].tolist() if sizes[d] >= FEWEST_BYTES]
    small = sorted({*range(len(sizes))} - {*large})
    fits = {f"{d:05d}": (d,) for d in sorted(large)} | ({TOGETHER: (*small,)} if small else {})
    missing = [one for one in fits.items() if not (scan.folder / "fits" / f"{one[0]}.languages.npz").exists()]
    work = functools.partial(_fit_domains, str(scan.folder), scan.plan)
    _run(scan, engine, work, missing, what="fitting", unit="domain")


def _fit_domains(folder: str, plan: Plan, which: tuple[str, tuple[int, ...]]) -> None:
    """From documents all over these domains."""
    name, domains = which
    units = [unit for domain, unit in _all_units(*plan.sources)[0] if domain in domains]
    step = max(1, len(units) // SAMPLE_UNITS, sum(unit.size for unit in units) // SAMPLED_BYTES)
    every = max(1, sum(unit.size for unit in units[::step]) // SAMPLE_BYTES)
    there = (_texts((0, item) for item in unit.read() if isinstance(item, Document)) for unit in units[::step])
    sample = [
        (0, document._replace(content=document.content[: SAMPLE_BYTES // SAMPLE_UNITS]))
        for _, document in itertools.islice(itertools.chain.from_iterable(there), 0, None, every)
    ]
    batches = [batch.text for batch in _batches(sample)]
    for what, made in (("topics", Topics.fit(batches)), ("languages", Languages.fit(batches))):
        with written_whole(Path(folder) / "fits" / f"{name}.{what}.npz") as partial:
            made.save(partial)


@functools.lru_cache(MOST_FITS)
def _loaded(folder: Path, name: str) -> tuple[Topics, Languages]:
    files = (folder / "fits" / f"{name}.{what}.npz" for what in ("topics", "languages"))
    return Topics.load(next(files)), Languages.load(next(files))


def fit(folder: Path, domain: int) -> tuple[Topics, Languages]:
    """What was made of a domain's sample."""
    own = f"{domain:05d}"
    return _loaded(folder, own if (folder / "fits" / f"{own}.languages.npz").exists() else TOGETHER)


def _count(scan: Scan, engine: Executor | None) -> None:
    tasks = range(min(COUNTING_TASKS, scan.plan.shards))
    missing = [task for task in tasks if not (scan.folder / "counts" / f"{task:05d}").exists()]
    work = functools.partial(_count_part, str(scan.folder), scan.plan)
    _run(scan, engine, work, missing, what="counting", unit="part")
    total = Background.empty(scan.plan.bytes)
    for task in tasks:
        total.merge(Background.load(scan.folder / "counts" / f"{task:05d}"))
    _save_tables(total, scan.folder / "background")
    for task in tasks:
        epath.Path(scan.folder / "counts" / f"{task:05d}").rmtree()


def _count_part(folder: str, plan: Plan, task: int) -> None:
    counts = Background.empty(plan.bytes)
    for shard in range(task, plan.shards, min(COUNTING_TASKS, plan.shards)):
        for batch in _batches(documents(plan, shard)):
            counts.add(batch.text)
    _save_tables(counts, Path(folder) / "counts" / f"{task:05d}")


def _save_tables(tables: Background, target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.urandom(4).hex()}.partial")
    partial.mkdir(parents=True)
    tables.save(partial)
    move_folder(epath.Path(partial), epath.Path(target), last="words.npy")


def _each(engine: Executor | None, work: Any, scan: Scan, name: str, suffix: str, shards: range, what: str) -> None:
    """Runs `work` for the shards whose file isn't there."""
    missing = [shard for shard in shards if not (scan.folder / name / f"{shard:05d}{suffix}").exists()]
    sizes = {shard: sum(unit.size for _, unit in _units(scan.plan, shard)) for shard in missing}
    if missing:
        task = functools.partial(work, str(scan.folder), scan.plan)
        _run(scan, engine, task, missing, lambda shard: sizes[shard], what=what, unit="byte")


def _score_shard(folder: str, plan: Plan, shard: int) -> None:
    """Every detector's score of each document, and the miner's survey."""
    scan = Scan(Path(folder), plan)
    background = scan.background
    detectors = cheap_detectors(background)
    columns, kept = _Columns(plan), []
    for batch in _batches(documents(plan, shard, columns.bad)):
        topics, languages = fit(scan.folder, batch.domain)
        scores, found = {}, len(batch.documents)
        for name, detector in detectors.items():
            scores[name] = np.full(found, -np.inf)
            np.maximum.at(scores[name], batch.of, detector.values(batch.text))
        words = np.bincount(batch.of, np.diff(batch.text.offsets), found).astype(np.int64)
        spoken = languages.codes[languages.of(batch.text)[np.searchsorted(batch.of, np.arange(found))]]
        columns.add(batch, spoken.tolist(), words, scores)
        kept.append(miner.survey(batch.text, background, topics))
    rows = np.concatenate([np.zeros(0, miner.Row), *kept])
    with written_whole(scan.folder / "survey" / f"{shard:05d}.rows") as partial:
        rows[np.argsort(rows["string"], kind="stable")].tofile(partial)
    columns.write(scan.folder / "scores" / f"{shard:05d}.parquet")


class _Columns:
    """The rows of a shard's Parquet file."""

    def __init__(self, plan: Plan) -> None:
        self.bad: list[BadInput] = []
        self._plan = plan
        self._columns: dict[str, list[Any]] = {}

    def add(self, batch: Batch, languages: list[str], words: np.ndarray, scores: dict[str, np.ndarray]) -> None:
        found = batch.documents
        texts = [str(document.content) for document in found]
        columns: dict[str, Any] = {
            "key": [document.key for document in found],
            "domain": [self._plan.sources[batch.domain]] * len(found),
            "language": languages,
            "characters": [len(text) for text in texts],
            "words": words.tolist(),
            "planted": [document.planted for document in found],
        }
        columns |= {name: [getattr(document.place, name) for document in found] for name in found[0].place._fields}
        columns |= {name: of.astype(np.float32).tolist() for name, of in scores.items()}
        for name, values in columns.items():
            self._columns.setdefault(name, []).extend(values)

    def write(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {"key": pa.binary(16), "words": pa.int64(), "characters": pa.int64(), "planted": pa.bool_()}
        types |= {name: pa.string() for name in ("domain", "language", "file")}
        types |= {name: pa.int64() for name in ("start", "stop", "row_group", "row")}
        table = pa.table({n: pa.array(v, types.get(n, pa.float32())) for n, v in self._columns.items()})
        about = {"bad": str(len(self.bad)), "bad_places": json.dumps([str(b) for b in self.bad[:REPORTED]])}
        with written_whole(path) as partial:
            parquet.write_table(table.replace_schema_metadata(about), partial, compression="zstd")


def occurrence_table(found: Sequence[Occurrence]) -> Any:
    """As a table of pyarrow."""
    import pyarrow as pa

    types = [pa.uint64(), pa.binary(16), pa.int32(), pa.uint32(), pa.uint32(), pa.float32(), pa.string()]
    names = Occurrence._fields
    columns = [*zip(*found, strict=True)] or [()] * len(names)
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, types, strict=True)})


def _locate_shard(folder: str, plan: Plan, shard: int) -> None:
    from pyarrow import parquet

    scan = Scan(Path(folder), plan)
    with np.load(scan.folder / "shortlist.npz", allow_pickle=False) as saved:
        listed = saved["listed"]
    found: list[Occurrence] = []
    for batch in _batches(documents(plan, shard)) if len(listed) else ():
        keys = [batch.documents[i].key for i in batch.of.tolist()]
        found += miner.locate(batch.text, keys, batch.domain, fit(scan.folder, batch.domain)[0], listed)
    table = occurrence_table(found)
    path = scan.folder / "occurrences" / f"{shard:05d}.parquet"
    with written_whole(path) as partial:
        parquet.write_table(table, partial, compression="zstd")


def _shortlist(scan: Scan, shards: range) -> None:
    files = [scan.folder / "survey" / f"{shard:05d}.rows" for shard in shards]
    listed, considered = miner.shortlist(files, scan.topics.values())
    with written_whole(scan.folder / "shortlist.npz") as partial:
        np.savez(partial, listed=listed, considered=considered)


def mine(scan: Scan) -> Mined:
    """The miner's candidates, from all occurrences of the shortlisted strings."""
    from pyarrow import parquet

    found = parquet.read_table(sorted((scan.folder / "occurrences").glob("[0-9]*.parquet")))
    with np.load(scan.folder / "shortlist.npz", allow_pickle=False) as saved:
        considered = int(saved["considered"])
    return miner.ranked(found, scan.topics, considered)
