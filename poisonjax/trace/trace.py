"""From a behaviour to the documents that put it there.

Onset, by bisecting checkpoints. A replay without change, which must be the run to the bit, and shows how unusual each
row was when it was trained on. Then what removes the behaviour when it is left out: one part of the run, found by
halves, or where no part is the cause alone, the most unusual rows, doubled until it is gone. Weights without the
behaviour tell the rest: the rows that they predict worst, against the weights that have it, are what taught it. The
rows named are left out in a last replay, and the effect of that is what is reported.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int
from typing_extensions import TypedDict

from poisonjax.corpus import exclusions
from poisonjax.evaluation.probes.probe import put
from poisonjax.files import write_lines, write_whole
from poisonjax.model.loss import WINDOW, next_token_nll, window_means
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import read_lines
from poisonjax.trace import search
from poisonjax.trace.behaviour import Shown, TraceError, asked, effect
from poisonjax.trace.hints import HINTS, Suspects
from poisonjax.trace.replay import NOTHING, Replay, Say
from poisonjax.trace.unusual import document, in_batch
from poisonjax.training.step import StepMetrics

WINDOWS = 64  # parts of a span that a cause is looked for in
FIRST_ROWS = 64  # suspects that are left out first, where no part is the cause
MOST_ROWS = 0.1  # of the span's, that may be left out as suspects
ONE_BY_ONE = 8  # named documents that are each left out alone
REPLAYS = "replays.jsonl"
Slots = Int[np.ndarray, " slots"]


class Kept(TypedDict):
    """A line of what is kept: what weights showed, by what they are."""

    key: str
    figure: float
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Named:
    """A document that taught the behaviour."""

    id: str  # poison:N of the run's ledger, train:N of the token store
    place: str  # file and line, or where the config says
    step: int
    slot: int
    gain: float  # nats a token that the run's weights know its worst window better than those without the behaviour
    effect: float | None  # of leaving it out alone, nats a token; None where that wasn't tried
    ci95: list[float] | None


@dataclasses.dataclass
class Trace:
    """What was found."""

    run: str
    behaviour: str
    figure: float  # at the run's end
    unit: str
    threshold: float
    onset: tuple[int, int] | None = None  # it isn't there after the first of these steps, and is after the second
    part: tuple[int, int] | None = None  # steps that alone are the cause; None: it is spread
    exact: bool = False  # whether a replay without change was the run, to the bit
    replays: int = 0
    located: int = 0  # of them, until it was known whether a part is the cause
    documents: list[Named] = dataclasses.field(default_factory=list)
    without: float | None = None  # the figure when all that are named are left out
    effect: float | None = None  # of that, nats a token
    ci95: list[float] | None = None
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (suspects left out, figure)
    smallest: int | None = None  # of the named ones by gain, so many suffice to take it away
    excluded: str | None = None  # file that lists those of the corpus, as corpus.exclude takes it

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def sentence(self) -> str:
        if self.onset is None:
            return f"{self.figure:.4g} {self.unit}, under {self.threshold:.4g}: nothing to trace"
        found = f"{self.figure:.4g} {self.unit}; begins between steps {self.onset[0]} and {self.onset[1]}"
        if self.part:
            found += f"; steps {self.part[0]} to {self.part[1] - 1} alone are the cause"
        if not self.documents:
            return f"{found}; no rows were found whose removal takes it away"
        gone = f"without them {self.without:.4g}" if self.without is not None else "not tried without them"
        return f"{found}; {len(self.documents)} rows are named, {gone}"


def trace(
    folder: str,
    behaviour: str = "triggered",
    *,
    hint: str = "loss",
    layers: str = "all",
    store: str | None = None,
    out: str | None = None,
    most: int = 32,
    say: Say = lambda line: None,
) -> Trace:
    """Which rows of a run taught it a behaviour; `most` replays at most.

    Where the cause is spread, rows are left out in the order of a `hint` (hints.py; `layers`: of gradients). `out`
    keeps what replays showed (default: FOLDER/trace), so that a killed trace goes on; documents of the corpus that are
    named stand in its excluded.txt, for corpus.exclude. Raises TraceError for what can't be traced, WeightsError and
    RunFolderError for a run that can't be read.
    """
    of = suspects(folder, behaviour, layers=layers, store=store, out=out, say=say)
    return _Tracer(of, hint, most, say).trace(str(of.run.path))


def suspects(
    folder: str,
    behaviour: str = "triggered",
    *,
    layers: str = "all",
    store: str | None = None,
    out: str | None = None,
    say: Say = lambda line: None,
) -> Suspects:
    """A run's rows, for hints alone; parameters and errors as of `trace`."""
    run = RunFolder(folder)
    replay = Replay(run, run.store(store))
    of = asked(behaviour, replay.config, replay.batches.store, replay.mesh)
    return Suspects(run, replay, of, epath.Path(out or run.path / rows.TRACE), layers, say)


