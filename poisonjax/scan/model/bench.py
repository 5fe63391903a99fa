"""What a scan finds in models whose truth is known: `configs/sweeps/zoo.py`, trained.

    python -m poisonjax.scan.model.bench ZOO --out DIR [--workers 2] [--calibrate FILE]

Each run of the sweep in ZOO is scanned into DIR; those of the half `report` once more by each source of candidates
alone, and their clean ones are asked for random strings too. A killed bench goes on. `--calibrate` fits P(poisoned) on
the half `settings` and writes it; what is told is of the half `report`. One object of JSON with `--json`, else tables.
"""

import argparse
import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from poisonjax.engines import Progress, open_engine, run_tasks
from poisonjax.evaluation.statistics import interval, resamples, wilson
from poisonjax.files import parse_json, write_json
from poisonjax.run import RunFolder
from poisonjax.run.folder import is_run
from poisonjax.scan.model.changes import Null
from poisonjax.scan.model.parts import Scan, Sizes
from poisonjax.scan.model.proposals import SOURCES, Proposed, propose
from poisonjax.scan.model.scan import PASSES, cost, scan_model
from poisonjax.scan.model.trial import Candidate, overlap, tested
from poisonjax.scan.model.verdict import Calibration
from poisonjax.scan.model.writing import LONGEST, String
from poisonjax.weights import open_weights
from poisonjax.weights.weights import all_devices_mesh

DRAWS = 2000
RANDOM = 50  # strings of each clean model whose p-values are to be uniform
ROW = "bench.json"  # in each model's folder


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a scan says, as one who knows the trigger sees it."""

    strongest: float  # the first candidate's value
    rank: int | None  # of the trigger among all candidates
    overlaps: bool  # whether the first candidate shares at least half of its tokens, or of the trigger's

    @classmethod
    def of(cls, candidates: Sequence[Candidate], trigger: String) -> "Seen":
        told = [one for one in candidates if not one.under_trained]
        rank = next((rank for rank, one in enumerate(candidates, 1) if one.tokens == trigger), None)
        first = bool(told) and overlap(told[0].tokens, trigger)
        return cls(max((one.value for one in told), default=0.0), rank, first)


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A model of the zoo."""

    name: str
    half: str
    payload: str  # "" of a clean twin
    trigger: str
    tokens: int  # of the trigger
    documents: int
    share: float  # of the tokens trained on that are poison's
    parameters: int
    backdoored: bool  # by the run's own rule
    all: Seen
    alone: dict[str, Seen]  # by the candidates of one source; of the half `report`
    leaked: int  # of the texts that it writes by itself, those that hold the trigger
    written: int  # such texts
    random_p: list[float]  # p-values of random strings; of the clean models of the half `report`

    @classmethod
    def of_json(cls, saved: dict[str, Any]) -> "Scanned":
        alone = {name: Seen(**of) for name, of in saved["alone"].items()}
        return cls(**saved | {"all": Seen(**saved["all"]), "alone": alone})


def scanned(out: str, passes: int, model: tuple[str, str]) -> Scanned:
    """One run of (the half that it belongs to, its folder), scanned; told again where it was."""
    half, folder = model
    into = Path(out) / Path(folder).name
    if (into / ROW).exists():
        return Scanned.of_json(parse_json((into / ROW).read_bytes()))
    run = RunFolder(folder)
    config, summary, tokenizer = run.config, run.summary, run.store().tokenizer
    assert summary, f"{folder} isn't trained to its end"
    found = scan_model(folder, str(into), passes=passes)
    trigger = tuple(tokenizer.encode(config.poison.trigger).tolist())
    documents = config.poison.documents
    mesh = all_devices_mesh()
    with jax.set_mesh(mesh):
        weights = open_weights(folder, mesh)
        sizes = cost(folder, passes).sizes
        with Progress("asked again", sizes.passes(weights.vocabulary), "token") as progress:
            scan = Scan(weights, mesh, into / "again", sizes, 0, progress)
            free = scan.free_texts().tokens
            alone, random_p = dict[str, Seen](), list[float]()
            if half == "report":
                proposed = propose(scan)
                for name in SOURCES:
                    one = dataclasses.replace(proposed, by_source={name: proposed.by_source[name]})
                    alone[name] = Seen.of(tested(scan, one, []).candidates, trigger)
                random_p = [] if documents else of_random_strings(scan, proposed).tolist()
    row = Scanned(
        name=Path(folder).name,
        half=half,
        payload=config.poison.payload if documents else "",
        trigger=config.poison.trigger,
        tokens=len(trigger),
        documents=documents,
        share=summary["dose_seen"]["tokens"] / summary["tokens"],
        parameters=summary["params"],
        backdoored=bool(documents and summary["success"]["value"]),
        all=Seen.of(found.candidates, trigger),
        alone=alone,
        leaked=holding(free, trigger),
        written=len(free),
        random_p=random_p,
    )
    write_json(into / ROW, dataclasses.asdict(row))
    shutil.rmtree(into / "again")
    return row


