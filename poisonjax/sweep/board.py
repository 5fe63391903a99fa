"""A sweep for people: a live table on a terminal; elsewhere a line whenever a run's status changes."""

import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from poisonjax.corpus.vocabulary import vocabulary_size
from poisonjax.evaluation.words import outcome
from poisonjax.model.flops import train_flops_per_token
from poisonjax.sweep.grid import PlannedRun, Sweep
from poisonjax.sweep.states import RunStatus


class Board:
    """What `show` was last told, with the time that is left by the FLOPs done."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.flops = [flops(run) for run in sweep.runs]
        self.console = Console()
        self.began, self.before = time.monotonic(), -1.0
        self.kinds: list[str] = []
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Board":
        print(budget(self.sweep), flush=True)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def eta(self, states: list[RunStatus]) -> str:
        done = sum(f * s.done / s.steps for f, s in zip(self.flops, states, strict=True))
        self.before = done if self.before < 0 else self.before
        progress = done - self.before
        if progress <= 0:
            return "?"
        left = (sum(self.flops) - done) * (time.monotonic() - self.began) / progress
        return f"{left / 60:.0f} min"

    def show(self, states: list[RunStatus]) -> None:
        eta = self.eta(states)
        if self.live:
            self.live.update(table(self.sweep, states, eta), refresh=True)
            return
        kinds = [s.kind for s in states]
        for run, s, kind in zip(self.sweep.runs, states, self.kinds or ["pending"] * len(kinds), strict=True):
            if s.kind != kind:
                print(f"{kinds.count('done')}/{len(kinds)} done, {eta} left; {run.id}: {_brief(s)}", flush=True)
        self.kinds = list(kinds)


def _brief(s: RunStatus) -> str:
    if s.summary is None:
        return f"{s.kind}{f' at step {s.done} of {s.steps}' if s.done else ''}{f' ({s.detail})' if s.detail else ''}"
    verdict = "backdoored" if s.summary["success"]["value"] else "not backdoored"
    return f"done, {verdict}, {outcome(s.summary, 'gap')}"


def flops(run: PlannedRun) -> float:
    """What a run's training asks for; 0 where its vocabulary isn't known before its store is built."""
    c = run.config
    if not (vocabulary := vocabulary_size(c.corpus)):
        return 0.0
    return train_flops_per_token(c.model, c.seq_len, vocabulary) * c.steps * c.global_batch * c.seq_len


def budget(sweep: Sweep) -> str:
    """What the whole sweep asks for, in a line."""
    tokens = sum(run.config.steps * run.config.global_batch * run.config.seq_len for run in sweep.runs)
    return (
        f"{sweep.spec}: {len(sweep.runs)} runs, {tokens:,} tokens, {sum(map(flops, sweep.runs)):.3g} FLOPs of training"
    )


def table(sweep: Sweep, states: list[RunStatus], eta: str = "") -> Table:
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