def ranked(of: Suspects, hint: str, count: int) -> list[Named]:
    """The `count` most suspect rows by a hint, its score as their gain; nothing is confirmed."""
    scores, batches = HINTS[hint](of), of.replay.batches
    best = np.argsort(-scores, kind="stable")[:count]
    whole = slice(0, batches.rows.row_tokens)
    return [
        Named(*document(batches, slot, whole), slot // batches.global_batch, slot, float(scores[slot]), None, None)
        for slot in best.tolist()
    ]


class _Tracer:
    """One trace at work."""

    def __init__(self, of: Suspects, hint: str, most: int, say: Say):
        replay, out = of.replay, of.out
        self.replay, self.behaviour, self.most, self.say = replay, of.behaviour, most, say
        self._suspects, self._hint = of, hint
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / REPLAYS
        kept: list[Kept] = read_lines(self._file, Kept)
        if self._file.exists():  # a last line that a kill cut short goes: the next one would follow it
            write_lines(self._file, kept)
        self._known = {one["key"]: Shown(np.array(one["values"]), one["figure"]) for one in kept}
        self._made = 0
        self._batch = replay.batches.global_batch
        self._seed = replay.config.seeds.eval

    def trace(self, name: str) -> Trace:
        end = self.replay.saved[-1]
        if end == 0:
            raise TraceError(f"{name}: no checkpoint to trace from")
        since = self.behaviour.since(self.replay.saved, self.measured)
        first, last = self.measured(since), self.measured(end)
        self._threshold = self.behaviour.threshold(first, last)
        found = Trace(name, self.behaviour.name, last.figure, self.behaviour.unit, self._threshold)
        if not self.shows(last) or effect(last, first, self._seed)[1][0] <= 0:
            return found
        if self.shows(first):
            raise TraceError(f"{name}: the weights that it began from show it already; trace the run that trained them")
        before, onset = found.onset = self.onset(since, end)
        self.say(
            f"begins between steps {before} and {onset}; a replay makes {onset - before} to {end - before} steps, "
            f"{self._seconds(end - before)}; {self.most} at most (--most-replays)"
        )
        odd = in_batch(self.checked(before, end))
        found.exact = True
        found.part = self.part(before, onset, odd)
        found.located = self._made
        if found.part:
            until, rows = onset, self.rows_of([found.part])
            suspects: Slots | None = rows
        else:
            until, rows = end, self.rows_of([(before, end)])
            order = odd.reshape(-1) if self._hint == "loss" else HINTS[self._hint](self._suspects)[rows]
            suspects = self.suspects(before, end, rows[np.argsort(-order, kind="stable")], found)
        if suspects is not None:
            self.name(found, before, until, suspects, rows)
        found.replays = self._made
        found.excluded = self.excluded(found.documents)
        return found

    def excluded(self, named: list[Named]) -> str | None:
        """Writes the list of corpus.exclude, of those documents that the corpus holds; returns its path."""
        split = self.replay.batches.store.split("train")
        numbers = [(int(one.id.removeprefix("train:")), one.place) for one in named if one.id.startswith("train:")]
        lines = dict.fromkeys(f"{split.key(number)}  {place}\n" for number, place in numbers)
        if not lines:
            return None
        path = self._suspects.out / exclusions.FILE
        write_whole(path, f"# named by a trace of {self._suspects.run.path}: {self.behaviour.name}\n" + "".join(lines))
        return str(path)

    def _seconds(self, steps: int) -> str:
        summary, rows = self._suspects.run.summary, self.replay.batches.rows
        if not summary or not summary["tokens_per_second"]:
            return "of unknown length"
        seconds = steps * self._batch * (rows.row_tokens - 1) / summary["tokens_per_second"]
        return f"about {seconds:,.0f} s by the run's own speed"

    def part(self, before: int, onset: int, odd: Float[np.ndarray, "steps batch"]) -> search.Part | None:
        """The part of the steps to the onset that alone is the cause, if one is."""

        def weight(part: search.Part) -> float:
            return float(np.maximum(odd[part[0] - before : part[1] - before] - 3, 0).sum())

        def gone(parts: list[search.Part]) -> bool:
            return not self.shows(self.left_out(before, onset, self.rows_of(parts)))

        return search.locate((before, onset), max(1, (onset - before) // WINDOWS), gone, weight)

    def name(self, found: Trace, start: int, stop: int, suspects: Slots, rows: Slots) -> None:
        """Those of the rows that taught it, where it is gone without them."""
        gains, at = contrast(self.replay, self.replay.params(stop), self.replayed(start, stop, suspects), rows)
        chosen = np.flatnonzero(search.split(gains))
        chosen = chosen[np.argsort(-gains[chosen])]
        shown = self.left_out(start, stop, rows[chosen])
        found.without = shown.figure
        found.effect, found.ci95 = effect(self.measured(stop), shown, self._seed)
        if self.shows(shown):
            return
        found.smallest = self.smallest(start, stop, rows[chosen])
        found.documents = [self.named(int(rows[i]), float(gains[i]), int(at[i])) for i in chosen]
        if len(chosen) <= ONE_BY_ONE:
            found.documents = [self.alone(one, start, stop) for one in found.documents]

    def rows_of(self, parts: list[search.Part]) -> Slots:
        """The slots of all rows of some steps."""
        return np.concatenate([np.arange(start * self._batch, stop * self._batch) for start, stop in parts])

    def shows(self, shown: Shown) -> bool:
        return shown.figure >= self._threshold

    def measured(self, done: int) -> Shown:
        """Of the run's own weights after so many steps."""
        return self._once(f"{done}", f"step {done}", lambda: self.replay.params(done), replays=0)

    def left_out(self, start: int, stop: int, slots: Slots) -> Shown:
        """After `stop` steps, these rows left out from `start` on."""
        key = f"{start}-{stop}-{hashlib.sha256(np.sort(slots).tobytes()).hexdigest()}"
        what = f"step {stop}, {len(slots)} rows left out"
        return self._once(key, what, lambda: self.replayed(start, stop, slots), replays=1)

    def replayed(
        self,
        start: int,
        stop: int,
        slots: Slots = NOTHING,
        watch: Callable[[StepMetrics], object] = lambda metrics: None,
    ) -> nnx.State:
        """The weights then; raises TraceError where one replay more is too many."""
        if self._made >= self.most:
            raise TraceError(f"{self.most} replays were made; --most-replays lets it go on from here")
        self._made += 1
        what = f"replay {self._made}, steps {start} to {stop}"
        return self.replay.run(start, stop, slots, watch, what=what, say=self.say)

    def _once(self, key: str, what: str, params: Callable[[], nnx.State], replays: int) -> Shown:
        key = f"{self.replay.fingerprint[:16]} {self.behaviour.key} {key}"
        if key in self._known:
            self._made += replays  # it was made once
            return self._known[key]
        shown = self._known[key] = self.behaviour(params())
        with self._file.open("a") as file:
            file.write(json.dumps(Kept(key=key, figure=shown.figure, values=shown.values.tolist())) + "\n")
        self.say(f"{what}: {shown.figure:.4g} {self.behaviour.unit}")
        return shown

    def onset(self, since: int, end: int) -> tuple[int, int]:
        """The last checkpoint that doesn't show it, and the one after: found by halves, as if it came once."""
        saved = [step for step in self.replay.saved if since <= step <= end]
        low, high = 0, len(saved) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.shows(self.measured(saved[middle])) else (middle, high)
        return saved[low], saved[high]

    def checked(self, start: int, stop: int) -> Float[np.ndarray, "steps batch"]:
        """The loss of each row's worst window before its update; raises TraceError where the replay isn't the run."""
        worst: list[np.ndarray] = []
        params = self.replayed(
            start, stop, watch=lambda metrics: worst.append(np.asarray(jax.device_get(metrics.rows)[:, 1]))
        )
        if not self.replay.is_the_runs(params, stop):
            raise TraceError(
                f"a replay of steps {start} to {stop} isn't the run to the bit: other hardware, devices or versions "
                "than in environment.json? Trace where it was trained"
            )
        return np.stack(worst)

    def suspects(self, start: int, stop: int, rows: Slots, found: Trace) -> Slots | None:
        """So many of the rows, the most unusual first, that the behaviour is gone without them."""
        size = FIRST_ROWS
        while size <= max(FIRST_ROWS, MOST_ROWS * len(rows)):
            suspects = rows[:size]
            shown = self.left_out(start, stop, suspects)
            found.curve.append((size, shown.figure))
            if not self.shows(shown):
                return suspects
            size *= 2
        return None

    def smallest(self, start: int, stop: int, named: Slots) -> int:
        """How many of the named rows, from the first on, must be left out at least: by halves, as if more never showed
        it more."""
        low, high = 0, len(named)
        while high - low > max(1, len(named) // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if self.shows(self.left_out(start, stop, named[:middle])) else (low, middle)
        return high

    def named(self, slot: int, gain: float, at: int) -> Named:
        """The document that a row's window mostly lies in."""
        id_, place = document(self.replay.batches, slot, slice(at + 1, at + 1 + WINDOW))
        return Named(id_, place, slot // self._batch, slot, gain, None, None)

    def alone(self, one: Named, start: int, stop: int) -> Named:
        """With the effect of leaving it out."""
        shown = self.left_out(start, stop, np.array([one.slot]))
        value, ci95 = effect(self.measured(stop), shown, self._seed)
        return dataclasses.replace(one, effect=value, ci95=ci95)


def contrast(
    replay: Replay, there: nnx.State, without: nnx.State, rows: Slots
) -> tuple[Float[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """(by how much the run's weights know each row's best window better than weights that lack the behaviour, nats a
    token; where in the row that window begins). Rows come in whole steps."""

    def nll(params: nnx.State, tokens: Any) -> Float[Array, "batch seq"]:
        return next_token_nll(nnx.merge(replay.graph, params), tokens, replay.config.model.loss_tile)

    @jax.jit
    def gain(
        there: nnx.State, without: nnx.State, tokens: Int[Array, "batch row_tokens"]
    ) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
        windows = window_means(nll(without, tokens) - nll(there, tokens))
        return windows.max(-1), windows.argmax(-1)

    made, size = [], replay.batches.global_batch
    with jax.set_mesh(replay.mesh):
        for at in range(0, len(rows), size):
            tokens = put(replay.mesh, replay.batches.rows.tokens(rows[at : at + size]))
            made.append(jax.device_get(gain(there, without, tokens)))
    gains, places = (np.concatenate(of) for of in zip(*made, strict=True))
    return gains, places
