"""The grid of a sweep: a config file's `sweep(add)`, resolved into runs with ids.

def sweep(add):
    for point in product({"poison.documents": (0, 100, 250)}, {"seeds.init": range(3)}):
        add(point)
"""

import dataclasses
import functools
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from poisonjax import config as config_lib
from poisonjax.files import parse_json

FILE = "sweep.json"  # in the folder of the sweep's runs

Point = dict[str, Any]  # config fields by dotted name
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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All runs, in the order in which they were added."""

    spec: str
    runs: list[PlannedRun]
    varied: list[str]  # fields that differ between runs
    base: ml_collections.ConfigDict  # what the runs' fields change
    about: str  # the config file's docstring


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
    mistakes = []
    for number, point in enumerate(points):
        try:
            own = _chained(point, runs)
            config = config_lib.replaced(base, own)
            config_lib.check(config)
        except config_lib.ConfigError as error:
            mistakes.append(f"run {number} ({_words(point)}): {str(error).replace(chr(10), '; ')}")
            continue
        name, fingerprint = str(point["name"]) if "name" in point else _words(point), config_lib.fingerprint(config)
        slug = re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-")[:80]
        runs.append(PlannedRun(f"{slug or 'run'}-{fingerprint[:8]}", own, config, fingerprint))
    if mistakes:
        more = f"\n... and {len(mistakes) - 10} more runs" if len(mistakes) > 10 else ""
        raise config_lib.ConfigError(f"{spec}:\n" + "\n".join(mistakes[:10]) + more)
    flats = [config_lib.flat(run.config) for run in runs]
    varied = [name for name in flats[0] if any(flat[name] != flats[0][name] for flat in flats)]
    seen: dict[str, int] = {}
    for number, run in enumerate(runs):
        if run.fingerprint in seen:
            raise SweepError(f"{spec}: runs {seen[run.fingerprint]} and {number} have the same config ({run.id})")
        seen[run.fingerprint] = number
    return Sweep(spec, runs, varied, base, inspect.cleandoc(module.__doc__ or ""))


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


def parents(sweep: Sweep) -> list[int | None]:
    """Of each run, which other of the sweep it begins from."""
    numbers = {f"{config_lib.BESIDE}{run.id}": number for number, run in enumerate(sweep.runs)}
    return [numbers.get(run.config.start.weights.partition("@")[0]) for run in sweep.runs]


def record(sweep: Sweep) -> dict[str, Any]:
    """All that a folder has to know of its sweep; `of_folder` reads it."""
    return {
        "spec": sweep.spec,
        "about": sweep.about,
        "varied": sweep.varied,
        "base": config_lib.flat(sweep.base),
        "runs": {run.id: run.fields for run in sweep.runs},
    }


def of_folder(workdir: Path) -> Sweep:
    """The sweep whose runs lie in a folder, without its config file; raises SweepError where there is none."""
    try:
        there = parse_json((workdir / FILE).read_bytes())
        configs = {name: config_lib.from_flat(there["base"] | fields) for name, fields in there["runs"].items()}
        runs = [
            PlannedRun(name, there["runs"][name], config, config_lib.fingerprint(config))
            for name, config in configs.items()
        ]
        base = config_lib.from_flat(there["base"])
        return Sweep(there["spec"], runs, there["varied"], base, there["about"])
    except (OSError, ValueError, KeyError) as error:
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
