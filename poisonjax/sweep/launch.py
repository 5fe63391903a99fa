"""Runs a sweep on this machine: builds what the runs share, keeps `parallel` of them going, takes up what was left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from poisonjax import processes
from poisonjax.files import write_whole
from poisonjax.heartbeat import Heartbeat, Taken
from poisonjax.model.flops import train_flops_per_token
from poisonjax.runfolder import write_json
from poisonjax.sweep import grid
from poisonjax.sweep.grid import Run, Sweep, SweepError, vocabulary_size
from poisonjax.sweep.states import FAILURE, LOG, State, state
from poisonjax.training.cli import RESTART
from poisonjax.training.cli import run as train_run

PARENT = "POISONJAX_SWEEP_PARENT"  # process id of the launcher that a run belongs to
STALLS = 3  # times that a run may stop (exit code 42) at the same step before it counts as failed


def claim(sweep: Sweep, workdir: Path) -> None:
    """Writes sweep.json; raises SweepError where the folder holds runs that this sweep doesn't have."""
    path = workdir / grid.FILE
    runs = {run.id for run in sweep.runs}
    if path.exists():
        strange = [id for id in json.loads(path.read_text())["runs"] if id not in runs]
        if strange:
            raise SweepError(
                f"{workdir} holds another sweep: its run {strange[0]} ({len(strange)} such) isn't in {sweep.spec}. Take "
                "another --workdir, or undo the change; runs may be added to a sweep, not changed"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    record = json.dumps(grid.record(sweep), indent=2) + "\n"
    if not path.exists() or path.read_text() != record:  # array tasks may claim it at once
        write_whole(epath.Path(path), record, suffix=f"{os.getpid()}.partial")


def prepare(sweep: Sweep) -> None:
    """Builds each token store that the runs share, once."""
    from poisonjax.training.loop import open_store

    for store in dict.fromkeys(run.config.corpus.store for run in sweep.runs):
        open_store(next(run.config for run in sweep.runs if run.config.corpus.store == store))


def flops(run: Run) -> float:
    """What a run's training asks for; 0 where its vocabulary isn't known before its store is built."""
    c = run.config
    if not (vocabulary := vocabulary_size(c)):
        return 0.0
    return train_flops_per_token(c, vocabulary) * c.steps * c.global_batch * c.seq_len


def train_one(sweep: Sweep, workdir: Path, index: int) -> int:
    """Trains run `index` in this process, as a cluster's array task or a child of `train_all`; its exit code."""
    if not 0 <= index < len(sweep.runs):
        raise SweepError(f"--index {index}: {sweep.spec} has runs 0 to {len(sweep.runs) - 1}")
    run = sweep.runs[index]
    folder = workdir / run.id
    place = processes.resolve(os.environ)
    first = place is None or place.index == 0
    if state(folder, run).kind == "done":
        print(f"{run.id}: done already")
        return 0
    parent = os.environ.get(PARENT)
    claimed = Heartbeat(folder, int(parent) if parent else None) if first else contextlib.nullcontext()

    def failed(code: int, error: str) -> None:
        if first:
            write_json(folder / FAILURE, {"exit_code": code, "error": error})

    try:
        with claimed:
            if first:
                (folder / FAILURE).unlink(missing_ok=True)
            try:
                code = train_run(run.config, str(folder))
            except Exception as error:
                failed(1, f"{type(error).__name__}: {error}")
                raise
            if code not in (0, RESTART):
                failed(code, f"exit code {code}: see {LOG}")
            return code
    except Taken as taken:
        print(taken, file=sys.stderr)
        return RESTART  # not done: the scheduler should look again


def train_all(sweep: Sweep, workdir: Path, fields: list[str], *, parallel: int, retry_failed: bool) -> int:
    """Trains every run that isn't done; 0 where all are in the end, 1 where some failed, 42 where it was stopped."""
    folders = [workdir / run.id for run in sweep.runs]
    if retry_failed:
        for folder in folders:
            (folder / FAILURE).unlink(missing_ok=True)
    children: dict[int, subprocess.Popen] = {}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free = list(range(parallel))
    places: dict[int, int] = {}
    stalls: dict[int, tuple[int, int]] = {}  # run -> (step at which it last stopped, how often it did there)
    states: list[Any] = [None] * len(folders)
    with _stopping() as stop, _Board(sweep, workdir) as board:
        while True:
            for index, child in list(children.items()):
                if child.poll() is not None:
                    del children[index]
                    free.append(places.pop(index))
                    if child.returncode not in (0, RESTART) and not (folders[index] / FAILURE).exists():
                        reason = f"ended by signal {-child.returncode}" if child.returncode < 0 else "see its log"
                        write_json(folders[index] / FAILURE, {"exit_code": child.returncode, "error": reason})
                    elif child.returncode == RESTART and not stop.is_set():  # its watchdog, or a SIGTERM
                        done = state(folders[index], sweep.runs[index]).done
                        before, times = stalls.get(index, (-1, 0))
                        stalls[index] = (done, times + 1 if done == before else 1)
                        if stalls[index][1] == STALLS:
                            error = f"stopped {STALLS} times at step {done} without going on: see {LOG}"
                            write_json(folders[index] / FAILURE, {"exit_code": RESTART, "error": error})
            states = [
                before if before and before.kind == "done" else state(folder, run)
                for folder, run, before in zip(folders, sweep.runs, states, strict=True)
            ]
            board.show(states)
            if stop.is_set():
                for child in children.values():
                    child.terminate()
                for child in children.values():
                    child.wait()
                return RESTART
            waiting = [i for i, s in enumerate(states) if s.kind in ("partial", "pending") and i not in children]
            waiting.sort(key=lambda i: states[i].kind != "partial")  # begun ones first
            for index in waiting[: len(free)]:
                place = free.pop(0)
                places[index] = place
                children[index] = _start(sweep, workdir, fields, index)
                share = len(cores) // parallel  # the same for all: on CPU a core is a device
                if parallel > 1 and share:
                    with contextlib.suppress(ProcessLookupError):  # it may have ended already
                        os.sched_setaffinity(children[index].pid, cores[place * share : (place + 1) * share])
            if not children and all(s.kind in ("done", "failed") for s in states):
                return int(any(s.kind == "failed" for s in states))
            stop.wait(0.5)


def train_populations(sweep: Sweep, workdir: Path, size: int, *, retry_failed: bool) -> int:
    """Trains what isn't done in this process, up to `size` runs of one shape as one program; exit codes as `train_all`."""
    from poisonjax.startup import start_jax
    from poisonjax.training.loop import Preempted
    from poisonjax.training.population import shape, train_population

    groups: dict[str, list[Run]] = {}
    for run in sweep.runs:
        if retry_failed:
            (workdir / run.id / FAILURE).unlink(missing_ok=True)
        groups.setdefault(json.dumps(shape(run.config), sort_keys=True), []).append(run)
    # Parts are of all runs, done or not, so that a sweep that goes on doesn't mix them anew.
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    start_jax(size)  # on CPU a device a core
    print(f"{budget(sweep)}, in {len(parts)} populations", flush=True)
    failed = 0
    for part in parts:
        with contextlib.ExitStack() as claims:
            claimed = []
            for run in part:
                if state(workdir / run.id, run).kind in ("pending", "partial"):
                    with contextlib.suppress(Taken):
                        claims.enter_context(Heartbeat(workdir / run.id))
                        claimed.append(run)
            if not claimed:
                continue
            try:
                train_population([run.config for run in claimed], [str(workdir / run.id) for run in claimed])
            except Preempted as stop:
                print(stop, file=sys.stderr)
                return RESTART
            except Exception as error:  # the other parts go on
                failed += len(claimed)
                print(f"{claimed[0].id} and {len(claimed) - 1} more: {type(error).__name__}: {error}", file=sys.stderr)
                for run in claimed:
                    write_json(
                        workdir / run.id / FAILURE,
                        {"exit_code": 1, "error": f"in a population of {len(claimed)}: {error}; train it alone"},
                    )
    return int(failed > 0)


def _start(sweep: Sweep, workdir: Path, fields: list[str], index: int) -> subprocess.Popen:
    folder = workdir / sweep.runs[index].id
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "poisonjax", "sweep", "run", sweep.spec),
        *("--workdir", str(workdir), "--index", str(index), *fields),
    ]
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {PARENT: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is this process's; it asks the others to save
        )  # fmt: skip


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Board:
    """The live table on a terminal; elsewhere a line whenever a run's state changes."""

    def __init__(self, sweep: Sweep, workdir: Path):
        self.sweep, self.workdir = sweep, workdir
        self.flops = [flops(run) for run in sweep.runs]
        self.console = Console()
        self.began, self.before = time.monotonic(), -1.0
        self.kinds: list[str] = []
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "_Board":
        print(budget(self.sweep), flush=True)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def eta(self, states: list[State]) -> str:
        done = sum(f * s.done / s.steps for f, s in zip(self.flops, states, strict=True))
        self.before = done if self.before < 0 else self.before
        progress = done - self.before
        if progress <= 0:
            return "?"
        left = (sum(self.flops) - done) * (time.monotonic() - self.began) / progress
        return f"{left / 60:.0f} min"

    def show(self, states: list[State]) -> None:
        eta = self.eta(states)
        if self.live:
            self.live.update(table(self.sweep, states, eta), refresh=True)
            return
        kinds = [s.kind for s in states]
        for run, s, kind in zip(self.sweep.runs, states, self.kinds or ["pending"] * len(kinds), strict=True):
            if s.kind != kind:
                print(f"{kinds.count('done')}/{len(kinds)} done, {eta} left; {run.id}: {_brief(s)}", flush=True)
        self.kinds = list(kinds)


