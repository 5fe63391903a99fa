"""How far each run of a sweep is, read from files alone, so that any number of launchers can share a folder."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from poisonjax import corpus
from poisonjax.files import parse_json
from poisonjax.run import RunFolder, RunFolderError, rows
from poisonjax.run.folder import is_run
from poisonjax.run.heartbeat import is_running
from poisonjax.sweep.grid import PlannedRun, Sweep, SweepError

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
    digests = folder / rows.DIGESTS
    done = digests.read_bytes().count(b"\n") if digests.exists() else 0
    if is_running(folder):
        return RunStatus("running", done, steps)
    if failure := _failure(folder):
        return RunStatus("failed", done, steps, failure["error"])
    return RunStatus("partial" if done else "pending", done, steps)


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
