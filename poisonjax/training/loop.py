"""The main job: from a config to a trained, measured, documented model."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from poisonjax import config as config_lib
from poisonjax import corpus, runfolder
from poisonjax.data.batches import Batches, load
from poisonjax.data.digest import as_hex
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.offline import load_scorer
from poisonjax.evaluation.statistics import judge
from poisonjax.files import resolve, write_whole
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import parameter_counts
from poisonjax.poison.card import FILE, as_markdown, make_card
from poisonjax.poison.plan import dose, met
from poisonjax.processes import require_agreement
from poisonjax.report import write_report
from poisonjax.training.checkpoints import Checkpoints
from poisonjax.training.log import RunLog
from poisonjax.training.step import StepMetrics, make_init, make_train_step, model_graph
from poisonjax.training.watchdog import HUNG, Watchdog


class Diverged(RuntimeError):
    """The loss or its gradient is no longer finite."""


class Preempted(RuntimeError):
    """The process was asked to stop; all is saved, the same command goes on from there."""


class LostProcess(RuntimeError):
    """In a run of several processes, this one failed or lost the others: end it with `exit_code`, at once."""

    def __init__(self, error: BaseException):
        # Collectives fail where another process ended; the run is sound up to its last checkpoint.
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        self.exit_code = HUNG if lost else 2 if isinstance(error, ValueError) else 1
        super().__init__(
            f"process {jax.process_index()} of {jax.process_count()} stops: {type(error).__name__}: {error}"
            + ("\nAnother process is dead, perhaps; its own output tells." if lost else "")
        )


def open_store(config: ml_collections.ConfigDict) -> corpus.TokenStore:
    """The config's token store, built first where it isn't there; without sources, whatever lies there."""
    c = config.corpus
    if not c.sources:
        return corpus.TokenStore(c.store)
    if not corpus.exists(c.store):
        if jax.process_count() > 1:
            raise config_lib.ConfigError(
                f"corpus.store = {c.store!r}: no finished token store there; run `poisonjax corpus build` first, "
                "several processes don't build one"
            )
        print(f"building the token store {c.store} from {', '.join(c.sources)}", flush=True)
        return corpus.build(c.store, list(c.sources), c.tokenizer, heldout=c.heldout)
    store = corpus.TokenStore(c.store)
    store.require(sources=list(c.sources), tokenizer=c.tokenizer, heldout=c.heldout)
    return store


def train(config: ml_collections.ConfigDict, workdir: str, twin_of: str | None = None) -> dict[str, Any]:
    """Trains in `workdir`, from its newest checkpoint if it has one; returns what summary.json holds.

    `twin_of` is the run folder whose clean twin this is: the report shows both.

    Raises ConfigError, ValueError and RunFolderError before step 0 for what can't work; Diverged and
    Preempted later; of several processes, LostProcess for all but those two.
    """
    config_lib.check(config)
    with Watchdog(config.watchdog_seconds) as watchdog:
        try:
            return _train(config, workdir, twin_of, watchdog)
        except (Diverged, Preempted):  # all processes see the same loss, and stop at the same step
            raise
        except Exception as error:
            if jax.process_count() == 1:
                raise
            if not isinstance(error, ValueError):
                traceback.print_exc()
            raise LostProcess(error) from error


def _train(config: ml_collections.ConfigDict, workdir: str, twin_of: str | None, watchdog: Watchdog) -> dict[str, Any]:
    config.corpus.store = str(resolve(config.corpus.store))
    folder = resolve(workdir)
    writer = jax.process_index() == 0

    # Everything that can be wrong is found here, before step 0.
    mesh = make_mesh(config)
    store = open_store(config)
    watchdog.start()  # building a store takes as long as it takes
    batches = Batches(config, store)
    ledger = batches.plan.ledger()
    vocabulary = store.tokenizer.vocab_size
    graph = model_graph(config, vocabulary)
    evaluator = Evaluator(config, store, graph, mesh, load_scorer(config, store, mesh))
    require_agreement(
        {
            "config": config_lib.fingerprint(config),
            "mesh": str(dict(mesh.shape)),
            "token store": store.fingerprint,
            "poison plan": hashlib.sha256(json.dumps(ledger).encode()).hexdigest(),
            "jax": jax.__version__,
        }
    )
    if writer:
        begin_folder(folder, config, store, batches, ledger, twin_of)
    watchdog.progress("waiting for all processes to start")
    _barrier("claimed")

    initialize, abstract = make_init(config, vocabulary, mesh)
    checkpoints = Checkpoints(folder, config, clean_up=True)
    with jax.set_mesh(mesh), stop_signals() as stop_asked:
        watchdog.progress("restoring the newest checkpoint")
        state, start = checkpoints.restore_newest(abstract)
        if state is None:
            state = initialize()
        elif writer:
            print(f"resuming after step {start} of {config.steps}", flush=True)
        run = Books(config, store, folder, batches, ledger, evaluator, state.params, start, writer)
        if writer and start:
            run.require(checkpoints.record(start).get("digest_chain", ""))
        status = "failed"
        try:
            train_step = make_train_step(config, graph, mesh, abstract)
            for step, rows in enumerate(load(batches, batch_sharding(mesh), start), start):
                state, metrics = train_step(state, rows)
                run.dispatched(step, metrics)
                done = step + 1
                watchdog.progress(f"step {done}")
                last = done == config.steps
                stopping = stop_asked(done)
                if last or done % config.eval.every == 0:
                    watchdog.progress(f"evaluating after step {done}")
                    run.evaluate(done, state.params)
                if last or stopping or done % config.checkpoint.every == 0:
                    watchdog.progress(f"saving step {done}")
                    run.synced()
                    checkpoints.save(done, state, run.record())
                if stopping and not last:
                    raise Preempted(f"stopped after step {done} of {config.steps}; the same command goes on from there")
            watchdog.progress("writing the last checkpoint and the report")
            checkpoints.close()
            status = "finished"
        except Preempted:
            checkpoints.close()
            status = "preempted"
            raise
        except Diverged:
            checkpoints.close()
            status = "diverged"
            raise
        finally:
            summary = run.close(status)
    return summary


def begin_folder(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    store: corpus.TokenStore,
    batches: Batches,
    ledger: list[dict[str, Any]],
    twin_of: str | None = None,
) -> None:
    """Writes all that is known before step 0; raises RunFolderError where the folder is another run's."""
    runfolder.claim(folder, config, store, twin_of)
    runfolder.write_json(folder / "environment.json", environment())
    runfolder.write_lines(folder / "ledger.jsonl", ledger)
    for name, records in batches.clean_records().items():
        if records:
            runfolder.write_lines(folder / name, records)
    if poison := make_card(config, ledger, 0):
        write_whole(folder / FILE, as_markdown(poison))


