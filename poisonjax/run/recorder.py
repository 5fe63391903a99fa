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
from poisonjax.run import rows
from poisonjax.run.clock import Clock
from poisonjax.run.folder import RunFolderError, read_lines


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
        store_fingerprint: str,
        ledger: Sequence[Mapping[str, Any]],
        start: int,
        *,
        writes: bool = True,
    ):
        """`start` steps are done: rows past them go. Of several processes one `writes`, the others keep count alone.

        Raises RunFolderError where the digests of the steps done aren't all there.
        """
        self.folder, self.config, self.done = folder, config, start
        self._store_fingerprint, self._ledger = store_fingerprint, ledger
        self._poison_seen = poison_seen(ledger, config.steps)
        self._pending: tuple[int, Callable[[], StepFigures]] | None = None
        self._began, self._before, self.clock = time.monotonic(), 0.0, Clock()
        self.evaluation: rows.EvalRow | None = None
        self.chain = ""
        self._files: dict[str, _Appender] = {}
        if writes:
            self._take_up(start)

    def _take_up(self, start: int) -> None:
        digests = [row for row in read_lines(self.folder / rows.DIGESTS, rows.DigestRow) if row["step"] < start]
        missing = sorted(set(range(start)) - {row["step"] for row in digests})
        if missing or len(digests) != start:
            raise RunFolderError(
                f"{self.folder / rows.DIGESTS} should hold steps 0 to {start - 1} once each, but has {len(digests)} "
                f"lines and lacks {missing[:5]}: the evidence of these steps is gone. Restore the file, or remove the "
                "checkpoints to train again"
            )
        for row in digests:
            self.chain = chain(self.chain, row["step"], row["digest"])
        # It speaks of another length of the run than what is left of its evidence.
        (self.folder / rows.SUMMARY).unlink(missing_ok=True)
        self._files = {
            file: _Appender(self.folder / file, rows.LINES[file], lambda row: _is_past(row, start))
            for file in (rows.METRICS, rows.SAMPLES, rows.PREFIXES)
        }
        self._files[rows.DIGESTS] = _Appender(
            self.folder / rows.DIGESTS, rows.DigestRow, lambda row: row["step"] < start
        )
        kept = self._files[rows.METRICS].kept
        self._before = max((row.get("seconds", 0.0) for row in kept), default=0.0)
        self.evaluation = next((row for row in reversed(kept) if row["kind"] == "eval"), None)

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
        row: rows.TrainRow | None = None
        seen = self._poison_seen(self.done)
        if np.isfinite([loss, grad_norm]).all() and (
            self.done % self.config.log_every == 0 or self.done == self.config.steps
        ):
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

    def sync(self) -> None:
        """Puts all on the disk: a checkpoint must never be newer than the evidence of its steps."""
        for file in self._files.values():
            file.sync()

    def check_chain(self, recorded: str) -> None:
        """Raises RunFolderError where the digests on disk aren't those that the checkpoint was trained on."""
        if self.writes and self.chain != recorded:
            raise RunFolderError(
                f"{self.folder / rows.DIGESTS} doesn't lead to the checkpoint of step {self.done}: the file was "
                "changed. `poisonjax audit` names the step; restore the file, or remove the checkpoints to train again"
            )

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint says about its past; `sync` first."""
        return {
            "config": config_lib.flat(self.config),
            "store_fingerprint": self._store_fingerprint,
            "digest_chain": self.chain,
            "poison": make_card(self.config, self._ledger, self.done),
        }

    def finish(self, summary: rows.Summary) -> None:
        """Writes the last word, and ends."""
        if self.writes:
            for file in self._files.values():
                file.close()
            write_json(self.folder / rows.SUMMARY, summary)


def _is_past(row: dict[str, Any], start: int) -> bool:
    """A train row's step is the batch's number, others' the number of steps done."""
    return row["step"] < start + (row.get("kind") != "train")


class _Appender:
    """Appends JSON lines; what was written before and `keep` refuses goes first."""

    def __init__(self, path: epath.Path, hint: Any, keep: Callable[[dict[str, Any]], bool]):
        self.kept = [row for row in read_lines(path, hint) if keep(row)]
        write_lines(path, self.kept)
        # Nothing can be appended to an object: all of it is held, and written again by `sync`.
        self._object = path if is_object(path) else None
        self._file: TextIO = io.StringIO() if self._object else open(path, "a")  # noqa: SIM115  (as long as the run)
        self._synced = True
        if self._object:
            self._file.writelines(json.dumps(row) + "\n" for row in self.kept)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
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
