"""A sweep for people: a live table on a terminal; elsewhere a line whenever a run's status changes."""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from poisonjax.corpus.vocabulary import vocabulary_size
from poisonjax.evaluation.words import outcome
from poisonjax.model.flops import train_flops_per_token
from poisonjax.sweep.planned import PlannedRun, Sweep
from poisonjax.sweep.searches import examples
from poisonjax.sweep.states import RunStatus, search_status


class Board:
    """What `show` was last told, with the time that is left by the FLOPs done."""

    def __init__(self, sweep: Sweep):
        self.about, self.flops = budget(sweep), {run.id: flops(run) for run in sweep.runs}
        self.all = sum(map(flops, _most(sweep)))
        self.console = Console()
        self.began, self.before = time.monotonic(), -1.0
        self.kinds: dict[str, str] = {}
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Board":
        print(self.about, flush=True)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def eta(self, sweep: Sweep, states: Mapping[str, RunStatus]) -> str:
        self.flops |= {run.id: flops(run) for run in sweep.runs if run.id not in self.flops}
        done = sum(self.flops[run.id] * states[run.id].done / states[run.id].steps for run in sweep.runs)
        self.before = done if self.before < 0 else self.before
        progress = done - self.before
        if progress <= 0:
            return "?"
        left = (self.all - done) * (time.monotonic() - self.began) / progress
        return f"{'at most ' if sweep.searches else ''}{left / 60:.0f} min"

    def show(self, sweep: Sweep, states: Mapping[str, RunStatus]) -> None:
        eta = self.eta(sweep, states)
        if self.live:
            self.live.update(table(sweep, states, eta), refresh=True)
            return
        kinds = {id: state.kind for id, state in states.items()}
        done = list(kinds.values()).count("done")
        for run in sweep.runs:
            if kinds[run.id] != self.kinds.get(run.id, "pending"):
                print(f"{done}/{_runs(sweep)} done, {eta} left; {run.id}: {_brief(states[run.id])}", flush=True)
                for of in sweep.searches:
                    if of.id == run.search and kinds[run.id] == "done":
                        print(search_status(of, sweep.runs, states), flush=True)
        self.kinds = dict[str, str](kinds)


def _runs(sweep: Sweep) -> str:
    """How many there are, where doses are searched for at most."""
    return f"{'at most ' if sweep.searches else ''}{sweep.slots}"


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


def _most(sweep: Sweep) -> list[PlannedRun]:
    """As many runs as the sweep may have, of the shapes that they have."""
    stated, like = [run for run in sweep.runs if not run.search], examples(sweep)
    return [*stated, *(like[of.id] for of in sweep.searches for _ in range(of.search.runs))]


def budget(sweep: Sweep) -> str:
    """What the whole sweep asks for, in a line."""
    runs = _most(sweep)
    tokens = sum(run.config.steps * run.config.global_batch * run.config.seq_len for run in runs)
    return f"{sweep.spec}: {_runs(sweep)} runs, {tokens:,} tokens, {sum(map(flops, runs)):.3g} FLOPs of training"


def table(sweep: Sweep, states: Mapping[str, RunStatus], eta: str = "") -> Group:
    """The runs that are at work or failed, and the count of all; what searches know."""
    kinds = [state.kind for state in states.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    made = Table(title=f"{sweep.spec}: {counts}{f', {eta} left' if eta else ''}", title_justify="left")
    for name in ("run", "state", "steps", ""):
        made.add_column(name)
    for run in sweep.runs:
        state = states[run.id]
        if len(states) <= 20 or state.kind not in ("done", "pending"):
            bar = ProgressBar(state.steps, state.done, width=20)
            made.add_row(run.id, _brief(state), f"{state.done}/{state.steps}", bar)
    return Group(made, *(Text(str(search_status(of, sweep.runs, states))) for of in sweep.searches))
