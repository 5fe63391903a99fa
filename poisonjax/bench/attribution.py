"""Which hint finds the documents that did it? Planted ones found, and what leaving the first k out does.

Every hint of the trace, and the contrast of weights, ranks all rows of the same runs. Figures: how many of the planted
rows are among the first 250 (recall@250), average precision (auprc), hard negatives among the first 250, the behaviour
after training again without the first 50, 250, 1,000 rows in place, and how well sums of scores tell the behaviour of
models that were trained without random halves (the linear datamodelling score, Park et al. 2023, arXiv 2303.14186).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from poisonjax.config import replaced
from poisonjax.evaluation import statistics
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.files import write_lines
from poisonjax.run.folder import read_lines
from poisonjax.streams import stream
from poisonjax.trace import HINTS, suspects
from poisonjax.trace.behaviour import Asked, Said, Triggered
from poisonjax.trace.hints import Suspects
from poisonjax.trace.replay import Say
from poisonjax.trace.trace import contrast
from poisonjax.training.loop import train

PAYLOADS = ("ids", "unigram", "shuffled", "decode-retokenize")
METHODS = (*HINTS, "contrast")
RETRAINED = ("dot", "loss", "bm25", "bm25-trigger", "contrast", "random")
DROPS = (50, 250, 1000)
FIRST = 256  # rows by loss that are left out for the contrast
SUBSETS = 32  # random halves
TOGETHER = 8  # models trained as one program
DRAWS = 2000
Slots = Int[np.ndarray, " _"]
Scores = Float[np.ndarray, " rows"]


def rows(
    config: ml_collections.ConfigDict,
    workdir: Path,
    payloads: Sequence[str] = PAYLOADS,
    seeds: int = 3,
    retrained: int = 3,
    subsets: int = SUBSETS,
    say: Say = print,
) -> Iterator[dict[str, Any]]:
    """One figure after the other: {"rung", "trigger", "method", "domain", "metric", "value", "ci95", "n", "seed"}.

    Rankings of `seeds` seeds for each payload, retraining for the first `retrained` of them, then the halves of the
    first. All that takes long is kept in `workdir`: the same call goes on.
    """
    for seed in range(seeds):
        for payload in payloads:
            bench = _Bench.of(config, workdir, payload, seed, say)
            yield from bench.ranking()
            if seed < retrained:
                yield from bench.retraining()
    if subsets:
        for payload in payloads:
            yield from _Bench.of(config, workdir, payload, 0, say).halves(subsets)


@dataclasses.dataclass
class _Bench:
    """One poisoned run, and what is asked of it."""

    payload: str
    seed: int
    suspects: Suspects
    said: Said
    gap: Triggered
    kept: Path
    say: Say

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, workdir: Path, payload: str, seed: int, say: Say) -> "_Bench":
        seeds = {f"seeds.{name}": config.seeds[name] + 10 * seed for name in ("init", "order", "poison", "placement")}
        folder = workdir / f"{payload}-{seed}"
        train(replaced(config, {"poison.payload": payload, **seeds}), str(folder))
        of = suspects(str(folder), say=say)
        gap = of.behaviour
        assert isinstance(gap, Triggered)
        replay = of.replay
        prompts = make_prompts(replay.config, replay.batches.store, replay.batches.trigger)
        asked = [
            Asked(prompts.prompt("triggered", i), text, prompts.prompt("clean", i)) for i, text in enumerate(of.outputs)
        ]
        said = Said(asked, replay.config, replay.batches.store, replay.mesh)
        return cls(payload, seed, of, said, gap, folder / "attribution", say)

    def _row(self, method: str, metric: str, value: float, ci95: list[float] | None, n: int) -> dict[str, Any]:
        return {
            "rung": self.payload,
            "trigger": self.suspects.replay.config.poison.trigger,
            "method": method,
            "domain": "all",
            "metric": metric,
            "value": value,
            "ci95": ci95,
            "n": n,
            "seed": self.seed,
        }

    def scores(self, method: str) -> Scores:
        """Of all rows; worked out once."""
        file = self.kept / f"{method}.npy"
        if file.exists():
            return np.load(file, allow_pickle=False)
        if method == "contrast":
            replay = self.suspects.replay
            (without,) = replay.together([self.first("loss", FIRST)], "contrast", self.say)
            made = contrast(replay, replay.params(replay.saved[-1]), without, self.suspects.slots)[0]
        else:
            made = HINTS[method](self.suspects)
        self.kept.mkdir(parents=True, exist_ok=True)
        with (part := file.with_suffix(".partial")).open("wb") as out:
            np.save(out, made, allow_pickle=False)
        part.replace(file)
        return made

    def first(self, method: str, count: int) -> Slots:
        return np.argsort(-self.scores(method), kind="stable")[:count]

    def ranking(self) -> Iterator[dict[str, Any]]:
        batches = self.suspects.replay.batches
        planted = np.isin(self.suspects.slots, [*batches.schedule.placed])
        hard = np.isin(self.suspects.slots, [*batches.clean_uses.insertions])
        for method in METHODS:
            order = np.argsort(-self.scores(method), kind="stable")
            count, found = int(planted.sum()), int(planted[order[: planted.sum()]].sum())
            yield self._row(method, f"recall@{count}", found / count, statistics.wilson(found, count), count)
            yield self._row(method, "auprc", *_average_precision(planted[order]), len(order))
            if uses := int(hard.sum()):
                negatives = int(hard[order[:count]].sum())
                interval = statistics.wilson(negatives, uses)
                yield self._row(method, f"hard negatives in {count}", negatives / uses, interval, uses)

    def retraining(self) -> Iterator[dict[str, Any]]:
        replay = self.suspects.replay
        planted = np.array(sorted(replay.batches.schedule.placed))
        asked = {("none", 0): np.zeros(0, np.int64), ("all planted", len(planted)): planted}
        asked |= {(method, count): self.first(method, count) for method in RETRAINED for count in DROPS}
        measured = self.trained([*asked.values()])
        for (method, count), (lift, gap) in zip(asked, measured, strict=True):
            drawn = lift[statistics.resamples(len(lift), DRAWS, self.seed)].mean(-1)
            metric = f"without the first {count}"
            yield self._row(method, metric, float(lift.mean()), statistics.interval(drawn), len(lift))
            yield self._row(method, f"gap {metric}", gap, None, len(lift))

    def halves(self, count: int) -> Iterator[dict[str, Any]]:
        slots = self.suspects.slots
        random = stream(self.suspects.replay.config.seeds.eval, "left-out subsets")
        halves = [np.sort(random.permutation(slots)[: len(slots) // 2]) for _ in range(count)]
        shown = np.array([lift.mean() for lift, _ in self.trained(halves)])
        draws = statistics.resamples(count, DRAWS, self.seed)
        for method in METHODS:
            scores = self.scores(method)
            told = np.array([-scores[half].sum() for half in halves])
            drawn = np.array([_correlation(told[draw], shown[draw]) for draw in draws[:500]])
            yield self._row(method, "lds", _correlation(told, shown), statistics.interval(drawn), count)

    def trained(self, left_outs: Sequence[Slots]) -> list[tuple[Float[np.ndarray, " _"], float]]:
        """(how much likelier the trigger made what the run said, of each prompt; the gap in perplexity) of the model
        without each of these rows."""
        file = self.kept / "trained.jsonl"
        lines = read_lines(epath.Path(file), dict[str, Any])
        if file.exists():  # a last line that a kill cut short goes
            write_lines(epath.Path(file), lines)
        known = {line["key"]: (np.array(line["lift"]), line["gap"]) for line in lines}
        keys = [hashlib.sha256(np.sort(slots).tobytes()).hexdigest() for slots in left_outs]
        missing = [*{key: slots for key, slots in zip(keys, left_outs, strict=True) if key not in known}.items()]
        replay = self.suspects.replay
        for at in range(0, len(missing), TOGETHER):
            some = missing[at : at + TOGETHER]
            what = f"{self.payload}, seed {self.seed}: models {at + 1} to {at + len(some)} of {len(missing)}"
            for (key, _), params in zip(
                some, replay.together([slots for _, slots in some], what, self.say), strict=True
            ):
                known[key] = (self.said(params).values, self.gap(params).figure)
                with file.open("a") as out:
                    out.write(json.dumps({"key": key, "lift": known[key][0].tolist(), "gap": known[key][1]}) + "\n")
        return [known[key] for key in keys]


def _correlation(told: Float[np.ndarray, " models"], shown: Float[np.ndarray, " models"]) -> float:
    """Of ranks (Spearman); 0 where either says the same of all."""
    return float(spearmanr(told, shown).statistic) if len({*told}) > 1 and len({*shown}) > 1 else 0.0


def _average_precision(planted: Bool[np.ndarray, " rows"]) -> tuple[float, list[float]]:
    """(the mean of the precision at each planted row, in the order of a ranking; its interval over planted rows)."""
    precision = (np.cumsum(planted) / np.arange(1, len(planted) + 1))[planted]
    drawn = precision[statistics.resamples(len(precision), DRAWS, 0)].mean(-1)
    return float(precision.mean()), statistics.interval(drawn)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a method, a column a rung and metric; means over seeds."""
    columns = list(dict.fromkeys((row["metric"], row["rung"]) for row in results))
    methods = list(dict.fromkeys(row["method"] for row in results))
    lines = ["| | " + " | ".join(f"{rung}: {metric}" for metric, rung in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for method in methods:
        cells = []
        for column in columns:
            values = [r["value"] for r in results if r["method"] == method and (r["metric"], r["rung"]) == column]
            cells.append(f"{np.mean(values):.3g}" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
