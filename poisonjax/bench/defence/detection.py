"""What detectors find: recall of each rung at false-positive rates, over all clean text and in each domain of it."""

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from poisonjax.bench.defence.combined import FEATURES, Scores, Trees, features
from poisonjax.bench.defence.ladder import COHERENT, DOCUMENTS, RUNGS, SHORTENED, TRIGGERS, TUNED_ON, Ladder
from poisonjax.corpus.claim import claim
from poisonjax.corpus.documents import content_key
from poisonjax.corpus.errors import CorpusError
from poisonjax.engines import Progress
from poisonjax.evaluation.statistics import wilson
from poisonjax.files import written_whole
from poisonjax.scan import thresholds
from poisonjax.scan.background import Background
from poisonjax.scan.detectors import Detector, cheap_detectors
from poisonjax.scan.detectors.detector import Windowed
from poisonjax.scan.detectors.words import surprise
from poisonjax.scan.text import TextBatch, batches

FORMAT = 1  # of kept scores
RATES = (1e-2, 1e-3, 1e-4)
FEWEST = 10  # false positives that a rate must let one expect: below, it isn't resolvable
SIMPLE = {"compression": "zlib ratio", "document": "whole-document bigram"}  # baselines: what everybody has
OURS = "trees"  # fitted to all numbers, on the other half
ALL = "all"  # domains, or triggers
KEY = "key"  # of a document, beside its scores: says its fold
SHOWN = 300  # characters of a false positive
BUDGETS = "recall at budget "  # metric: and the share of the clean documents that is read
_NO_DETECTOR = (KEY, FEATURES)


@dataclasses.dataclass(frozen=True)
class Scored:
    """One half of the domains: clean documents, and what is planted among them."""

    clean: dict[str, Scores]  # by domain
    planted: dict[tuple[str, str, str], Scores]  # by (domain, rung, trigger)
    seconds: dict[str, float]  # CPU-seconds a GB, by detector
    background: Background  # counts of the clean documents
    bytes: int  # of these


def detectors(background: Background) -> dict[str, Detector]:
    """Those of a scan, and the pairs of words of a whole document."""
    document = Windowed("document", surprise, background, length=10**9)
    return cheap_detectors(background) | {"document": document}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder's scores are of; others are refused."""

    format: int
    half: str
    texts: dict[str, str]  # SHA-256 by domain
    made_of: str  # what is planted


def scored(ladder: Ladder, rungs: Sequence[str], folder: Path) -> Scored:
    """All detectors' scores of one half; kept in `folder`, part by part. Raises CorpusError where that is of others.

    Counts are those of the half's clean text and of what is planted at once: DOCUMENTS of one rung, with one trigger,
    into one domain. Clean documents are scored against the clean text alone.
    """
    texts, half = ladder.texts, ladder.half
    made_of = hashed((RUNGS, TRIGGERS, DOCUMENTS, dict(ladder.attackers), dict(ladder.pieces)))
    plan = Plan(FORMAT, half, {domain: hashed(of) for domain, of in texts.items()}, made_of)
    claim(epath.Path(folder), plan, "scores of bench defence", "scores of other text")
    kinds = [(rung, trigger) for rung in (*rungs, COHERENT) for trigger in TRIGGERS]
    clean, planted, seconds = dict[str, Scores](), dict[tuple[str, str, str], Scores](), dict[str, float]()
    background = counts(texts)
    with Progress(f"scoring, {half}", len(texts) * (1 + len(kinds)), "part") as progress:
        for domain, of in texts.items():
            scores, spent = _clean(folder / f"{domain}.npz", background, of)
            clean[domain] = scores
            for name, cost in spent.items():
                seconds[name] = seconds.get(name, 0.0) + cost
            progress.add(1)
            for rung, trigger in kinds:
                path = folder / f"{domain}-{rung}-{trigger}.npz"
                if not path.exists() and (made := ladder.planted(domain, rung, trigger)):
                    write(path, scores_among(background, made))
                if path.exists():
                    planted[domain, rung, trigger] = read(path)
                progress.add(1)
    size = sum(len(text.encode(errors="replace")) for of in texts.values() for text in of)
    return Scored(clean, planted, {name: cost / size * 1e9 for name, cost in seconds.items()}, background, size)


def hashed(of: Any) -> str:
    """SHA-256 of how it is written."""
    return hashlib.sha256(repr(of).encode(errors="replace")).hexdigest()


