"""Runs a sweep on this machine: builds what the runs share, keeps `parallel` of them going, takes up what was left."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import ml_collections
from etils import epath

from poisonjax import processes
from poisonjax.files import write_json, write_whole
from poisonjax.run.folder import is_run
from poisonjax.run.heartbeat import Heartbeat, Taken
from poisonjax.sweep import grid
from poisonjax.sweep.board import Board, budget
from poisonjax.sweep.planned import PlannedRun, Sweep, SweepError
from poisonjax.sweep.searches import examples
from poisonjax.sweep.states import (
    FAILURE,
    LOG,
    RunStatus,
    decided,
    look,
    look_at_searches,
    require_own,
    search_status,
    status,
    steps_done,
)

PARENT = "POISONJAX_SWEEP_PARENT"  # process id of the launcher that a run belongs to
RUN = "POISONJAX_SWEEP_RUN"  # which run it means by its --index
STALLS = 3  # times that a run may stop at the same step before it counts as failed

Ended = Literal["done", "failed", "stopped"]


def claim(sweep: Sweep, workdir: Path) -> None:
    """Writes sweep.json; raises SweepError where the folder holds runs that this sweep doesn't have."""
    path = workdir / grid.FILE
    planned = {*(run.id for run in sweep.runs), *(of.id for of in sweep.searches)}
    if path.exists():
        there = json.loads(path.read_text())
        strange = [id for id in (*there["runs"], *there.get("searches", ())) if id not in planned]
        if strange:
            raise SweepError(
                f"{workdir} holds another sweep: its run {strange[0]} ({len(strange)} such) isn't in {sweep.spec}. "
                "Take another --workdir, or undo the change; runs may be added to a sweep, not changed"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    require_own(decided(sweep, workdir), workdir, training=True)
    record = json.dumps(grid.record(sweep), indent=2) + "\n"
    if not path.exists() or path.read_text() != record:  # array tasks may claim it at once
        write_whole(epath.Path(path), record, suffix=f"{os.getpid()}.partial")


def prepare(sweep: Sweep) -> None:
    """Builds each token store that the runs share, once."""
    from poisonjax.training.start import open_store

    stores: dict[str, ml_collections.ConfigDict] = {}
    for run in [*sweep.runs, *examples(sweep).values()]:
        stores.setdefault(run.config.corpus.store, run.config)
    for config in stores.values():
        open_store(config)


def train_one(
    sweep: Sweep, workdir: Path, index: int, train: Callable[[ml_collections.ConfigDict, str], object]
) -> None:
    """Trains the run of slot `index` in this process by `train(config, folder)`, as a cluster's array task or a child
    of `train_all`; what goes wrong is noted in the folder, and raised.

    Raises Taken where another process is at the run, or its dose isn't chosen yet: it isn't done, so look again.
    """
    from poisonjax.training.stop import LostProcess, Preempted

    sweep, states = look_at_searches(sweep, workdir)
    run = next((run for run in sweep.runs if run.slot == index), None)
    if run is None and not 0 <= index < sweep.slots:
        raise SweepError(f"--index {index}: {sweep.spec} has runs 0 to {sweep.slots - 1}")
    if (meant := os.environ.get(RUN)) and meant != (run and run.id):
        raise SweepError(
            f"--index {index}: {meant} was to be trained, but {sweep.spec} was changed since the sweep was started; "
            "stop it and start it again"
        )
    if run is None:
        _without_dose(sweep, states, index)
        return
    folder = workdir / run.id
    place = processes.resolve(os.environ)
    first = place is None or place.index == 0
    if status(folder, run).kind == "done":
        print(f"{run.id}: done already")
        return
    before = grid.parents(sweep).get(run.id)
    if before and (kind := status(workdir / before.id, before).kind) == "failed":
        raise SweepError(f"--index {index}: {run.id} begins from {before.id}, which failed")
    if before and kind != "done":
        raise Taken(f"{run.id} begins from {before.id}, which isn't done yet")
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


def _without_dose(sweep: Sweep, states: Mapping[str, RunStatus], index: int) -> None:
    """Of a slot that has no run (yet): says that its search needs no more, or raises."""
    of = next(of for of in sweep.searches if index in of.slots)
    said = search_status(of, sweep.runs, states)
    if said.state == "failed":
        raise SweepError(f"--index {index}: {said}")
    if said.state != "ended":
        raise Taken(f"--index {index}: its dose isn't chosen yet: {said}")
    print(f"--index {index}: not needed: {said}")


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
    if retry_failed:
        for run in decided(sweep, workdir).runs:
            (workdir / run.id / FAILURE).unlink(missing_ok=True)
    children: dict[str, subprocess.Popen] = {}  # by run
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free = list(range(parallel))
    places: dict[str, int] = {}
    stalls: dict[str, tuple[int, int]] = {}  # run -> (step at which it last stopped, how often it did there)
    states: dict[str, RunStatus] = {}
    parents = grid.parents(sweep)
    with _stopping() as stop, Board(sweep) as board:
        while True:
            for id, child in list(children.items()):
                if child.poll() is not None:
                    del children[id]
                    free.append(places.pop(id))
                    if child.returncode not in (0, restart_code) and not (workdir / id / FAILURE).exists():
                        reason = f"ended by signal {-child.returncode}" if child.returncode < 0 else "see its log"
                        write_json(workdir / id / FAILURE, {"error": reason})
                    elif child.returncode == restart_code and not stop.is_set():  # its watchdog, or a SIGTERM
                        done = steps_done(workdir / id)
                        last, times = stalls.get(id, (-1, 0))
                        stalls[id] = (done, times + 1 if done == last else 1)
                        if stalls[id][1] == STALLS:
                            error = f"stopped {STALLS} times at step {done} without going on: see {LOG}"
                            write_json(workdir / id / FAILURE, {"error": error})
            before, (sweep, states) = sweep, look(sweep, workdir, states)
            parents = parents if sweep is before else grid.parents(sweep)
            for id, parent in parents.items():
                if states[parent.id].kind == "failed" and states[id].kind == "pending":
                    states[id] = _fails_with(workdir / id, parent, states[id])
            board.show(sweep, states)
            if stop.is_set():
                for child in children.values():
                    child.terminate()
                for child in children.values():
                    child.wait()
                return "stopped"
            for run in _waiting(sweep, states, children, parents)[: len(free)]:
                place = free.pop(0)
                places[run.id] = place
                children[run.id] = _start(command(run.slot), workdir / run.id, run.id)
                share = len(cores) // parallel  # the same for all: on CPU a core is a device
                if parallel > 1 and share:
                    with contextlib.suppress(ProcessLookupError):  # it may have ended already
                        os.sched_setaffinity(children[run.id].pid, cores[place * share : (place + 1) * share])
            kinds = {state.kind for state in states.values()}
            if not children and kinds <= {"done", "failed"}:
                return "failed" if "failed" in kinds else "done"
            stop.wait(0.5)


def _fails_with(folder: Path, parent: PlannedRun, state: RunStatus) -> RunStatus:
    """Notes in a run's folder that what it was to begin from failed."""
    error = f"begins from {parent.id}, which failed"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILURE, {"error": error})
    return dataclasses.replace(state, kind="failed", detail=error)


