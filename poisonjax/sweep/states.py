"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from poisonjax import corpus
from poisonjax.evaluation.statistics import attacked
from poisonjax.files import parse_json
from poisonjax.run import RunFolder, RunFolderError, rows
from poisonjax.run.folder import is_run
from poisonjax.run.heartbeat import is_running
from poisonjax.sweep import searches
from poisonjax.sweep.planned import PlannedRun, PlannedSearch, Sweep, SweepError

Kind = Literal["pending", "running", "partial", "done", "failed"]

FAILURE, LOG = "failure.json", "train.log"


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is: `partial` has begun and nobody is at it, so the next launch resumes it."""

    kind: Kind
    done: int  # optimizer steps
    steps: int
    detail: str = ""
    summary: rows.Summary | None = None


def status(folder: Path, run: PlannedRun) -> RunStatus:
    """What `folder` says of the run; one that is damaged has failed."""
    steps = run.config.steps
    there = RunFolder(folder) if is_run(folder) else None
    try:
        if there and (other := _another(there, run)):
            return RunStatus("failed", 0, steps, other)
        summary = there.summary if there else None
    except RunFolderError as error:
        return RunStatus("failed", 0, steps, str(error))
    if summary and summary["status"] == "finished":
        return RunStatus("done", steps, steps, "", summary)
    done = steps_done(folder)
    if is_running(folder):
        return RunStatus("running", done, steps)
    if failure := _failure(folder):
        return RunStatus("failed", done, steps, failure["error"])
    return RunStatus("partial" if done else "pending", done, steps)


def steps_done(folder: Path) -> int:
    """Of the run in a folder."""
    digests = folder / rows.DIGESTS
    return digests.read_bytes().count(b"\n") if digests.exists() else 0


def success(run: PlannedRun, state: RunStatus) -> bool | None:
    """Whether a run was attacked, as the report counts it; None where it isn't done."""
    return None if state.summary is None else attacked(state.summary, run.config.eval.threshold)


def look(
    sweep: Sweep, workdir: Path, before: Mapping[str, RunStatus] | None = None
) -> tuple[Sweep, dict[str, RunStatus]]:
    """The sweep with the runs whose doses what lies in its folder has chosen, and how far each of its runs is, by id.
    Those that were done `before`, at the last look, aren't read again; doses are chosen again where others are."""
    known = {id: state for id, state in (before or {}).items() if state.kind == "done"}
    states = {run.id: known.get(run.id) or status(workdir / run.id, run) for run in sweep.runs}
    if sweep.searches and (not before or any(states[id].kind == "done" for id in states.keys() - known.keys())):
        sweep, chosen = look_at_searches(sweep, workdir, states)
        states = {run.id: chosen.get(run.id) or states[run.id] for run in sweep.runs}
    return sweep, states


def look_at_searches(
    sweep: Sweep, workdir: Path, states: Mapping[str, RunStatus] | None = None
) -> tuple[Sweep, dict[str, RunStatus]]:
    """The same, of runs of searches alone; `states` are known, and not read again."""
    if not sweep.searches:
        return sweep, {}
    found: dict[str, RunStatus] = {}

    def state(run: PlannedRun) -> RunStatus:
        if run.id not in found:
            found[run.id] = (states or {}).get(run.id) or status(workdir / run.id, run)
        return found[run.id]

    there = {path.name for path in workdir.iterdir()} if workdir.exists() else frozenset()
    sweep = searches.decided(sweep, lambda run: success(run, state(run)), there)
    return sweep, {run.id: state(run) for run in sweep.runs if run.search}


def decided(sweep: Sweep, workdir: Path) -> Sweep:
    """The sweep with the runs whose doses what lies in its folder has chosen."""
    return look_at_searches(sweep, workdir)[0]