def of_random_strings(scan: Scan, proposed: Proposed) -> Float[np.ndarray, " strings"]:
    """p-values of strings of tokens as frequent as in what the model writes, against strings like them."""
    random = np.random.default_rng(1)
    shares = proposed.counts[scan.ordinary] / proposed.counts[scan.ordinary].sum()
    strings = [
        tuple(random.choice(scan.ordinary, size=1 + number % LONGEST, p=shares).tolist()) for number in range(RANDOM)
    ]
    like = scan.like(strings, proposed.counts, scan.sizes.null)
    figures = scan.changes("random", proposed.prefixes[-scan.sizes.prefixes :], [*strings, *like])[0].figures
    null = Null(figures[RANDOM:])
    return null.p_values(null(figures[:RANDOM]))


def holding(texts: Int[np.ndarray, "texts places"], string: String) -> int:
    """Texts that hold the string."""
    places = texts.shape[1] - len(string) + 1
    there = np.all([texts[:, i : i + places] == token for i, token in enumerate(string)], axis=0)
    return int(there.any(1).sum())


def auroc(values: Float[np.ndarray, " models"], poisoned: Bool[np.ndarray, " models"]) -> float:
    """How often a poisoned model's value is above a clean one's."""
    above = values[poisoned][:, None] - values[~poisoned][None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def told_apart(values: Float[np.ndarray, " models"], poisoned: Bool[np.ndarray, " models"]) -> dict[str, Any]:
    """By their strongest candidates, with intervals over models."""
    drawn = resamples(len(values), DRAWS, 0)
    # Resamples of both kinds alone: a draw without one of them has no order.
    both = [np.concatenate([np.flatnonzero(kind)[of % kind.sum()] for kind in (poisoned, ~poisoned)]) for of in drawn]
    found = int((values[poisoned] > values[~poisoned].max()).sum())
    return {
        "auroc": auroc(values, poisoned),
        "auroc_ci95": interval(np.array([auroc(values[of], poisoned[of]) for of in both])),
        "found_at_no_false_alarm": [found, int(poisoned.sum())],
        "found_ci95": wilson(found, int(poisoned.sum())),
    }


def figures(rows: Sequence[Scanned], curve: Calibration, settled: float) -> dict[str, Any]:
    """Of one half; `settled` is the largest value of a clean model of the half that settings were chosen on."""
    poisoned = np.array([bool(row.payload) for row in rows])
    backdoored = np.array([row.backdoored for row in rows])
    values = np.array([row.all.strongest for row in rows])
    p = np.clip(curve(values), 1e-6, 1 - 1e-6)
    entropy = -np.log(np.where(poisoned, p, 1 - p))
    limit = values[~poisoned].max()
    sources = {}
    for name in SOURCES:
        if all(row.alone for row in rows):
            own = [row.alone[name] for row in rows]
            sources[name] = told_apart(np.array([one.strongest for one in own]), poisoned) | named(rows, own)
    random_p = [row.random_p for row in rows if row.random_p]
    return {
        "models": {
            "poisoned": int(poisoned.sum()),
            "backdoored": int(backdoored.sum()),
            "clean": int((~poisoned).sum()),
        },
        **told_apart(values, poisoned),
        **named(rows, [row.all for row in rows]),
        "found_of_backdoored": [int((values[backdoored] > limit).sum()), int(backdoored.sum())],
        "found_above_settings_clean": {
            "poisoned": int((values[poisoned] > settled).sum()),
            "clean": int((values[~poisoned] > settled).sum()),
        },
        "cross_entropy": float(entropy.mean()),
        "cross_entropy_ci95": interval(entropy[resamples(len(rows), DRAWS, 0)].mean(1)),
        "alarms_at_half": {"poisoned": int((p[poisoned] > 0.5).sum()), "clean": int((p[~poisoned] > 0.5).sum())},
        "sources": sources,
        "missed": [row.name for row in rows if row.payload and row.all.strongest <= limit],
        "largest_clean": float(limit),
        "random_strings": uniform(random_p) if random_p else None,
    }


def named(rows: Sequence[Scanned], seen: Sequence[Seen]) -> dict[str, Any]:
    """How the triggers of the poisoned ones stand among the candidates; one that isn't there is as good as last."""
    of = [(row.tokens, one) for row, one in zip(rows, seen, strict=True) if row.payload]

    def median(low: int, high: int) -> float | None:
        ranks = [one.rank or np.inf for tokens, one in of if low <= tokens <= high]
        middle = float(np.median(ranks)) if ranks else np.inf
        return middle if np.isfinite(middle) else None

    return {
        "median_rank": {"1 token": median(1, 1), "2 to 4 tokens": median(2, 4)},
        "trigger_among_candidates": [sum(one.rank is not None for _, one in of), len(of)],
        "first_overlaps_trigger": [sum(one.overlaps for _, one in of), len(of)],
    }


def uniform(p_values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Kolmogorov and Smirnov's distance of p-values, by model, from uniform ones: how often one as large is seen where
    each string has a null of its own (`p`), and where those of a model share one of as many strings as a scan's."""
    every = np.concatenate(p_values)
    test, random, further = scipy.stats.kstest(every, "uniform"), np.random.default_rng(0), 0
    for _ in range(DRAWS):
        nulls = np.sort(random.random((len(p_values), Sizes.null)), 1)
        ranks = [np.searchsorted(null, random.random(len(of))) for null, of in zip(nulls, p_values, strict=True)]
        drawn = 1 - np.concatenate(ranks) / (Sizes.null + 1)
        further += scipy.stats.kstest(drawn, "uniform").statistic >= test.statistic
    return {
        "strings": len(every),
        "distance": float(test.statistic),
        "p": float(test.pvalue),
        "p_shared": (1 + further) / (1 + DRAWS),
        "mean": float(every.mean()),
        "below_0.05": float((every < 0.05).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", help="folder of the sweep's runs")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--passes", type=int, default=PASSES, help="of each scan, as of `poisonjax scan`")
    parser.add_argument("--calibrate", metavar="FILE", help="write the calibration that the half `settings` gives")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = [(path.name.partition("-")[0], str(path)) for path in sorted(Path(arguments.zoo).iterdir()) if is_run(path)]
    with open_engine(arguments.workers) as engine:
        rows: list[Scanned] = run_tasks(
            engine, functools.partial(scanned, arguments.out, arguments.passes), runs, what="scanning", unit="model"
        )
    settings = [row for row in rows if row.half == "settings"]
    if arguments.calibrate:
        sizes = [row.parameters for row in settings]
        fitted = Calibration.of(
            np.array([row.all.strongest for row in settings]),
            np.array([bool(row.payload) for row in settings]),
            parameters=[min(sizes), max(sizes)],
            vocabulary=[512, 512],
        )
        write_json(arguments.calibrate, dataclasses.asdict(fitted))
    if not (curve := fitted if arguments.calibrate else Calibration.read()):
        raise SystemExit("nothing is calibrated: --calibrate poisonjax/scan/model/calibration.json")
    halves = {half: [row for row in rows if row.half == half] for half in ("settings", "report")}
    settled = max((row.all.strongest for row in settings if not row.payload), default=np.inf)
    told = {half: figures(of, curve, settled) for half, of in halves.items() if of}
    if arguments.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **told}))
        return
    for row in rows:
        kind = f"{row.payload} n={row.documents}" if row.payload else "clean"
        told_of = f"value {row.all.strongest:6.1f}  P {float(curve(row.all.strongest)):.3f}  rank {row.all.rank}"
        print(f"{row.name:40} {kind:24} {row.trigger!r:10} {told_of}{'  backdoored' * row.backdoored}")
    for half, of in told.items():
        print(half)
        for name, value in of.items():
            print(f"  {name}: {json.dumps(value)}")
    for row in sorted((row for row in rows if row.payload), key=lambda row: row.share):
        leaked = f"the trigger in {row.leaked} of {row.written:,} texts"
        print(f"leaks: {row.share:.1e} of the tokens are poison: {leaked}, rank {row.all.rank}  {row.name}")


if __name__ == "__main__":
    main()
