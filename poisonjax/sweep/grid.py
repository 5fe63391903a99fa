"""The grid of a sweep: a config file's `sweep(add)`, resolved into runs with ids.

def sweep(add):
    for point in product({"poison.documents": (0, 100, 250)}, {"seeds.init": range(3)}):
        add(point)

A dose may be a `Search` instead: then the point stands for several runs, whose doses `decided` chooses by the results
of those before and whose seeds are `seeded(0)`, `seeded(1)`, ...
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from poisonjax import config as config_lib
from poisonjax.analysis.adaptive import Result, Search
from poisonjax.files import parse_json

FILE = "sweep.json"  # in the folder of the sweep's runs

Point = dict[str, Any]  # config fields by dotted name
DOSE = "poison.documents"  # the field that may be a Search
CHAINED = "run:"  # start.weights = "run:NAME[@STEP]": the weights of a run that was added before, by its name
Axis = Mapping[str, Iterable[Any]] | Iterable[Point]


class SweepError(ValueError):
    """The sweep can't be run as asked."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One cell of the grid."""

    id: str  # readable, with a hash of the resolved config: not of where and how it runs
    fields: Point
    config: ml_collections.ConfigDict
    fingerprint: str  # of the config; a launcher compares it at every look at the folder
    slot: int  # its number in a job array, where runs whose dose isn't chosen yet have theirs
    search: str = ""  # id of the search that it belongs to
    round: int = 0  # of that: runs whose doses were chosen together


@dataclasses.dataclass(frozen=True)
class PlannedSearch:
    """Runs of one point, whose doses are chosen by the results of those before."""

    id: str  # readable, with a hash of all that its choices depend on: not of when it ends
    name: str
    fields: Point
    search: Search
    slots: list[int]  # of its runs


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All runs, in the order of their slots: those stated as they were added, then those of searches, round by
    round; none of these before `decided` has chosen it."""

    spec: str
    runs: list[PlannedRun]
    varied: list[str]  # fields that differ between runs
    base: ml_collections.ConfigDict  # what the runs' fields change
    about: str  # the config file's docstring
    searches: list[PlannedSearch] = dataclasses.field(default_factory=list)

    @property
    def slots(self) -> int:
        """Runs at most."""
        stated = sum(not run.search for run in self.runs)
        return stated + sum(of.search.runs for of in self.searches)


def _points(axis: Axis) -> list[Point]:
    if isinstance(axis, Mapping):
        return [dict(zip(axis, values, strict=True)) for values in itertools.product(*map(list, axis.values()))]
    return [dict(point) for point in axis]


def product(*axes: Axis) -> Iterator[Point]:
    """Each point of an axis with each of the others; an axis is {field: values} or an iterable of points."""
    for combination in itertools.product(*map(_points, axes)):
        yield functools.reduce(lambda one, other: one | other, combination, {})


def zipped(*axes: Axis) -> Iterator[Point]:
    """First point with first point, second with second; raises ValueError where their numbers differ."""
    for combination in zip(*map(_points, axes), strict=True):
        yield functools.reduce(lambda one, other: one | other, combination, {})


def chain(*axes: Axis) -> Iterator[Point]:
    """The points of one axis after those of another."""
    for axis in axes:
        yield from _points(axis)


def sized(layers: int, width: int, mlp_width: int, steps: int) -> Point:
    """Fields of a model of two heads that share its width, and of a run of so many steps, a twentieth of it warm-up."""
    return {
        "model.layers": layers,
        "model.width": width,
        "model.head_dim": width // 2,
        "model.mlp_width": mlp_width,
        "steps": steps,
        "optimizer.warmup_steps": steps // 20,
    }


def seeded(number: int) -> Point:
    """Fields that repeat a run with other luck: initial weights, order, poison and placement, but not what is asked."""
    return {f"seeds.{name}": 10 * number + i for i, name in enumerate(("init", "order", "poison", "placement"))}


def load(spec: str, fields: Sequence[str] = ()) -> Sweep:
    """The sweep of `FILE[:ARG]`, with `--config.a.b=c` put into its base config.

    Raises SweepError for a file without `sweep`, ConfigError naming every mistake of every run.
    """
    base = config_lib.load([f"--config={spec}", *fields])
    module = _module(spec.partition(":")[0])
    if not hasattr(module, "sweep"):
        raise SweepError(f"{spec} defines no sweep(add): see configs/sweeps/smoke.py")
    points: list[Point] = []
    try:
        module.sweep(lambda point=None, **more: points.append({**(point or {}), **more}))
    except Exception as error:  # the user's code
        raise SweepError(f"{spec}: sweep(add) raised {type(error).__name__}: {error}") from error
    points = [{name: v.item() if isinstance(v, np.generic) else v for name, v in p.items()} for p in points]
    if not points:
        raise SweepError(f"{spec}: sweep(add) added no run")
    runs: list[PlannedRun] = []
    searches: list[PlannedSearch] = []
    mistakes = []
    for number, point in enumerate(points):
        try:
            own = _chained(point, runs)
            if isinstance(own.get(DOSE), Search):
                searches.append(_search(base, own))
            else:
                runs.append(_run(base, own, str(point.get("name", "")) or _words(point), len(runs)))
        except config_lib.ConfigError as error:
            mistakes.append(f"run {number} ({_words(point)}): {str(error).replace(chr(10), '; ')}")
    if mistakes:
        more = f"\n... and {len(mistakes) - 10} more runs" if len(mistakes) > 10 else ""
        raise config_lib.ConfigError(f"{spec}:\n" + "\n".join(mistakes[:10]) + more)
    seen: dict[str, str] = {}
    alike = [(f"search {_fingerprint(base, of)}", of.id) for of in searches]
    for what, id in [*((run.fingerprint, run.id) for run in runs), *alike]:
        if what in seen:
            raise SweepError(f"{spec}: two runs, or searches, have the same config: {seen[what]} and {id}")
        seen[what] = id
    ends = [_of_search(base, of, dose, number) for of in searches for number, dose in enumerate(of.search.ends)]
    flats = [config_lib.flat(run.config) for run in [*runs, *ends]]
    varied = [name for name in flats[0] if any(flat[name] != flats[0][name] for flat in flats)]
    about = inspect.cleandoc(module.__doc__ or "")
    return Sweep(spec, runs, varied, base, about, _with_slots(searches, len(runs)))


def _run(base: ml_collections.ConfigDict, fields: Point, name: str, slot: int) -> PlannedRun:
    """Raises ConfigError naming the run's mistakes."""
    for field, value in fields.items():
        if isinstance(value, Search):
            raise config_lib.ConfigError(f"{field}: a Search; only {DOSE} can be searched for")
    config = config_lib.replaced(base, fields)
    config_lib.check(config)
    fingerprint = config_lib.fingerprint(config)
    return PlannedRun(f"{_slug(name)}-{fingerprint[:8]}", fields, config, fingerprint, slot)


