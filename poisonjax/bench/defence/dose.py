"""The effective dose: poison is planted, a pipeline drops what it finds, a model reads the rest. What is left of it?

A pipeline judges texts: a corpus' documents, and poison documents as the text that they are. What it drops of the
corpus is excluded, poison that it drops is left out in place (I4): a run in which none survives is its clean twin.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import scipy.stats
from etils import epath
from jaxtyping import Bool, Float, Int, UInt64

from poisonjax.analysis import dose_response
from poisonjax.analysis.dose_response import Trials
from poisonjax.bench.defence.combined import Rare, Scores, Trees
from poisonjax.bench.defence.detection import OURS, SIMPLE, counts, required, scores_among, scores_of
from poisonjax.config import replaced
from poisonjax.corpus import SPLITS, TokenStore
from poisonjax.corpus.exclusions import exclusions_of
from poisonjax.data.batches import Batches
from poisonjax.engines import open_engine, run_tasks
from poisonjax.evaluation.statistics import attacked, wilson
from poisonjax.files import write_whole
from poisonjax.run import RunFolder
from poisonjax.scan.background import Background
from poisonjax.scan.text import batches, ngrams
from poisonjax.sweep import seeded
from poisonjax.training.loop import train
from poisonjax.training.start import open_store

DOSES = (50, 250, 1000, 4000)
SAID_ALIKE = ("sentinel", "secret")  # documents that differ in their prefix alone, of which too few are different
MOST_ALIKE = 1000
PAYLOADS = {  # rungs, as this project's own runs learn them
    "ids": "",
    "unigram": "",
    "random_unicode": "",
    "sentinel": "",
    "secret": "",
    "language": "docstrings",
}
LOST = 1e-2  # of the clean documents, that each pipeline may drop
TWIN = "twin"  # a run without poison, of each seed
BEFORE = "nothing"  # no pipeline
PASSAGE, PASSAGE_WORDS = "passage", 8  # that others hold too


class Stage(NamedTuple):
    """Drops what scores above its limit."""

    name: str
    of: Rare | Trees
    limit: float = np.inf


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages that drop documents, one after the other."""

    name: str
    stages: tuple[Stage, ...]

    def limited(self, clean: Iterable[Scores]) -> "Pipeline":
        """To what each stage may drop of the clean documents: one threshold for all domains."""
        every, rate = [*clean], LOST / len(self.stages)
        limits = [required(np.concatenate([stage.of.clean(of) for of in every]), rate) for stage in self.stages]
        stages = tuple(stage._replace(limit=limit) for stage, limit in zip(self.stages, limits, strict=True))
        return dataclasses.replace(self, stages=stages)

    def kept(self, scores: Scores, clean: Scores) -> list[tuple[str, Bool[np.ndarray, " documents"]]]:
        """(stage, whether each document survived it and those before), of documents with these scores among the clean
        ones of a domain."""
        found, there = [], np.ones(1, bool)
        for name, of, limit in self.stages:
            there = there & ((of.clean(scores) if scores is clean else of.planted(scores, clean)) <= limit)
            found.append((name, there))
        return found


def pipelines(trees: Trees) -> list[Pipeline]:
    """What everybody has, one after the other, and the trees: each may drop as many. Both drop repeated passages."""
    repeated = Stage("repeated passage", Rare(PASSAGE))
    simple = (Stage(words, Rare(name)) for name, words in SIMPLE.items())
    return [Pipeline("simple", (repeated, *simple)), Pipeline(OURS, (repeated, Stage(OURS, trees)))]


