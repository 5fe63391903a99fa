"""The grid of a sweep: a config file's `sweep(add)`, resolved into runs with ids.

def sweep(add):
    for point in product({"poison.documents": (0, 100, 250)}, {"seeds.init": range(3)}):
        add(point)

A dose may be a `Search` instead: then the point stands for several runs, whose doses `decided` chooses by the results
of those before and whose seeds are `seeded(0)`, `seeded(1)`, ...
"""

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poisonjax import config as config_lib
from poisonjax.analysis.adaptive import Search
from poisonjax.files import parse_json
from poisonjax.sweep.planned import DOSE, PlannedRun, PlannedSearch, Sweep, SweepError, planned_run, words
from poisonjax.sweep.points import Point
from poisonjax.sweep.searches import of_search, planned_search, shared_fingerprint, with_slots

FILE = "sweep.json"  # in the folder of the sweep's runs

CHAINED = "run:"  # start.weights = "run:NAME[@STEP]": the weights of a run that was added before, by its name


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
                searches.append(planned_search(base, own))
            else:
                runs.append(planned_run(base, own, str(point.get("name", "")) or words(point), len(runs)))
        except config_lib.ConfigError as error:
            mistakes.append(f"run {number} ({words(point)}): {str(error).replace(chr(10), '; ')}")
    if mistakes:
        more = f"\n... and {len(mistakes) - 10} more runs" if len(mistakes) > 10 else ""
        raise config_lib.ConfigError(f"{spec}:\n" + "\n".join(mistakes[:10]) + more)
    seen: dict[str, str] = {}
    alike = [(f"search {shared_fingerprint(base, of)}", of.id) for of in searches]
    for what, id in [*((run.fingerprint, run.id) for run in runs), *alike]:
        if what in seen:
            raise SweepError(f"{spec}: two runs, or searches, have the same config: {seen[what]} and {id}")
        seen[what] = id
    ends = [of_search(base, of, dose, number) for of in searches for number, dose in enumerate(of.search.ends)]
    flats = [config_lib.flat(run.config) for run in [*runs, *ends]]
    varied = [name for name in flats[0] if any(flat[name] != flats[0][name] for flat in flats)]
    about = inspect.cleandoc(module.__doc__ or "")
    return Sweep(spec, runs, varied, base, about, with_slots(searches, len(runs)))


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


def _module(path: str) -> Any:
    found = importlib.util.spec_from_file_location("poisonjax_sweep_config", Path(path))
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module