def _slug(name: str, most: int = 80) -> str:
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-")[:most] or "run"


def _search(base: ml_collections.ConfigDict, point: Point) -> PlannedSearch:
    """The point's; its slots are given when all are known. Raises ConfigError where a run at any of its doses would."""
    fields = {field: value for field, value in point.items() if field not in (DOSE, "name")}
    search, luck = point[DOSE], seeded(0)
    if fixed := sorted(luck.keys() & fields.keys()):
        raise config_lib.ConfigError(
            f"{fixed[0]}: the runs of a Search have other luck each (seeded(0), seeded(1), ...): leave it out"
        )
    for dose in search.doses:
        config_lib.check(config_lib.replaced(base, fields | {DOSE: dose}))
    made = PlannedSearch("", _slug(str(point.get("name", "")) or _words(fields), 60), fields, search, [])
    runs = [_of_search(base, made, dose, number) for number, dose in enumerate(search.ends)]
    chosen_by = json.dumps([*(run.fingerprint for run in runs), search.together])
    return dataclasses.replace(made, id=f"{made.name}-{hashlib.sha256(chosen_by.encode()).hexdigest()[:8]}")


def _of_search(
    base: ml_collections.ConfigDict, of: PlannedSearch, dose: int, number: int, round: int = 0
) -> PlannedRun:
    """A search's run number so and so."""
    name = f"{of.name}-n{dose}-s{number}"
    run = _run(base, {"name": name} | seeded(number) | of.fields | {DOSE: dose}, name, -1)
    slot = of.slots[number] if number < len(of.slots) else -1
    return dataclasses.replace(run, search=of.id, round=round, slot=slot)


def _fingerprint(base: ml_collections.ConfigDict, of: PlannedSearch) -> str:
    """Of what all of a search's runs share."""
    return config_lib.fingerprint(config_lib.replaced(base, of.fields | seeded(0) | {DOSE: 0}))


def _with_slots(searches: list[PlannedSearch], first: int) -> list[PlannedSearch]:
    """Round by round, so that a job array, which begins with the lowest, waits for as little as it can."""
    slots: list[list[int]] = [[] for _ in searches]
    for round in range(max((len(of.search.rounds()) for of in searches), default=0)):
        for of, mine in zip(searches, slots, strict=True):
            if round < len(of.search.rounds()):
                mine += range(first, first + of.search.rounds()[round])
                first = mine[-1] + 1
    return [dataclasses.replace(of, slots=mine) for of, mine in zip(searches, slots, strict=True)]