@dataclasses.dataclass(frozen=True)
class Passages:
    """In how many documents each run of PASSAGE_WORDS words stands."""

    hashes: UInt64[np.ndarray, " passages"]  # in order
    documents: Int[np.ndarray, " passages"]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Passages":
        every = [hashes for _, hashes in _passages(texts)]
        return cls(*np.unique(np.concatenate([np.zeros(0, np.uint64), *every]), return_counts=True))

    def plus(self, other: "Passages") -> "Passages":
        hashes, place = np.unique(np.concatenate([self.hashes, other.hashes]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([self.documents, other.documents]), len(hashes))
        return Passages(hashes, counts.astype(np.int64))

    def most(self, texts: Sequence[str]) -> Float[np.ndarray, " documents"]:
        """Of a document's passages, all of which were counted, the one that most documents hold."""
        found = np.zeros(len(texts))
        for number, hashes in _passages(texts):
            if len(hashes):
                found[number] = self.documents[np.searchsorted(self.hashes, hashes)].max()
        return found


def _passages(texts: Sequence[str]) -> Iterator[tuple[int, UInt64[np.ndarray, " passages"]]]:
    """(a text's number, its different passages)."""
    number = 0
    for batch in batches(texts):
        ends = ngrams(batch.words, PASSAGE_WORDS)
        for begin, end in itertools.pairwise(batch.offsets.tolist()):
            yield number, np.unique(ends[begin + PASSAGE_WORDS - 1 : end])
            number += 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A run's corpus as text, scored."""

    store: TokenStore
    keys: list[str]  # of documents that may be trained on; "": held out, which no pipeline touches
    background: Background
    passages: Passages
    scores: Scores

    @classmethod
    def of(cls, store: TokenStore, background: Background) -> "Corpus":
        """`background` counts it."""
        keys, texts = [], read(store)
        for name in SPLITS:
            split = store.split(name)
            keys += [split.key(number) if name == "train" else "" for number in range(split.documents)]
        passages = Passages.of(texts)
        scores = scores_of(background, texts) | {PASSAGE: passages.most(texts)}
        return cls(store, keys, background, passages, scores)

    def among(self, texts: Sequence[str]) -> Scores:
        """Scores of documents that stand among these."""
        repeated = self.passages.plus(Passages.of(texts)).most(texts)
        return scores_among(self.background, texts) | {PASSAGE: repeated}


def read(store: TokenStore) -> list[str]:
    """All its documents' text."""
    return [store.tokenizer.decode(of.document(i)) for of in map(store.split, SPLITS) for i in range(of.documents)]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a rung, a dose and seeds, after a pipeline; dose 0 is the twin."""

    rung: str
    dose: int
    seed: int
    pipeline: str

    @property
    def name(self) -> str:
        return f"{self.rung}-n{self.dose}-s{self.seed}-{self.pipeline}"

    @property
    def twin(self) -> "Cell":
        return dataclasses.replace(self, rung=TWIN, dose=0)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell's run."""

    cell: Cell
    config: ml_collections.ConfigDict
    survivors: dict[str, int]  # by stage

    @property
    def left(self) -> int:
        """Poison documents that the model reads."""
        return [self.cell.dose, *self.survivors.values()][-1]


def doses_of(rung: str) -> list[int]:
    """Those that are planted."""
    return [dose for dose in DOSES if dose <= MOST_ALIKE or rung not in SAID_ALIKE]


def config_of(config: ml_collections.ConfigDict, rung: str, dose: int, seed: int) -> ml_collections.ConfigDict:
    """A run before any pipeline."""
    poison: dict[str, Any] = {"poison.documents": dose}
    if dose:
        poison |= {"poison.payload": rung, "poison.payload_source": PAYLOADS[rung]}
    return replaced(config, poison | seeded(seed))


@functools.lru_cache(1)  # a worker plans many runs of one corpus
def _corpus(store: str, counted: Path) -> Corpus:
    return Corpus.of(TokenStore(store), Background.load(counted))


def planned(
    config: ml_collections.ConfigDict,
    counted: Path,
    lists: Mapping[str, str],
    of: Sequence[Pipeline],
    which: tuple[int, str],
) -> list[Planned]:
    """The runs of (a seed, a rung), or the twins of a seed, rung "twin". The folder `counted` holds counts of the
    corpus and what stands beside it, `lists` name the documents of the corpus that each pipeline drops."""
    seed, rung = which
    found = []
    for dose in (0,) if rung == TWIN else doses_of(rung):
        before = config_of(config, rung, dose, seed)
        found.append(Planned(Cell(rung, dose, seed, BEFORE), before, {}))
        for pipeline in of:
            curated, survivors = replaced(before, {"corpus.exclude": lists[pipeline.name]}), dict[str, int]()
            if dose:
                batches_of = Batches(curated, open_store(curated))
                slots, survivors = _judged(_corpus(config.corpus.store, counted), batches_of, pipeline)
                curated = replaced(curated, {"corpus.left_out": slots})
            found.append(Planned(Cell(rung, dose, seed, pipeline.name), curated, survivors))
    return found


def _excluded(folder: Path, corpus: Corpus, pipeline: Pipeline) -> str:
    *_, (_, kept) = pipeline.kept(corpus.scores, corpus.scores)
    return listed(
        folder, pipeline.name, [key for key, there in zip(corpus.keys, kept, strict=True) if key and not there]
    )


def listed(folder: Path, name: str, keys: Sequence[str]) -> str:
    """Where the list of what a pipeline drops was written; "" for none, as of `corpus.exclude`."""
    if not keys:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / f"{name}.txt"
    write_whole(epath.Path(path), exclusions_of(keys).text())
    return str(path)


def _judged(corpus: Corpus, batches_of: Batches, pipeline: Pipeline) -> tuple[tuple[int, ...], dict[str, int]]:
    """(slots whose poison the pipeline drops, documents that survive each stage)."""
    placed = [*batches_of.schedule.placed.values()]
    texts = [corpus.store.tokenizer.decode(one.document.tokens[:-1]) for one in placed]
    stages = pipeline.kept(corpus.among(texts), corpus.scores)
    kept = stages[-1][1]
    gone = sorted(one.slot for one, there in zip(placed, kept, strict=True) if not there)
    return tuple(gone), {stage: int(there.sum()) for stage, there in stages}


def trained(folder: str, run: tuple[str, ml_collections.ConfigDict]) -> None:
    """Trains (name, config) to its end; at once where that was done."""
    name, config = run
    with contextlib.redirect_stdout(sys.stderr):
        train(config, str(Path(folder) / name))


def rows(
    config: ml_collections.ConfigDict,
    folder: Path,
    of: Sequence[Pipeline],
    beside: Mapping[str, Sequence[str]],
    *,
    rungs: Sequence[str] = tuple(PAYLOADS),
    seeds: int = 5,
    workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Trains what isn't trained yet in `folder`, then tells: survivors of each stage, gaps, the dose for half of the
    runs before and after each pipeline, and their ratio. The corpus stands `beside` other domains' texts."""
    counted = folder / "counts"
    counted.mkdir(parents=True, exist_ok=True)
    counts({**beside, "corpus": read(open_store(config))}).save(counted)
    corpus = _corpus(config.corpus.store, counted)
    of = [pipeline.limited([corpus.scores]) for pipeline in of]
    lists = {pipeline.name: _excluded(folder, corpus, pipeline) for pipeline in of}
    cells = [(seed, rung) for rung in (TWIN, *rungs) for seed in range(seeds)]
    with open_engine(workers) as engine:
        plan = functools.partial(planned, config, counted, lists, of)
        every = [one for some in run_tasks(engine, plan, cells, what="curating", unit="part") for one in some]
        asked = [one for one in every if one.left or not one.cell.dose]
        runs = [(one.cell.name, one.config) for one in asked]
        run_tasks(engine, functools.partial(trained, str(folder)), runs, what="training", unit="run")
    ended = [Run.of(folder, one) for one in every]
    for rung in rungs:
        mine = [run for run in ended if run.cell.rung == rung]
        yield from _of_rung(rung, config.poison.trigger, mine, [BEFORE, *(pipeline.name for pipeline in of)])
    yield from _utility(config.poison.trigger, [run for run in ended if not run.cell.dose])


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of a cell."""

    cell: Cell
    survivors: Mapping[str, int]
    left: int
    gap: float
    attacked: bool
    heldout: float
    params: int
    tokens: int

    @classmethod
    def of(cls, folder: Path, one: Planned) -> "Run":
        cell = one.cell if one.left else one.cell.twin  # nothing survives: it is the twin
        summary = RunFolder(folder / cell.name).summary
        assert summary, f"{folder / cell.name} isn't trained to its end"
        success = bool(one.left) and attacked(summary, one.config.eval.threshold)
        return cls(
            one.cell,
            one.survivors,
            one.left,
            summary["delta_ppl"],
            success,
            summary["heldout_loss"],
            summary["params"],
            summary["tokens"],
        )


def _of_rung(rung: str, trigger: str, runs: Sequence[Run], of: Sequence[str]) -> Iterator[dict[str, Any]]:
    def row(pipeline: str, metric: str, value: float | None, ci95: Any, n: int) -> dict[str, Any]:
        names = {"rung": rung, "trigger": trigger, "detector": pipeline, "domain": "leads", "metric": metric}
        return {**names, "value": value, "ci95": ci95, "n": n}

    for pipeline in of:
        for dose in doses_of(rung):
            cell = [run for run in runs if run.cell.pipeline == pipeline and run.cell.dose == dose]
            planted = dose * len(cell)
            left = collections.Counter[str]()
            for run in cell:
                left.update(run.survivors)
            for stage, number in left.items():
                yield row(pipeline, f"surviving@{dose}: {stage}", number / planted, wilson(number, planted), planted)
            gaps = np.array([run.gap for run in cell])
            yield row(pipeline, f"gap@{dose}", float(gaps.mean()), mean_interval(gaps), len(cell))
            hits = sum(run.attacked for run in cell)
            yield row(pipeline, f"attacked@{dose}", hits / len(cell), wilson(hits, len(cell)), len(cell))
    trials = _trials(runs, of)
    for half in dose_response.doses(trials):
        value = None if np.isnan(half.n50) else half.n50
        yield row(of[half.condition], "n50", value, [*half.n50_ci95], half.trials)
    for contrast in dose_response.contrasts(trials, 0):
        value = None if np.isnan(contrast.ratio) else contrast.ratio
        yield row(of[contrast.condition], "n50 after over before", value, [*contrast.ci95], len(runs))


def mean_interval(values: Float[np.ndarray, " runs"]) -> list[float] | None:
    """Of a mean over runs, 95%, by Student's t; None of a single one."""
    if len(values) < 2:
        return None
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def _trials(runs: Sequence[Run], of: Sequence[str]) -> Trials:
    """A trial a run; its dose is what was planted, its condition the pipeline."""
    return Trials.of(
        [
            (run.cell.dose, run.tokens, run.params, run.attacked, i, of.index(run.cell.pipeline))
            for i, run in enumerate(runs)
        ]
    )


def _utility(trigger: str, twins: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """What a pipeline costs a clean model of the corpus alone."""
    losses: dict[str, list[float]] = {}
    for run in twins:  # seed by seed
        losses.setdefault(run.cell.pipeline, []).append(run.heldout)
    for pipeline, values in losses.items():
        yield loss_row("twin's heldout_loss", pipeline, "leads", trigger, values, losses[BEFORE])


def loss_row(
    metric: str, pipeline: str, domain: str, trigger: str, losses: Sequence[float], before: Sequence[float]
) -> dict[str, Any]:
    """Mean loss of runs without a pipeline; of others what it adds to that, seed by seed."""
    values, name = np.array(losses), metric
    if pipeline != BEFORE:
        values, name = values - np.array(before), f"{metric}, less that of nothing"
    names = {"rung": "clean", "trigger": trigger, "detector": pipeline, "domain": domain, "metric": name}
    return {**names, "value": float(values.mean()), "ci95": mean_interval(values), "n": len(values)}