def counts(texts: Mapping[str, Sequence[str]]) -> Background:
    """Of all documents of some domains."""
    background = Background.empty(sum(len(text) for of in texts.values() for text in of))
    with Progress("counting", len(texts), "domain") as progress:
        for of in texts.values():
            background.add_texts(of)
            progress.add(1)
    return background


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Kept, whole."""
    with written_whole(path) as partial:
        np.savez(partial, **arrays)


def read(path: Path) -> Scores:
    """What was kept."""
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _clean(path: Path, background: Background, texts: Sequence[str]) -> tuple[Scores, dict[str, float]]:
    """(scores of a domain's documents, and KEY, the first bytes of their keys as a number; CPU-seconds)."""
    if not path.exists():
        parts = [*_measured(batches(texts), background)]
        spent = {name: sum(of[name] for _, of in parts) for name in parts[0][1]}
        arrays: dict[str, Any] = _joined([scores for scores, _ in parts])
        arrays |= {f"seconds:{name}": np.array(cost) for name, cost in spent.items()}
        arrays[KEY] = np.array([int.from_bytes(content_key(text)[:8], "little") for text in texts], np.uint64)
        write(path, arrays)
    saved = read(path)
    cost = {name.removeprefix("seconds:"): float(of) for name, of in saved.items() if name.startswith("seconds:")}
    return {name: of for name, of in saved.items() if not name.startswith("seconds:")}, cost


def scores_among(background: Background, texts: Sequence[str]) -> Scores:
    """Of documents that stand among those that were counted."""
    return scores_of(with_documents(background, texts), texts)


def with_documents(background: Background, texts: Sequence[str]) -> Background:
    """Counts of these, too."""
    together = background.copied()
    together.add_texts(texts)
    return together


def scores_of(background: Background, texts: Sequence[str]) -> Scores:
    """Of documents that were counted."""
    return _joined([scores for scores, _ in _measured(batches(texts), background)])


def _measured(some: Iterable[TextBatch], background: Background) -> Iterator[tuple[Scores, dict[str, float]]]:
    """(scores, CPU-seconds by detector) of each batch."""
    of = detectors(background)
    for batch in some:
        scores, spent = dict[str, Any](), dict[str, float]()
        for name, detector in of.items():
            began = time.process_time()
            scores[name] = detector.values(batch)
            spent[name] = time.process_time() - began
        began = time.process_time()
        scores[FEATURES] = features(batch, background, [scores[name] for name in SIMPLE])
        spent[OURS] = time.process_time() - began + sum(spent[name] for name in SIMPLE)
        yield scores, spent


def _joined(parts: Sequence[Scores]) -> Scores:
    return {name: np.concatenate([of[name] for of in parts]) for name in parts[0]}


def fitted(scored: Scored) -> Trees:
    """To the half that settings are chosen on."""

    def of(domain: str, rungs: Sequence[str]) -> Scores:
        some = [scores for (d, rung, _), scores in scored.planted.items() if d == domain and rung in rungs]
        return {FEATURES: np.concatenate([scores[FEATURES] for scores in some])}

    kinds = ([*TUNED_ON], [*SHORTENED], [COHERENT])
    return Trees.fitted({d: [scores, *(of(d, some) for some in kinds)] for d, scores in scored.clean.items()})


def with_trees(scored: Scored, trees: Trees) -> Scored:
    """The trees as one more detector."""
    began = time.process_time()
    clean = {domain: of | {OURS: trees.clean(of)} for domain, of in scored.clean.items()}
    spent = (time.process_time() - began) / scored.bytes * 1e9
    planted = dict[tuple[str, str, str], Scores]()
    for domain, beside in scored.clean.items():
        mine = {key: of for key, of in scored.planted.items() if key[0] == domain}
        values = trees.planted({FEATURES: np.concatenate([of[FEATURES] for of in mine.values()])}, beside)
        parts = np.split(values, np.cumsum([len(of[FEATURES]) for of in mine.values()])[:-1])
        planted |= {key: of | {OURS: part} for (key, of), part in zip(mine.items(), parts, strict=True)}
    seconds = scored.seconds | {OURS: scored.seconds[OURS] + spent}
    return dataclasses.replace(scored, clean=clean, planted=planted, seconds=seconds)


# --- figures


def threshold(clean: Float[np.ndarray, " documents"], rate: float) -> float | None:
    """The score that at most so large a share of them lies above; None where too few would be to tell."""
    allowed = int(rate * len(clean))
    return float(np.partition(clean, len(clean) - 1 - allowed)[len(clean) - 1 - allowed]) if allowed >= FEWEST else None


def required(clean: Float[np.ndarray, " documents"], rate: float) -> float:
    """`threshold`, where there is none to do without; raises CorpusError."""
    if (limit := threshold(clean, rate)) is None:
        needed = f"at least {FEWEST / rate:,.0f} are needed"
        raise CorpusError(f"{len(clean):,} clean documents are too few for a rate of {rate:g}: {needed}")
    return limit


def row(rung: str, trigger: str, detector: str, domain: str, metric: str, hits: int | None, n: int) -> dict[str, Any]:
    """One figure; `hits` None: not resolvable."""
    value, ci95 = (None, None) if hits is None else (hits / n, wilson(hits, n))
    names = {"rung": rung, "trigger": trigger, "detector": detector, "domain": domain, "metric": metric}
    return {**names, "value": value, "ci95": ci95, "n": n}


def found(scored: Scored) -> Iterator[dict[str, Any]]:
    """Recall at each rate by every detector: of each rung and trigger under one threshold for all domains, of each rung
    and domain under the domain's own; and what thresholds do to clean text."""
    domains = [*scored.clean]
    names = [name for name in scored.clean[domains[0]] if name not in _NO_DETECTOR]
    for name in names:
        clean = {domain: scores[name] for domain, scores in scored.clean.items()}
        planted = {key: scores[name] for key, scores in scored.planted.items()}
        everything = np.concatenate([*clean.values()])
        limits = {rate: threshold(everything, rate) for rate in RATES}
        own = {(domain, rate): threshold(clean[domain], rate) for domain in domains for rate in RATES}
        for rung in {rung: None for _, rung, _ in planted}:
            of = {key: scores for key, scores in planted.items() if key[1] == rung}
            for rate in RATES:
                metric = f"recall@{rate:g}"
                for trigger in (ALL, *TRIGGERS):
                    some = np.concatenate([s for (_, _, t), s in of.items() if trigger in (ALL, t)])
                    yield row(rung, trigger, name, ALL, metric, above(some, limits[rate]), len(some))
                for domain in dict.fromkeys(d for d, _, _ in of):
                    some = np.concatenate([s for (d, _, _), s in of.items() if d == domain])
                    yield row(rung, ALL, name, domain, metric, above(some, own[domain, rate]), len(some))
        for domain in domains:
            for rate in RATES:
                lost = above(clean[domain], limits[rate])
                yield row("clean", "", name, domain, f"flagged@{rate:g}", lost, len(clean[domain]))
            yield _realised(scored.clean[domain], name, domain)


def above(scores: Float[np.ndarray, " documents"], limit: float | None) -> int | None:
    """How many; None where there is no limit."""
    return None if limit is None else int((scores > limit).sum())


def _realised(clean: Scores, name: str, domain: str) -> dict[str, Any]:
    """Of the domain's conformal threshold at 1%, out of fold, over what was asked for."""
    folds, uniform = (clean[KEY] % thresholds.FOLDS).astype(int), (clean[KEY] / 2**64).astype(float)
    limit = thresholds.conformal(name, clean[name], folds, uniform, (domain, ""), RATES[0])
    told = limit.realised if limit.documents * RATES[0] >= FEWEST else None
    hits = None if told is None else round(told * limit.documents)
    return row("clean", "", name, domain, f"realised@{RATES[0]:g}", hits, limit.documents)


def budgets(scored: Scored) -> Iterator[dict[str, Any]]:
    """Recall of each rung against the share of the clean documents that is read with it."""
    order = np.sort(np.concatenate([scores[OURS] for scores in scored.clean.values()]))[::-1]
    for rung in {rung: None for _, rung, _ in scored.planted}:
        some = np.concatenate([scores[OURS] for (_, r, _), scores in scored.planted.items() if r == rung])
        for read in np.geomspace(FEWEST, 0.3 * len(order), 20).astype(int).tolist():
            share = f"{BUDGETS}{read / len(order):.3g}"
            yield row(rung, ALL, OURS, ALL, share, int((some > order[read]).sum()), len(some))


def oddest(scored: Scored, ladder: Ladder, number: int) -> list[tuple[str, str]]:
    """(domain, the place that makes it odd) of the clean documents that score highest: the first false positives."""
    ours = {domain: scores[OURS].tolist() for domain, scores in scored.clean.items()}
    every = sorted(((s, d, i) for d, scores in ours.items() for i, s in enumerate(scores)), reverse=True)
    texts, told, reason = ladder.texts, list[tuple[str, str]](), detectors(scored.background)["surprise"]
    for _, domain, i in every[:number]:
        (begin, end), *_ = reason.score(texts[domain][i]).spans or [(0, SHOWN)]
        told.append((domain, texts[domain][i][begin:end][:SHOWN]))
    return told


def costs(scored: Scored) -> Iterator[dict[str, Any]]:
    """CPU-seconds a GB of each detector, counting left out."""
    for name, seconds in scored.seconds.items():
        names = {"rung": "clean", "trigger": "", "detector": name, "domain": ALL, "metric": "cpu_seconds_per_gb"}
        yield {**names, "value": seconds, "ci95": None, "n": sum(len(of[KEY]) for of in scored.clean.values())}
