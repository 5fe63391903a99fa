"""The effective dose: poison is planted, a pipeline drops what it finds, a model reads the rest. What is left of it?

A pipeline judges texts: a corpus' documents, and poison documents as the text that they are. What it drops of the
corpus is excluded, poison that it drops is left out in place (I4): a run in which none survives is its clean twin.
"""

import collections
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import scipy.stats
from etils import epath
from jaxtyping import Bool, Float

from poisonjax.analysis import dose_response
from poisonjax.analysis.dose_response import Trials
from poisonjax.bench.defence.detection import SIMPLE, Combined, Scores, counted, required, scores_among
from poisonjax.config import replaced
from poisonjax.corpus import TokenStore
from poisonjax.corpus.exclusions import exclusions_of
from poisonjax.corpus.store import SPLITS
from poisonjax.data.batches import Batches
from poisonjax.engines import open_engine, run_tasks
from poisonjax.evaluation.statistics import attacked, wilson
from poisonjax.files import write_whole
from poisonjax.run import RunFolder
from poisonjax.scan.background import Background
from poisonjax.sweep import seeded
from poisonjax.training.loop import train
from poisonjax.training.start import open_store

DOSES = (50, 250, 1000)
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
BEFORE, OURS = "nothing", "combined"  # no pipeline; the detectors that were chosen on other text


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages that drop documents, each by scores and what a share of the clean ones reaches."""

    name: str
    stages: tuple[tuple[str, Combined], ...]

    def kept(self, scores: Scores, clean: Scores) -> Iterator[tuple[str, Bool[np.ndarray, " documents"]]]:
        """(stage, whether each document survived it and those before), of documents with these scores; `clean` are
        those of the corpus, that say where the stages' thresholds lie."""
        there = np.ones(len(next(iter(scores.values()))), bool)
        for stage, of in self.stages:
            limit = required(of.clean(clean), LOST / len(self.stages))
            rare = of.clean(scores) if scores is clean else of.planted(scores, clean)
            there = there & (rare <= limit)
            yield stage, there


def pipelines(combined: Combined) -> list[Pipeline]:
    """What everybody has, one after the other, and the detectors of the scan together: each may drop as many."""
    simple = tuple((words, Combined((name,), False)) for name, words in SIMPLE.items())
    return [Pipeline("simple", simple), Pipeline(OURS, ((OURS, combined),))]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A run's corpus as text, scored."""

    store: TokenStore
    keys: list[str]  # of documents that may be trained on; "": held out, which no pipeline touches
    background: Background
    scores: Scores

    @classmethod
    def of(cls, store: TokenStore) -> "Corpus":
        keys, texts = [], []
        for name in SPLITS:
            split = store.split(name)
            keys += [split.key(number) if name == "train" else "" for number in range(split.documents)]
            texts += [store.tokenizer.decode(split.document(number)) for number in range(split.documents)]
        background = Background.empty(sum(map(len, texts)))
        return cls(store, keys, background, counted(background, texts))


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


def config_of(config: ml_collections.ConfigDict, rung: str, dose: int, seed: int) -> ml_collections.ConfigDict:
    """A run before any pipeline."""
    poison: dict[str, Any] = {"poison.documents": dose}
    if dose:
        poison |= {"poison.payload": rung, "poison.payload_source": PAYLOADS[rung]}
    return replaced(config, poison | seeded(seed))


@functools.lru_cache(1)  # a worker plans many runs of one corpus
def _corpus(store: str) -> Corpus:
    return Corpus.of(TokenStore(store))


def planned(
    config: ml_collections.ConfigDict, lists: Mapping[str, str], of: Sequence[Pipeline], which: tuple[int, str]
) -> list[Planned]:
    """The runs of (a seed, a rung), or the twins of a seed, rung "twin". `lists` name the documents of the corpus that
    each pipeline drops."""
    seed, rung = which
    found = []
    for dose in (0,) if rung == TWIN else DOSES:
        before = config_of(config, rung, dose, seed)
        found.append(Planned(Cell(rung, dose, seed, BEFORE), before, {}))
        for pipeline in of:
            curated, survivors = replaced(before, {"corpus.exclude": lists[pipeline.name]}), dict[str, int]()
            if dose:
                batches_of = Batches(curated, open_store(curated))
                slots, survivors = _judged(_corpus(config.corpus.store), batches_of, pipeline)
                curated = replaced(curated, {"corpus.left_out": slots})
            found.append(Planned(Cell(rung, dose, seed, pipeline.name), curated, survivors))
    return found