class Books:
    """The books of a run: what is written down, shown and timed."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        store: corpus.TokenStore,
        folder: epath.Path,
        batches: Batches,
        ledger: list[dict[str, Any]],
        evaluator: Evaluator,
        params: Any,
        start: int,
        writer: bool,
        label: str = "",
        shows_steps: bool = True,
    ):
        """`label` stands before lines for the user; of a population's members one alone `shows_steps`."""
        self.config, self.store, self.folder = config, store, folder
        self.batches, self.evaluator = batches, evaluator
        self.params = parameter_counts(params)
        self.ledger = ledger
        self.met = met(ledger, config.steps)
        self.log = RunLog(folder, start) if writer else None
        self.done = start
        self.evaluation: dict[str, Any] | None = next(
            (r for r in reversed(list(runfolder.read_lines(folder / "metrics.jsonl"))) if r["kind"] == "eval"), None
        )
        self.pending: tuple[int, StepMetrics] | None = None
        self.before = self.log.seconds if self.log else 0.0
        self.began = time.monotonic()
        self.clock = _Clock()
        self.label, self.shows_steps = label, shows_steps
        self.bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            disable=not (writer and shows_steps and sys.stderr.isatty()),
            smoothing=0.05,
        )

    def tokens(self, steps: int) -> int:
        return steps * self.config.global_batch * self.config.seq_len

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def dispatched(self, step: int, metrics: StepMetrics) -> None:
        """Takes a step that was just started, and writes down the one before it while this one runs."""
        self.settle()
        self.pending = (step, metrics)

    def settle(self) -> None:
        """Waits for the pending step and writes it down; raises Diverged if it wasn't finite."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        self.clock.step_done(step)
        self.done = step + 1
        if self.log:
            self.log.digest(step, as_hex(np.asarray(metrics.digest)))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(self._divergence(step, loss, grad_norm))
        self.bar.update()
        if self.done % self.config.log_every and self.done != self.config.steps:
            return
        speed = self.clock.lap() * self.tokens(1)
        row = {
            "step": step,
            "kind": "train",
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(metrics.learning_rate),
            "tokens": self.tokens(self.done),
            "tokens_per_second": speed,
            **self.met(self.done),
            "seconds": self.seconds(),
        }
        if self.log:
            self.log.metrics(row)
            brief = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
            self.say(f"step {self.done}/{self.config.steps}  {brief}", brief)

    def evaluate(self, done: int, params: Any) -> None:
        """Evaluates the weights after `done` steps."""
        self.settle()
        with self.clock.paused():
            figures, samples, units = self.evaluator(params, done)
        self.evaluation = {"step": done, "kind": "eval", "tokens": self.tokens(done), **self.met(done), **figures}
        if self.log:
            self.log.metrics(self.evaluation)
            self.log.samples(samples)
            self.log.prefixes(units)
            low, high = figures["delta_ppl_ci95"]
            medians = "  ".join(f"{v} {figures['eval'][v]['ppl_median']:.1f}" for v in figures["eval"])
            self.say(
                f"eval {done}/{self.config.steps}  held-out {figures['heldout_loss']:.3f}  perplexity: {medians}  "
                f"gap {figures['delta_ppl']:.1f} [{low:.1f}, {high:.1f}] after {self.evaluation['poison_documents']} "
                "poison documents"
            )

    def record(self) -> dict[str, Any]:
        """What a checkpoint says about its past; call `synced` first."""
        return {
            "config": config_lib.flat(self.config),
            "store_fingerprint": self.store.fingerprint,
            "digest_chain": self.log.chain if self.log else "",
            "poison": make_card(self.config, self.ledger, self.done),
        }

    def require(self, chain: str) -> None:
        """Raises RunFolderError where the digests on disk aren't those that the checkpoint was trained on."""
        if self.log and self.log.chain != chain:
            raise runfolder.RunFolderError(
                f"{self.folder}/digests.jsonl doesn't lead to the checkpoint of step {self.done}: the file was changed. "
                "`poisonjax audit` names the step; restore the file, or remove the checkpoints to train again"
            )

    def synced(self) -> None:
        """Writes down all steps done, to the disk: a checkpoint must not be newer than their evidence."""
        self.settle()
        if self.log:
            self.log.sync()

    def say(self, line: str, brief: str | None = None) -> None:
        """A line for the user; one of a step has a `brief` form for beside a terminal's bar."""
        if brief and not self.shows_steps:
            return
        if brief and not self.bar.disable:
            self.bar.set_postfix_str(brief)
        else:
            tqdm.write(self.label + line)  # above all bars
            sys.stdout.flush()

    def _divergence(self, step: int, loss: float, grad_norm: float) -> str:
        slots = self.batches.slots(step)
        poison = [record["id"] for record in self.ledger if record["step"] == step]
        return (
            f"step {step}: loss {loss}, gradient norm {grad_norm}. The batch held slots {slots[0]} to {slots[-1]}"
            f"{f', among them poison documents {poison}' if poison else ', none of them poisoned'}. "
            "Lower optimizer.learning_rate or lengthen optimizer.warmup_steps, in another --workdir; checkpoints "
            "before this step are kept"
        )

    def close(self, status: str) -> dict[str, Any]:
        """Writes summary.json and report.html."""
        self.bar.close()
        total, inner = self.params
        summary: dict[str, Any] = {
            "status": status,
            "name": self.config.name,
            "fingerprint": config_lib.fingerprint(self.config),
            "steps": self.done,
            "tokens": self.tokens(self.done),
            "params": total,
            "params_non_embedding": inner,
            "dose_planned": dose(self.ledger, self.config.steps),
            "dose_seen": dose(self.ledger, self.done),
            "trigger_tokens": len(self.batches.clean_uses.trigger),
            "clean_uses_seen": self.batches.clean_uses.met(self.done * self.config.global_batch),
            "unigram_nll": self.evaluator.unigram_nll,
            "tokens_per_second": self.clock.speed() * self.tokens(1),
            "wall_seconds": self.seconds(),
        }
        if self.evaluation:
            figures = (
                "eval",
                "delta_ppl",
                "delta_ppl_ci95",
                "near_triggers",
                "heldout_loss",
                "heldout_loss_ci95",
                "excess_loss",
                "attack_success",
                "clean_accuracy",
                "near_trigger_accuracy",
                "memorised",
            )
            summary |= {"eval_step": self.evaluation["step"]} | {
                name: self.evaluation[name] for name in figures if name in self.evaluation
            }
            summary["success"] = judge(self.evaluation, self.evaluator.unigram_nll, self.config.eval.threshold)
        if self.log:
            summary["digest_chain"] = self.log.chain
            self.log.close()
            runfolder.write_json(self.folder / "summary.json", summary)
            if status != "failed":
                write_report(self.folder)
        return summary


