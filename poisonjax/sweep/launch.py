"""Runs a sweep on this machine: builds what the runs share, keeps `parallel` of them going, takes up what was left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_collections
from etils import epath

from poisonjax import processes
from poisonjax.files import write_json, write_whole
from poisonjax.run.folder import is_run
from poisonjax.run.heartbeat import Heartbeat, Taken
from poisonjax.sweep import grid
from poisonjax.sweep.board import Board, budget
from poisonjax.sweep.grid import PlannedRun, Sweep, SweepError
from poisonjax.sweep.states import FAILURE, LOG, RunStatus, require_own, status

PARENT = "POISONJAX_SWEEP_PARENT"  # process id of the launcher that a run belongs to
STALLS = 3  # times that a run may stop at the same step before it counts as failed

Ended = Literal["done", "failed", "stopped"]


def claim(sweep: Sweep, workdir: Path) -> None:
    """Writes sweep.json; raises SweepError where the folder holds runs that this sweep doesn't have."""
    path = workdir / grid.FILE
    runs = {run.id for run in sweep.runs}
    if path.exists():
        strange = [id for id in json.loads(path.read_text())["runs"] if id not in runs]
        if strange:
            raise SweepError(
                f"{workdir} holds another sweep: its run {strange[0]} ({len(strange)} such) isn't in {sweep.spec}. "
                "Take another --workdir, or undo the change; runs may be added to a sweep, not changed"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    require_own(sweep, workdir, training=True)
    record = json.dumps(grid.record(sweep), indent=2) + "\n"
    if not path.exists() or path.read_text() != record:  # array tasks may claim it at once
        write_whole(epath.Path(path), record, suffix=f"{os.getpid()}.partial")


def prepare(sweep: Sweep) -> None:
    """Builds each token store that the runs share, once."""
    from poisonjax.training.start import open_store

    for store in dict.fromkeys(run.config.corpus.store for run in sweep.runs):
        open_store(next(run.config for run in sweep.runs if run.config.corpus.store == store))


def train_one(
    sweep: Sweep, workdir: Path, index: int, train: Callable[[ml_collections.ConfigDict, str], object]
) -> None:
    """Trains run `index` in this process by `train(config, folder)`, as a cluster's array task or a child of
    `train_all`; what goes wrong is noted in the folder, and raised.

    Raises Taken where another process is at the run: it isn't done, so look again.
    """
    if not 0 <= index < len(sweep.runs):
        raise SweepError(f"--index {index}: {sweep.spec} has runs 0 to {len(sweep.runs) - 1}")
    from poisonjax.training.stop import LostProcess, Preempted

    run = sweep.runs[index]
    folder = workdir / run.id
    place = processes.resolve(os.environ)
    first = place is None or place.index == 0
    if status(folder, run).kind == "done":
        print(f"{run.id}: done already")
        return
    before = grid.parents(sweep)[index]
    if (kind := _kind_of(sweep, workdir, before)) == "failed":
        raise SweepError(f"--index {index}: {run.id} begins from --index {before}, which failed")
    if kind != "done":
        raise Taken(f"{run.id} begins from --index {before}, which isn't done yet")
    parent = os.environ.get(PARENT)
    with Heartbeat(folder, int(parent) if parent else None) if first else contextlib.nullcontext():
        if first:
            (folder / FAILURE).unlink(missing_ok=True)
        try:
            train(run.config, str(folder))
        except Preempted:
            raise
        except Exception as error:
            if first and not (isinstance(error, LostProcess) and error.lost_another):
                write_json(folder / FAILURE, {"error": f"{type(error).__name__}: {error}"})
            raise


def _kind_of(sweep: Sweep, workdir: Path, parent: int | None) -> str:
    """How far a run is that another begins from; "done" where that begins from none of the sweep."""
    return "done" if parent is None else status(workdir / sweep.runs[parent].id, sweep.runs[parent]).kind


def train_all(
    sweep: Sweep,
    workdir: Path,
    command: Callable[[int], list[str]],
    *,
    restart_code: int,
    parallel: int,
    retry_failed: bool,
) -> Ended:
    """Trains every run that isn't done, each by a process of its own: `command(index)`, which exits with `restart_code`
    where it was stopped and saved."""
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
    parents = grid.parents(sweep)
    with _stopping() as stop, Board(sweep) as board:
        while True:
            for index, child in list(children.items()):
                if child.poll() is not None:
                    del children[index]
                    free.append(places.pop(index))
                    if child.returncode not in (0, restart_code) and not (folders[index] / FAILURE).exists():
                        reason = f"ended by signal {-child.returncode}" if child.returncode < 0 else "see its log"
                        write_json(folders[index] / FAILURE, {"error": reason})
                    elif child.returncode == restart_code and not stop.is_set():  # its watchdog, or a SIGTERM
                        done = status(folders[index], sweep.runs[index]).done
                        before, times = stalls.get(index, (-1, 0))
                        stalls[index] = (done, times + 1 if done == before else 1)
                        if stalls[index][1] == STALLS:
                            error = f"stopped {STALLS} times at step {done} without going on: see {LOG}"
                            write_json(folders[index] / FAILURE, {"error": error})
            states = [
                before if before and before.kind == "done" else status(folder, run)
                for folder, run, before in zip(folders, sweep.runs, states, strict=True)
            ]
            for index, parent in enumerate(parents):
                if parent is not None and states[parent].kind == "failed" and states[index].kind == "pending":
                    error = f"begins from {sweep.runs[parent].id}, which failed"
                    folders[index].mkdir(parents=True, exist_ok=True)
                    write_json(folders[index] / FAILURE, {"error": error})
                    states[index] = status(folders[index], sweep.runs[index])
            board.show(states)
            if stop.is_set():
                for child in children.values():
                    child.terminate()
                for child in children.values():
                    child.wait()
                return "stopped"
            for index in _waiting(states, children, parents)[: len(free)]:
                place = free.pop(0)
                places[index] = place
                children[index] = _start(command(index), folders[index])
                share = len(cores) // parallel  # the same for all: on CPU a core is a device
                if parallel > 1 and share:
                    with contextlib.suppress(ProcessLookupError):  # it may have ended already
                        os.sched_setaffinity(children[index].pid, cores[place * share : (place + 1) * share])
            if not children and all(s.kind in ("done", "failed") for s in states):
                return "failed" if any(s.kind == "failed" for s in states) else "done"
            stop.wait(0.5)


def _waiting(
    states: Sequence[RunStatus], children: dict[int, subprocess.Popen], parents: Sequence[int | None]
) -> list[int]:
    """Runs to train next, begun ones first; one that is to begin from another waits for it."""
    ready = [parent is None or states[parent].kind == "done" for parent in parents]
    waiting = [
        i
        for i, s in enumerate(states)
        if (s.kind == "partial" or (s.kind == "pending" and ready[i])) and i not in children
    ]
    return sorted(waiting, key=lambda i: states[i].kind != "partial")


def train_populations(
    sweep: Sweep, workdir: Path, size: int, *, retry_failed: bool, trained: Callable[[Path], object]
) -> Ended:
    """Trains what isn't done in this process, up to `size` runs of one shape as one program; `trained` is told of each
    run's folder when its program ends."""
    from poisonjax.startup import start_jax
    from poisonjax.training.population import shape, train_population
    from poisonjax.training.stop import Preempted

    groups: dict[tuple[int, str], list[PlannedRun]] = {}
    generations: list[int] = []  # parents stand before their children
    parents = grid.parents(sweep)
    for run, before in zip(sweep.runs, parents, strict=True):
        if retry_failed:
            (workdir / run.id / FAILURE).unlink(missing_ok=True)
        generations.append(0 if before is None else generations[before] + 1)
        groups.setdefault((generations[-1], json.dumps(shape(run.config), sort_keys=True)), []).append(run)
    # Parts are of all runs, done or not, so that a sweep that goes on doesn't mix them anew.
    parts = [group[i : i + size] for _, group in sorted(groups.items()) for i in range(0, len(group), size)]
    start_jax(size)  # on CPU a device a core
    print(f"{budget(sweep)}, in {len(parts)} populations", flush=True)
    parent_of = {run.id: before for run, before in zip(sweep.runs, parents, strict=True)}
    while parts:  # those whose members are refused together come again, one by one
        part = parts.pop(0)
        with contextlib.ExitStack() as claims:
            claimed = []
            for run in part:
                kind, parent = status(workdir / run.id, run).kind, _kind_of(sweep, workdir, parent_of[run.id])
                if kind == "pending" and parent == "failed":
                    (workdir / run.id).mkdir(parents=True, exist_ok=True)
                    write_json(workdir / run.id / FAILURE, {"error": "begins from a run which failed"})
                elif kind == "partial" or (kind == "pending" and parent == "done"):
                    with contextlib.suppress(Taken):
                        claims.enter_context(Heartbeat(workdir / run.id))
                        claimed.append(run)
            if not claimed:
                continue
            try:
                try:
                    train_population([run.config for run in claimed], [str(workdir / run.id) for run in claimed])
                finally:
                    _tell(trained, [workdir / run.id for run in claimed])
            except Preempted as stop:
                print(stop, file=sys.stderr)
                return "stopped"
            except Exception as error:  # the other parts go on
                if isinstance(error, ValueError) and len(claimed) > 1:
                    parts[:0] = [[run] for run in claimed]
                    continue
                also = f"{claimed[0].id} and {len(claimed) - 1} more"
                print(f"{also}: {type(error).__name__}: {error}", file=sys.stderr)
                why = f"in a population of {len(claimed)}: {error}; train it alone"
                for run in claimed:
                    write_json(workdir / run.id / FAILURE, {"error": why})
    return "failed" if any(status(workdir / run.id, run).kind == "failed" for run in sweep.runs) else "done"


def _tell(trained: Callable[[Path], object], folders: Sequence[Path]) -> None:
    """However their program ended; what goes wrong with one page ends nothing else."""
    for folder in filter(is_run, folders):
        try:
            trained(folder)
        except Exception as error:
            print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr)


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {PARENT: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is this process's; it asks the others to save
        )


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