def _waiting(
    sweep: Sweep,
    states: Mapping[str, RunStatus],
    children: Mapping[str, subprocess.Popen],
    parents: Mapping[str, PlannedRun],
) -> list[PlannedRun]:
    """Runs to train next, begun ones first; one that is to begin from another waits for it."""
    waiting = []
    for run in sweep.runs:
        kind, parent = states[run.id].kind, parents.get(run.id)
        ready = parent is None or states[parent.id].kind == "done"
        if run.id not in children and (kind == "partial" or (kind == "pending" and ready)):
            waiting.append(run)
    return sorted(waiting, key=lambda run: states[run.id].kind != "partial")


def train_populations(
    sweep: Sweep, workdir: Path, size: int, *, retry_failed: bool, trained: Callable[[Path], object]
) -> Ended:
    """Trains what isn't done in this process, up to `size` runs of one shape as one program; `trained` is told of each
    run's folder when its program ends."""
    from poisonjax.startup import start_jax
    from poisonjax.training.population import train_population
    from poisonjax.training.stop import Preempted

    sweep = decided(sweep, workdir)
    if retry_failed:
        for run in sweep.runs:
            (workdir / run.id / FAILURE).unlink(missing_ok=True)
    start_jax(size)  # on CPU a device a core
    print(f"{budget(sweep)}, in populations of up to {size}", flush=True)
    parts, tried = list[list[PlannedRun]](), set[str]()
    while parts or (parts := _populations(sweep := decided(sweep, workdir), size, tried)):
        part = parts.pop(0)  # those whose members are refused together come again, one by one
        tried |= {run.id for run in part}
        parents = grid.parents(sweep)
        with contextlib.ExitStack() as claims:
            claimed = []
            for run in part:
                state, parent = status(workdir / run.id, run), parents.get(run.id)
                before = status(workdir / parent.id, parent).kind if parent else "done"
                if parent and state.kind == "pending" and before == "failed":
                    _fails_with(workdir / run.id, parent, state)
                elif state.kind == "partial" or (state.kind == "pending" and before == "done"):
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
    kinds = {state.kind for state in look(sweep, workdir)[1].values()}
    if "failed" in kinds:
        return "failed"
    return "done" if kinds <= {"done"} else "stopped"  # others are at some of them


def _populations(sweep: Sweep, size: int, tried: Collection[str]) -> list[list[PlannedRun]]:
    """Of the earliest runs that weren't tried: parts of all that come as early, done or not, so that a sweep that goes
    on doesn't mix them anew."""
    from poisonjax.training.population import shape

    parents = grid.parents(sweep)

    def when(run: PlannedRun) -> tuple[int, int]:
        """(runs that it begins from, one after another; round of its search)."""
        parent = parents.get(run.id)
        return (when(parent)[0] + 1 if parent else 0, run.round)

    first = min((when(run) for run in sweep.runs if run.id not in tried), default=None)
    groups: dict[str, list[PlannedRun]] = {}
    for run in sweep.runs:
        if when(run) == first:
            groups.setdefault(json.dumps(shape(run.config), sort_keys=True), []).append(run)
    return [group[i : i + size] for _, group in sorted(groups.items()) for i in range(0, len(group), size)]


def _tell(trained: Callable[[Path], object], folders: Sequence[Path]) -> None:
    """However their program ended; what goes wrong with one page ends nothing else."""
    for folder in filter(is_run, folders):
        try:
            trained(folder)
        except Exception as error:
            print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr)


def _start(command: list[str], folder: Path, run: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {PARENT: str(os.getpid()), RUN: run},
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
