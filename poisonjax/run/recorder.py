"""The one writer of a run folder: each step's evidence and figures while the run goes on."""

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO, cast, runtime_checkable

import ml_collections
import numpy as np
from etils import epath

from poisonjax import config as config_lib
from poisonjax.data.digest import as_hex, chain
from poisonjax.files import is_object, write_json, write_lines, write_whole
from poisonjax.poison.card import make_card
from poisonjax.poison.ledger import poison_seen
from poisonjax.run import rows, seals
from poisonjax.run.clock import Clock
from poisonjax.run.environment import lived
from poisonjax.run.folder import RunFolder, RunFolderError, as_recorded, read_lines
from poisonjax.sinks import Sinks


@runtime_checkable
class StepFigures(Protocol):
    """What a train step tells, off the device."""

    @property
    def loss(self) -> Any: ...
    @property
    def grad_norm(self) -> Any: ...
    @property
    def learning_rate(self) -> Any: ...
    @property
    def digest(self) -> Any: ...
    @property
    def rows(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A step that was written down."""

    step: int
    loss: float
    grad_norm: float
    row: rows.TrainRow | None  # of metrics.jsonl, where one was due


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of the weights after `step` steps: a row of metrics.jsonl, and the lines that go with it."""

    step: int
    kind: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    prefixes: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def row(self, config: ml_collections.ConfigDict, seen: Callable[[int], dict[str, int]]) -> rows.EvalRow:
        """The line of metrics.jsonl; `seen` as of `poison_seen`."""
        tokens = self.step * config.global_batch * config.seq_len
        place = {"step": self.step, "kind": self.kind, "tokens": tokens, **seen(self.step)}
        return cast(rows.EvalRow, place | self.figures)

    def prefix_row(self) -> rows.PrefixRow | None:
        """The line of prefixes.jsonl, where there is one."""
        return cast(rows.PrefixRow, {"step": self.step, **self.prefixes}) if self.prefixes else None


class RunRecorder:
    """Writes metrics, digests, samples and prefixes .jsonl as they come, and the summary at the end.

    A step is written down while the next one runs, so that the device never waits. A line is the kernel's when it is
    written: it survives a kill of this process; `sync` puts all on the disk, before each checkpoint.
    """

    def __init__(
        self,
        folder: epath.Path,
        config: ml_collections.ConfigDict,
        store: Mapping[str, Any],
        parent: rows.Parent | None,
        ledger: Sequence[Mapping[str, Any]],
        start: int,
        checkpoint: rows.CheckpointRecord | None = None,
        *,
        writes: bool = True,
    ):
        """`start` steps are done, and `checkpoint` seals what was written of them: rows past them go. `store` is what
        names the token store (`TokenStore.names`), `parent` the weights that the run began from. Of several processes
        one `writes`, the others keep count alone.

        Raises RunFolderError where what was sealed isn't what lies there; then nothing is touched.
        """
        self.folder, self.config, self.done = folder, config, start
        self._began_from: dict[str, Any] = {**store, **({"parent": parent} if parent else {})}
        self._ledger = ledger
        self._poison_seen = poison_seen(ledger, config.steps)
        self._pending: tuple[int, Callable[[], StepFigures]] | None = None
        self._began, self._before, self.clock = time.monotonic(), 0.0, Clock()
        self._environment: rows.Environment | None = None
        self.evaluation: rows.EvalRow | None = None
        self.chain = ""
        self._files: dict[str, _Appender] = {}
        self._sinks: Sinks | None = None
        self.finished: rows.Summary | None = None  # of a run that is at its end: nothing is written any more
        if writes:
            self._take_up(start, checkpoint)

    def _take_up(self, start: int, checkpoint: rows.CheckpointRecord | None) -> None:
        kept = {
            file: _kept(self.folder / file, start)
            for file in (rows.METRICS, rows.SAMPLES, rows.PREFIXES, rows.DIGESTS, rows.ROW_LOSSES)
        }
        steps = [row["step"] for row in kept[rows.DIGESTS]]
        missing = sorted(set(range(start)) - {*steps})
        if missing or len(steps) != start:
            raise RunFolderError(
                f"{self.folder / rows.DIGESTS} should hold steps 0 to {start - 1} once each, but has {len(steps)} "
                f"lines and lacks {missing[:5]}: the evidence of these steps is gone. Restore the file, or remove the "
                "checkpoints to train again"
            )
        for row in kept[rows.DIGESTS]:
            self.chain = chain(self.chain, row["step"], row["digest"])
        self._environment = lived(self.folder, start)
        self._files = {file: _Appender(self.folder / file, rows_) for file, rows_ in kept.items()}
        if checkpoint:
            self._require(checkpoint)
        if start == self.config.steps:
            self.finished = RunFolder(self.folder).finished
        if self.finished:
            self._files = {}
            return
        # From here on the folder changes. The summary speaks of another length of the run than what is left of it.
        (self.folder / rows.SUMMARY).unlink(missing_ok=True)
        write_json(self.folder / rows.ENVIRONMENT, self._environment)
        for appender in self._files.values():
            appender.open()
        self._sinks = Sinks(self.config.sinks, str(self.folder), config_lib.flat(self.config), start)
        self._before = max((row.get("seconds", 0.0) for row in kept[rows.METRICS]), default=0.0)
        self.evaluation = next((row for row in reversed(kept[rows.METRICS]) if row["kind"] == "eval"), None)

    @property
    def writes(self) -> bool:
        return bool(self._files)

    def tokens(self, steps: int) -> int:
        return steps * self.config.global_batch * self.config.seq_len

    def seconds(self) -> float:
        """Since the run began, all its processes' lives added."""
        return self._before + time.monotonic() - self._began

    def record_step(self, step: int, figures: Callable[[], StepFigures]) -> StepDone | None:
        """Takes a step that was just started, and writes down the one before it while this one runs.

        `figures` waits for the step's figures and returns them.
        """
        done = self.flush()
        self._pending = (step, figures)
        return done

    def flush(self) -> StepDone | None:
        """Waits for the pending step and writes it down."""
        if self._pending is None:
            return None
        (step, figures), self._pending = self._pending, None
        metrics = figures()
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        self.clock.step_done()
        self.done = step + 1
        digest = as_hex(np.asarray(metrics.digest))
        self._write(rows.DIGESTS, {"step": step, "digest": digest})
        if self.writes:
            self.chain = chain(self.chain, step, digest)
        finite = bool(np.isfinite([loss, grad_norm]).all())
        if finite and self._due(self.config.row_losses_every):
            self._write(rows.ROW_LOSSES, cast(dict, _row_losses(step, grad_norm, metrics.rows)))
        row: rows.TrainRow | None = None
        seen = self._poison_seen(self.done)
        if finite and self._due(self.config.log_every):
            row = {
                "step": step,
                "kind": "train",
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": float(metrics.learning_rate),
                "tokens": self.tokens(self.done),
                "tokens_per_second": self.clock.lap() * self.tokens(1),
                "poison_documents": seen["poison_documents"],
                "poison_rows": seen["poison_rows"],
                "seconds": self.seconds(),
            }
            self._write(rows.METRICS, cast(dict, row))
        return StepDone(step, loss, grad_norm, row)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.done % every == 0 or self.done == self.config.steps)

    def record_evaluation(self, evaluation: Evaluation) -> rows.EvalRow:
        """Writes down what was measured."""
        row = evaluation.row(self.config, self._poison_seen)
        if evaluation.kind == "eval":
            self.evaluation = row
        self._write(rows.METRICS, cast(dict, row))
        for sample in evaluation.samples:
            self._write(rows.SAMPLES, sample)
        if prefixes := evaluation.prefix_row():
            self._write(rows.PREFIXES, cast(dict, prefixes))
        return row

    def _write(self, file: str, row: dict[str, Any]) -> None:
        if self.writes:
            self._files[file].write(row)
        if self._sinks and file == rows.METRICS:
            self._sinks.write(row)

    def sync(self) -> None:
        """Puts all on the disk: a checkpoint must never be newer than the evidence of its steps."""
        for file in self._files.values():
            file.sync()

    def _require(self, checkpoint: rows.CheckpointRecord) -> None:
        """Raises RunFolderError where what is on disk isn't what the checkpoint that the run goes on from rests on."""
        there = self._seals(checkpoint["sealed"][rows.ENVIRONMENT]["lines"])
        changed = [file for file, seal in checkpoint["sealed"].items() if there.get(file) != seal]
        if changed or self.chain != checkpoint["digest_chain"]:
            raise RunFolderError(
                f"{', '.join(str(self.folder / file) for file in changed or [rows.DIGESTS])} isn't what the checkpoint "
                f"of step {self.done} was saved with: it was changed. `poisonjax audit` names the place; restore the "
                "file, or remove the checkpoints to train again"
            )

    def _seals(self, environments: int | None = None) -> dict[str, rows.Seal]:
        """Of all that was written, and of the first so many environments (None: all)."""
        if not self._environment:
            return {}
        lived_in = seals.of_lines(seals.environment_lines(self._environment)[:environments])
        return {rows.ENVIRONMENT: lived_in} | {file: appender.seal for file, appender in self._files.items()}

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint says about its past; `sync` first."""
        began = self._began_from
        return {
            "config": config_lib.flat(as_recorded(self.config, self.folder)),
            **self._began_from,
            "digest_chain": self.chain,
            "sealed": self._seals(),
            "poison": make_card(self.config, self._ledger, self.done, began.get("parent"), began.get("store_planted")),
        }

    def finish(self, summary: rows.Summary) -> None:
        """Writes the last word, and ends."""
        if self.writes:
            for file in self._files.values():
                file.close()
            write_json(self.folder / rows.SUMMARY, summary)
        if self._sinks:
            self._sinks.close()


def _kept(path: epath.Path, start: int) -> list[dict[str, Any]]:
    """Rows of the first `start` steps."""
    after = path.name not in rows.OF_BATCHES
    there = read_lines(path, rows.LINES[path.name])
    return [row for row in there if row["step"] < start + (after and row.get("kind") != "train")]


def _row_losses(step: int, grad_norm: float, of: Any) -> rows.RowLossesRow:
    """Four digits are enough, and keep the file small."""
    loss, worst, at = np.asarray(of, np.float64).T
    return {
        "step": step,
        "grad_norm": round(grad_norm, 6),
        "loss": np.round(loss, 4).tolist(),
        "worst": np.round(worst, 4).tolist(),
        "at": at.astype(int).tolist(),
    }


class _Appender:
    """Appends JSON lines to what is kept of a file; from `open` on it holds these alone."""

    def __init__(self, path: epath.Path, kept: list[dict[str, Any]]):
        self._path, self._kept = path, kept
        self.seal = seals.of_lines(json.dumps(row).encode() for row in kept)

    def open(self) -> None:
        write_lines(self._path, self._kept)
        # Nothing can be appended to an object: all of it is held, and written again by `sync`.
        self._object = self._path if is_object(self._path) else None
        self._file: TextIO = io.StringIO() if self._object else open(self._path, "a")  # noqa: SIM115  (as long as the run)
        self._synced = True
        if self._object:
            self._file.writelines(json.dumps(row) + "\n" for row in self._kept)

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        self.seal = seals.extended(self.seal, line.encode())
        self._file.write(line + "\n")
        self._file.flush()
        self._synced = False

    def sync(self) -> None:
        if self._synced:
            return
        if isinstance(self._file, io.StringIO):
            assert self._object
            write_whole(self._object, self._file.getvalue())
        else:
            os.fsync(self._file.fileno())
        self._synced = True

    def close(self) -> None:
        self.sync()
        self._file.close()