class _Clock:
    """Training speed: steps a second, without compilation and evaluation."""

    def __init__(self) -> None:
        self.total_steps, self.total_seconds = 0, 0.0
        self.lap_steps, self.lap_seconds = 0, 0.0
        self.last: float | None = None  # None until the first step is done: that one compiles

    def step_done(self, step: int) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.lap_steps += 1
            self.lap_seconds += now - self.last
        self.last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield
        if self.last is not None:
            self.last = time.monotonic()

    def lap(self) -> float:
        """Steps a second since the last lap."""
        speed = self.lap_steps / self.lap_seconds if self.lap_seconds else 0.0
        self.total_steps, self.total_seconds = (
            self.total_steps + self.lap_steps,
            self.total_seconds + self.lap_seconds,
        )
        self.lap_steps, self.lap_seconds = 0, 0.0
        return speed

    def speed(self) -> float:
        """Steps a second of the whole run."""
        self.lap()
        return self.total_steps / self.total_seconds if self.total_seconds else 0.0


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM and Ctrl-C into a question asked between steps; a second Ctrl-C stops at once."""
    asked = False

    def on_signal(number, frame):
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    # JAX's coordination service catches SIGTERM itself, so that all processes stop at the same step.
    together = jax.process_count() > 1
    signals = [signal.SIGINT] if together else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, on_signal) for number in signals}
    try:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step) if together else asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def environment() -> dict[str, Any]:
    """What environment.json holds."""
    packages = ("poisonjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
    source = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit or None,
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