@dataclasses.dataclass(frozen=True)
class SearchStatus:
    """What a search knows, and what its next runs are for."""

    search: str
    runs: int  # that are done
    at_most: int
    n50: float | None  # documents; None before any run is done
    ci95: tuple[float, float]
    within: float  # factor within which N50 is wanted
    now: list[int]  # doses of runs that were chosen and aren't done
    expected: float | None  # factor within which N50 should be known after these
    failed: list[str]  # of these runs
    ended: str  # why no more runs are wanted; "" while some are

    @property
    def state(self) -> str:
        """In a word."""
        return "failed" if self.failed else "ended" if self.ended else "searching"

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        bounds = [bound if math.isfinite(bound) else None for bound in self.ci95]
        return {"search": self.search, "state": self.state, **dataclasses.asdict(self), "ci95": bounds}

    def __str__(self) -> str:
        low, high = self.ci95
        known = (high / low) ** 0.5 if low else math.inf
        n50 = (
            f"N50 {self.n50:,.0f} [{low:,.0f}, {high:,.0f}], within {known:.2f} times,"
            if self.n50
            else "N50 not known yet"
        )
        said = f"{self.search}: {n50} after {self.runs} of at most {self.at_most} runs; "
        if self.failed:
            return f"{said}waits for {', '.join(self.failed)}, which failed: see --retry-failed"
        if self.ended:
            return f"{said}ended: {self.ended}"
        if not self.now:
            return f"{said}its next doses are about to be chosen"
        doses = " and ".join(f"{dose:,}" for dose in self.now)
        return f"{said}now at {doses}, after which {self.expected:.2f} times are expected ({self.within:g} wanted)"


def search_status(of: PlannedSearch, runs: Sequence[PlannedRun], states: Mapping[str, RunStatus]) -> SearchStatus:
    """Of one of a sweep's; `runs` are all of the sweep's."""
    mine = [run for run in runs if run.search == of.id]
    results = searches.results_of(mine, lambda run: success(run, states[run.id]))
    search, known = of.search, of.search.known(results)
    waiting = [run for run in mine if states[run.id].summary is None]
    now = [run.config.poison.documents for run in waiting]
    ended = ""
    if not waiting and search.ended(results):
        ended = "outside of the range" if search.outside(known) else "as near as wanted"
        ended = ended if search.outside(known) or search.told(known) else "all runs spent"
    return SearchStatus(
        of.name,
        len(results),
        search.runs,
        known.n50 if results else None,
        known.ci95,
        search.within,
        now,
        search.expected(results, now) if now else None,
        [run.id for run in waiting if states[run.id].kind == "failed"],
        ended,
    )


def require_own(sweep: Sweep, workdir: Path, *, training: bool = False) -> None:
    """Raises SweepError where a folder holds another run than the sweep plans there, or runs that share a token store
    were trained on different ones: their outcomes would be counted as what they aren't. Before `training`, the store
    that lies there now must be the same too."""
    stores: dict[str, tuple[str, str]] = {}  # path -> (fingerprint, who says so)

    def require_same(path: str, fingerprint: str, who: str) -> None:
        there, first = stores.setdefault(path, (fingerprint, who))
        if fingerprint != there:
            raise SweepError(
                f"the token store {path} was {there[:12]} for {first}, and is {fingerprint[:12]} for {who}: it was "
                "built anew midway. Bring the former back, or train all runs again in another --workdir"
            )

    for run in sweep.runs:
        if not is_run(workdir / run.id) or damage(workdir / run.id):
            continue
        there = RunFolder(workdir / run.id)
        if other := _another(there, run):
            raise SweepError(f"{there.path} {other}: remove it, or move it back")
        require_same(run.config.corpus.store, there.record["store_fingerprint"], run.id)
    for path in {run.config.corpus.store for run in sweep.runs} if training else ():
        if corpus.exists(path):
            require_same(path, corpus.TokenStore(path).fingerprint, "what lies there now")


def damage(folder: Path) -> str:
    """What is wrong with a run's files that all others' are read with; "" where nothing is."""
    try:
        there = RunFolder(folder)
        _, _, _ = there.config, there.summary, there.table()
    except RunFolderError as error:
        return str(error)
    return ""


def require_whole(sweep: Sweep, workdir: Path) -> None:
    """Raises SweepError where the folder holds runs of a larger grid: what is written of this one would replace it."""
    planned = {run.id for run in sweep.runs}
    others = sorted(path.parent.name for path in workdir.glob(f"*/{rows.CONFIG}") if path.parent.name not in planned)
    if others:
        raise SweepError(
            f"{workdir} holds runs that this sweep doesn't plan: {', '.join(others[:5])}"
            f"{f' and {len(others) - 5} more' if len(others) > 5 else ''}. Give the config that planned them, or move "
            "them away"
        )


def _another(there: RunFolder, run: PlannedRun) -> str | None:
    if there.record["fingerprint"] == run.fingerprint:
        return None
    return f"holds another run ({there.config.name}, {there.record['fingerprint'][:8]})"


def _failure(folder: Path) -> dict[str, Any]:
    try:
        failure = parse_json((folder / FAILURE).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        failure = None
    told = isinstance(failure, dict) and isinstance(failure.get("error"), str)
    return failure if told else {"error": f"{folder / FAILURE} is damaged: remove it to train the run again"}