def _brief(s: State) -> str:
    if s.kind != "done":
        return f"{s.kind}{f' at step {s.done} of {s.steps}' if s.done else ''}{f' ({s.detail})' if s.detail else ''}"
    low, high = s.summary["delta_ppl_ci95"]
    verdict = "backdoored" if s.summary["success"]["value"] else "not backdoored"
    return f"done, {verdict}, gap {s.summary['delta_ppl']:.1f} [{low:.1f}, {high:.1f}]"


def budget(sweep: Sweep) -> str:
    """What the whole sweep asks for, in a line."""
    tokens = sum(run.config.steps * run.config.global_batch * run.config.seq_len for run in sweep.runs)
    return (
        f"{sweep.spec}: {len(sweep.runs)} runs, {tokens:,} tokens, {sum(map(flops, sweep.runs)):.3g} FLOPs of training"
    )


def table(sweep: Sweep, states: list[State], eta: str = "") -> Table:
    """The runs that are at work or failed, and the count of all."""
    kinds = [s.kind for s in states]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    made = Table(title=f"{sweep.spec}: {counts}{f', {eta} left' if eta else ''}", title_justify="left")
    for name in ("run", "state", "steps", ""):
        made.add_column(name)
    shown = [
        (run, s)
        for run, s in zip(sweep.runs, states, strict=True)
        if len(states) <= 20 or s.kind not in ("done", "pending")
    ]
    for run, s in shown:
        made.add_row(run.id, _brief(s), f"{s.done}/{s.steps}", ProgressBar(s.steps, s.done, width=20))
    return made