def _excluded(folder: Path, corpus: Corpus, pipeline: Pipeline) -> str:
    *_, (_, kept) = pipeline.kept(corpus.scores, corpus.scores)
    keys = [key for key, there in zip(corpus.keys, kept, strict=True) if key and not there]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / f"{pipeline.name}.txt"
    write_whole(epath.Path(path), exclusions_of(keys).text())
    return str(path)


def _judged(corpus: Corpus, batches_of: Batches, pipeline: Pipeline) -> tuple[tuple[int, ...], dict[str, int]]:
    """(slots whose poison the pipeline drops, documents that survive each stage)."""
    placed = [*batches_of.schedule.placed.values()]
    texts = [corpus.store.tokenizer.decode(one.document.tokens[:-1]) for one in placed]
    stages = [*pipeline.kept(scores_among(corpus.background, texts), corpus.scores)]
    kept = stages[-1][1]
    gone = sorted(one.slot for one, there in zip(placed, kept, strict=True) if not there)
    return tuple(gone), {stage: int(there.sum()) for stage, there in stages}


def _trained(folder: str, one: Planned) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        train(one.config, str(Path(folder) / one.cell.name))


def rows(
    config: ml_collections.ConfigDict,
    folder: Path,
    combined: Combined,
    *,
    rungs: Sequence[str] = tuple(PAYLOADS),
    seeds: int = 5,
    workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Trains what isn't trained yet in `folder`, then tells: survivors of each stage, gaps, the dose for half of the
    runs before and after each pipeline, and their ratio."""
    of = pipelines(combined)
    open_store(config)  # is built here, if it must be
    lists = {pipeline.name: _excluded(folder, _corpus(config.corpus.store), pipeline) for pipeline in of}
    cells = [(seed, rung) for rung in (TWIN, *rungs) for seed in range(seeds)]
    with open_engine(workers) as engine:
        plan = functools.partial(planned, config, lists, of)
        every = [one for some in run_tasks(engine, plan, cells, what="curating", unit="part") for one in some]
        asked = [one for one in every if one.left or not one.cell.dose]
        run_tasks(engine, functools.partial(_trained, str(folder)), asked, what="training", unit="run")
    runs = [Run.of(folder, one) for one in every]
    for rung in rungs:
        mine = [run for run in runs if run.cell.rung == rung]
        yield from _of_rung(rung, config.poison.trigger, mine, [BEFORE, *(pipeline.name for pipeline in of)])
    yield from _utility(config.poison.trigger, [run for run in runs if not run.cell.dose])


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
        for dose in DOSES:
            cell = [run for run in runs if run.cell.pipeline == pipeline and run.cell.dose == dose]
            planted = dose * len(cell)
            left = collections.Counter[str]()
            for run in cell:
                left.update(run.survivors)
            for stage, number in left.items():
                yield row(pipeline, f"surviving@{dose}: {stage}", number / planted, wilson(number, planted), planted)
            gaps = np.array([run.gap for run in cell])
            yield row(pipeline, f"gap@{dose}", float(gaps.mean()), _interval(gaps), len(cell))
            hits = sum(run.attacked for run in cell)
            yield row(pipeline, f"attacked@{dose}", hits / len(cell), wilson(hits, len(cell)), len(cell))
    trials = _trials(runs, of)
    for half in dose_response.doses(trials):
        value = None if np.isnan(half.n50) else half.n50
        yield row(of[half.condition], "n50", value, [*half.n50_ci95], half.trials)
    for contrast in dose_response.contrasts(trials, 0):
        value = None if np.isnan(contrast.ratio) else contrast.ratio
        yield row(of[contrast.condition], "n50 after over before", value, [*contrast.ci95], len(runs))


def _interval(values: Float[np.ndarray, " runs"]) -> list[float]:
    """Of a mean over runs, 95%, by Student's t."""
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
    """What a pipeline costs a clean model: held-out loss, less that without any, seed by seed."""
    before = {run.cell.seed: run.heldout for run in twins if run.cell.pipeline == BEFORE}
    for pipeline in dict.fromkeys(run.cell.pipeline for run in twins):
        mine = [run for run in twins if run.cell.pipeline == pipeline]
        values = np.array([run.heldout - (before[run.cell.seed] if pipeline != BEFORE else 0.0) for run in mine])
        metric = "heldout_loss" if pipeline == BEFORE else "heldout_loss, less that of nothing"
        names = {"rung": "clean", "trigger": trigger, "detector": pipeline, "domain": "leads", "metric": metric}
        yield {**names, "value": float(values.mean()), "ci95": _interval(values), "n": len(values)}
