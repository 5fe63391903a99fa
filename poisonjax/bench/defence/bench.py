"""All of `poisonjax bench defence`, in order: settings on one half of the text, figures on the other, then training."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from poisonjax.bench.defence import detection, dose, models, page, utility
from poisonjax.bench.defence.ladder import HALVES, RUNGS, SHORTENED, TUNED_ON, Ladder
from poisonjax.corpus.bench_text import LEADS, Fetched
from poisonjax.files import write_whole

EXAMPLES = 20  # false positives that are shown
SMALL = "small model"  # of ours, trained on the other half's text


@dataclasses.dataclass(frozen=True)
class Defence:
    """What the bench is asked for."""

    config: ml_collections.ConfigDict  # of the models that read what is left
    fetched: Fetched
    workdir: Path
    models: Sequence[str] = ()  # specs, whose loss is a detector
    sampled: int = 1000  # clean documents of each domain that a model scores
    seeds: int = 5  # of each run; 0: nothing is trained
    workers: int = 2

    @property
    def page(self) -> Path:
        """Where the page is written."""
        return self.workdir / "defence.html"

    def rows(self) -> list[dict[str, Any]]:
        """All figures; the page is written with them."""
        tuned, reported = (Ladder.of(self.fetched, half) for half in HALVES)
        folder, mixtures = self.workdir / "scores", self.workdir / "mixtures"
        trees = detection.fitted(detection.scored(tuned, [*TUNED_ON, *SHORTENED], folder / tuned.half))
        scored = detection.with_trees(detection.scored(reported, [*RUNGS], folder / reported.half), trees)
        told = [*detection.found(scored), *detection.budgets(scored), *detection.costs(scored)]
        for spec in self.models:
            told += models.by_model(spec, spec, scored, reported, folder, self.sampled)
        if self.seeds:
            of = dose.pipelines(trees)
            dropped = utility.dropped(reported.texts, scored, of)
            beside = {d: some for d, some in reported.texts.items() if d != LEADS}  # the models read leads
            told += dose.rows(self.config, self.workdir / "runs", of, beside, seeds=self.seeds, workers=self.workers)
            told += utility.rows(
                self.config, reported.texts, dropped, mixtures / reported.half, seeds=self.seeds, workers=self.workers
            )
            small = utility.model(self.config, tuned.texts, mixtures / tuned.half)
            told += models.by_model(SMALL, small, scored, reported, folder, self.sampled)
        shown = detection.oddest(scored, reported, EXAMPLES)
        content = page.page(told, self.fetched.absent, shown, epath.Path(self.workdir))
        write_whole(epath.Path(self.page), content)
        return told


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a terminal shows: recall of every rung by every detector, and the dose before and after."""
    lines = []
    for rate in detection.RATES:
        found = page.recall_table(rows, rate)
        lines.append(f"recall at {rate:g} false positives, one threshold for all domains")
        lines.append(" " * 20 + "".join(f"{name[:18]:>20}" for name in found["detectors"]))
        for rung, cells in found["rungs"].items():
            lines.append(f"{rung:20}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>20}" for cell in cells))
    for row in page.dose_table(rows):
        survive = "; ".join(f"{stage} {shares}" for stage, shares in row.pop("surviving").items())
        told = row | ({"surviving": survive} if survive else {})
        lines.append("  ".join(f"{name} {value}" for name, value in told.items() if value))
    return "\n".join(lines)