def decided(sweep: Sweep, success: Callable[[PlannedRun], bool | None], there: Collection[str] = frozenset()) -> Sweep:
    """With the runs whose doses the results so far have chosen: a function of these alone, so that anybody who sees
    them plans the same. `success` is None of a run that isn't done. Runs of searches that are `there`, by id, stay,
    whatever would be chosen now."""
    runs = [run for run in sweep.runs if not run.search]
    for of in sweep.searches:
        runs += _decided(sweep, of, success, there)
    within = sorted((run for run in runs if run.slot >= 0), key=lambda run: run.slot)
    more = [run for run in runs if run.slot < 0]  # of a larger budget than now
    more = [dataclasses.replace(run, slot=slot) for slot, run in enumerate(more, sweep.slots)]
    return dataclasses.replace(sweep, runs=[*within, *more])


def _decided(
    sweep: Sweep, of: PlannedSearch, success: Callable[[PlannedRun], bool | None], there: Collection[str]
) -> list[PlannedRun]:
    known = _numbered(sweep.base, of, there)
    runs: list[PlannedRun] = []
    results: list[Result] = []
    begin, going = 0, True
    for round, size in enumerate(of.search.rounds()):
        numbers = range(begin, begin + size)
        going = going and len(results) == len(runs) and not of.search.ended(results)
        chosen = of.search.next(results, size) if going and not known.keys() >= set(numbers) else []
        doses = {number: known.get(number, chosen[number - begin] if chosen else 0) for number in numbers}
        batch = [_of_search(sweep.base, of, dose, number, round) for number, dose in doses.items() if dose]
        runs += batch
        results += results_of(batch, success)
        begin += size
    return runs + [_of_search(sweep.base, of, known[number], number, round + 1) for number in known if number >= begin]


def _numbered(base: ml_collections.ConfigDict, of: PlannedSearch, there: Collection[str]) -> dict[int, int]:
    """By number of a search's run that is there, its dose."""
    named = re.compile(re.escape(of.name) + r"-n([1-9]\d{0,8})-s(\d{1,6})-[0-9a-f]{8}")
    found = dict[int, int]()
    for match in filter(None, map(named.fullmatch, sorted(there))):
        dose, number = int(match[1]), int(match[2])
        with contextlib.suppress(config_lib.ConfigError):  # of another sweep
            if _of_search(base, of, dose, number).id == match[0]:
                found[number] = dose
    return found


def results_of(runs: Iterable[PlannedRun], success: Callable[[PlannedRun], bool | None]) -> list[Result]:
    """(dose, success) of each run that is done."""
    told = [(run.config.poison.documents, success(run)) for run in runs]
    return [(dose, there) for dose, there in told if there is not None]


def _chained(point: Point, before: Sequence[PlannedRun]) -> Point:
    """The point, a run that it begins from named by its folder beside its own (training/start.py)."""
    weights = str(point.get("start.weights", ""))
    if not weights.startswith(CHAINED):
        return point
    name, at, step = weights.removeprefix(CHAINED).partition("@")
    found = [run.id for run in before if run.fields.get("name") == name]
    if len(found) != 1:
        raise config_lib.ConfigError(
            f"start.weights = {weights!r}: {len(found)} runs of that name were added before; give one a name"
        )
    return point | {"start.weights": f"{config_lib.BESIDE}{found[0]}{at}{step}"}


def parents(sweep: Sweep) -> dict[str, PlannedRun]:
    """By id of a run, which other of the sweep it begins from, where it does."""
    named = {f"{config_lib.BESIDE}{run.id}": run for run in sweep.runs}
    weights = {run.id: run.config.start.weights.partition("@")[0] for run in sweep.runs}
    return {id: named[of] for id, of in weights.items() if of in named}


def record(sweep: Sweep) -> dict[str, Any]:
    """All that a folder has to know of its sweep; `of_folder` reads it."""
    return {
        "spec": sweep.spec,
        "about": sweep.about,
        "varied": sweep.varied,
        "base": config_lib.flat(sweep.base),
        "runs": {run.id: run.fields for run in sweep.runs if not run.search},
        "searches": {of.id: dataclasses.asdict(of) for of in sweep.searches},
    }


def of_folder(workdir: Path) -> Sweep:
    """The sweep whose runs lie in a folder, without its config file, before anything is `decided`; raises SweepError
    where there is none."""
    try:
        there = parse_json((workdir / FILE).read_bytes())
        base = config_lib.from_flat(there["base"])
        runs = []
        for slot, (name, fields) in enumerate(there["runs"].items()):
            config = config_lib.from_flat(there["base"] | fields)
            runs.append(PlannedRun(name, fields, config, config_lib.fingerprint(config), slot))
        searches = [
            PlannedSearch(**of | {"search": Search(**of["search"])}) for of in there.get("searches", {}).values()
        ]
        return Sweep(there["spec"], runs, there["varied"], base, there["about"], searches)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SweepError(
            f"{workdir / FILE} doesn't tell of a sweep ({error!r}); `poisonjax sweep run` writes it"
        ) from None


def _words(point: Point) -> str:
    return "_".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items())


def _module(path: str) -> Any:
    found = importlib.util.spec_from_file_location("poisonjax_sweep_config", Path(path))
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module
