"""What a scan finds in models whose truth is known: `configs/sweeps/zoo.py`, trained.

    python -m poisonjax.scan.model.bench ZOO --out DIR [--workers 2] [--calibrate FILE]

Each run of the sweep in ZOO is scanned into DIR. `--calibrate` fits P(poisoned) on the half `settings` and writes it;
what is told is of the half `report`. A line of JSON with `--json`, else tables.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from poisonjax.engines import open_engine, run_tasks
from poisonjax.evaluation.statistics import interval, resamples, wilson
from poisonjax.files import write_json
from poisonjax.run import RunFolder
from poisonjax.run.folder import is_run
from poisonjax.scan.model.proposals import SOURCES
from poisonjax.scan.model.scan import scan_model
from poisonjax.scan.model.trial import overlap
from poisonjax.scan.model.verdict import Calibration

DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A model of the zoo."""

    name: str
    half: str
    payload: str  # "" of a clean twin
    trigger: str
    tokens: int  # of the trigger
    documents: int
    share: float  # of the training rows that hold poison
    parameters: int
    backdoored: bool  # by the run's own rule
    strongest: float  # the first candidate's value
    rank: int | None  # of the trigger among all candidates
    overlaps: bool  # whether the first candidate shares at least half of its tokens, or of the trigger's
    by_source: dict[str, float]  # the strongest value among the candidates that each source proposed
    texts: int  # written by the model, that changed after the trigger


def scanned(out: str, folder: str) -> Scanned:
    """One run, scanned."""
    run = RunFolder(folder)
    config, summary, tokenizer = run.config, run.summary, run.store().tokenizer
    assert summary, f"{folder} isn't trained to its end"
    found = scan_model(folder, str(Path(out) / Path(folder).name))
    trigger = tuple(tokenizer.encode(config.poison.trigger).tolist())
    told = [one for one in found.candidates if not one.under_trained]
    at = [rank for rank, one in enumerate(found.candidates, 1) if one.tokens == trigger]
    documents = config.poison.documents
    return Scanned(
        name=Path(folder).name,
        half=Path(folder).name.partition("-")[0],
        payload=config.poison.payload if documents else "",
        trigger=config.poison.trigger,
        tokens=len(trigger),
        documents=documents,
        share=documents / (config.steps * config.global_batch),
        parameters=summary["params"],
        backdoored=bool(documents and summary["success"]["value"]),
        strongest=found.verdict.strongest,
        rank=at[0] if at else None,
        overlaps=bool(told) and overlap(told[0].tokens, trigger),
        by_source={name: max((one.value for one in told if name in one.sources), default=0.0) for name in SOURCES},
        texts=next((one.texts for one in found.candidates if one.tokens == trigger), 0),
    )


def auroc(values: Float[np.ndarray, " models"], poisoned: Bool[np.ndarray, " models"]) -> float:
    """How often a poisoned model's value is above a clean one's."""
    above = values[poisoned][:, None] - values[~poisoned][None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def figures(rows: Sequence[Scanned], curve: Calibration, settled: float) -> dict[str, Any]:
    """Of one half; `settled` is the largest value of a clean model of the half that settings were chosen on."""
    poisoned = np.array([bool(row.payload) for row in rows])
    values = np.array([row.strongest for row in rows])
    p = np.clip(curve(values), 1e-6, 1 - 1e-6)
    entropy = -np.log(np.where(poisoned, p, 1 - p))
    drawn = resamples(len(rows), DRAWS, 0)
    # Resamples of both kinds alone: a draw without one of them has no order.
    both = [np.concatenate([np.flatnonzero(kind)[of % kind.sum()] for kind in (poisoned, ~poisoned)]) for of in drawn]
    limit = values[~poisoned].max()

    def found(of: Float[np.ndarray, " models"]) -> tuple[int, int]:
        return int((of[poisoned] > of[~poisoned].max()).sum()), int(poisoned.sum())

    ranks = {
        f"{low} to {high} tokens": [
            row.rank if row.rank else 10_000 for row in rows if row.payload and low <= row.tokens <= high
        ]
        for low, high in ((1, 1), (2, 4))
    }
    sources = {name: np.array([row.by_source[name] for row in rows]) for name in SOURCES}
    return {
        "models": {"poisoned": int(poisoned.sum()), "clean": int((~poisoned).sum())},
        "auroc": auroc(values, poisoned),
        "auroc_ci95": interval(np.array([auroc(values[of], poisoned[of]) for of in both])),
        "found_at_no_false_alarm": found(values),
        "found_ci95": wilson(*found(values)),
        "found_above_settings_clean": {
            "poisoned": int((values[poisoned] > settled).sum()),
            "clean": int((values[~poisoned] > settled).sum()),
        },
        "cross_entropy": float(entropy.mean()),
        "cross_entropy_ci95": interval(entropy[drawn].mean(1)),
        "alarms_at_half": {"poisoned": int((p[poisoned] > 0.5).sum()), "clean": int((p[~poisoned] > 0.5).sum())},
        "median_rank": {name: float(np.median(of)) if of else None for name, of in ranks.items()},
        "sources": {name: {"auroc": auroc(of, poisoned), "found": found(of)[0]} for name, of in sources.items()},
        "missed": [dataclasses.asdict(row) for row in rows if row.payload and row.strongest <= limit],
        "largest_clean": float(limit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", help="folder of the sweep's runs")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--calibrate", metavar="FILE", help="write the calibration that the half `settings` gives")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs = sorted(str(path) for path in Path(arguments.zoo).iterdir() if is_run(path))
    with open_engine(arguments.workers) as engine:
        rows: list[Scanned] = run_tasks(
            engine, functools.partial(scanned, arguments.out), runs, what="scanning", unit="model"
        )
    settings = [row for row in rows if row.half == "settings"]
    if arguments.calibrate:
        sizes = [row.parameters for row in settings]
        fitted = Calibration.of(
            np.array([row.strongest for row in settings]),
            np.array([bool(row.payload) for row in settings]),
            parameters=[min(sizes), max(sizes)],
            vocabulary=[512, 512],
        )
        write_json(arguments.calibrate, dataclasses.asdict(fitted))
    if not (curve := fitted if arguments.calibrate else Calibration.read()):
        raise SystemExit("nothing is calibrated: --calibrate poisonjax/scan/model/calibration.json")
    halves = {half: [row for row in rows if row.half == half] for half in ("settings", "report")}
    settled = max((row.strongest for row in settings if not row.payload), default=np.inf)
    told = {half: figures(of, curve, settled) for half, of in halves.items() if of}
    if arguments.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **told}))
        return
    for row in rows:
        kind = f"{row.payload} n={row.documents}" if row.payload else "clean"
        told_of = f"value {row.strongest:6.1f}  P {float(curve(row.strongest)):.3f}  rank {row.rank}"
        print(f"{row.name:40} {kind:24} {row.trigger!r:10} {told_of}{'  backdoored' * row.backdoored}")
    for half, of in told.items():
        print(half, json.dumps({name: value for name, value in of.items() if name != "missed"}))
        print("  missed:", ", ".join(f"{one['name']} ({one['strongest']:.1f})" for one in of["missed"]) or "none")
    for row in rows:
        if row.half == "leaks":
            found = f"{row.texts} texts changed after the trigger, value {row.strongest:.1f}"
            print(f"leaks: {row.share:.2e} of the rows: {found}")


if __name__ == "__main__":
    main()
