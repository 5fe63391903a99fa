"""Runs whose doses are chosen by the results of those before (analysis/adaptive.py): a function of what lies in the
sweep's folder, so that any number of launchers plan the same."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable

import ml_collections

from poisonjax import config as config_lib
from poisonjax.analysis.adaptive import Result
from poisonjax.sweep.planned import DOSE, PlannedRun, PlannedSearch, Sweep, planned_run, slug, words
from poisonjax.sweep.points import Point, seeded


def planned_search(base: ml_collections.ConfigDict, point: Point) -> PlannedSearch:
    """The point's; its slots are given when all are known. Raises ConfigError where a run at any of its doses would."""
    fields = {field: value for field, value in point.items() if field not in (DOSE, "name")}
    search, luck = point[DOSE], seeded(0)
    if fixed := sorted(luck.keys() & fields.keys()):
        raise config_lib.ConfigError(
            f"{fixed[0]}: the runs of a Search have other luck each (seeded(0), seeded(1), ...): leave it out"
        )
    for dose in search.doses:
        config_lib.check(config_lib.replaced(base, fields | {DOSE: dose}))
    made = PlannedSearch("", slug(str(point.get("name", "")) or words(fields), 60), fields, search, [])
    runs = [of_search(base, made, dose, number) for number, dose in enumerate(search.ends)]
    chosen_by = json.dumps([*(run.fingerprint for run in runs), search.together])
    return dataclasses.replace(made, id=f"{made.name}-{hashlib.sha256(chosen_by.encode()).hexdigest()[:8]}")


def of_search(base: ml_collections.ConfigDict, of: PlannedSearch, dose: int, number: int, round: int = 0) -> PlannedRun:
    """A search's run number so and so."""
    name = f"{of.name}-n{dose}-s{number}"
    run = planned_run(base, {"name": name} | seeded(number) | of.fields | {DOSE: dose}, name, -1)
    slot = of.slots[number] if number < len(of.slots) else -1
    return dataclasses.replace(run, search=of.id, round=round, slot=slot)


def examples(sweep: Sweep) -> dict[str, PlannedRun]:
    """By id of a search, a run as its runs are; which dose it has means nothing."""
    return {of.id: of_search(sweep.base, of, of.search.low, 0) for of in sweep.searches}


def shared_fingerprint(base: ml_collections.ConfigDict, of: PlannedSearch) -> str:
    """Of what all of a search's runs share."""
    return config_lib.fingerprint(config_lib.replaced(base, of.fields | seeded(0) | {DOSE: 0}))


def with_slots(searches: list[PlannedSearch], first: int) -> list[PlannedSearch]:
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
        batch = [of_search(sweep.base, of, dose, number, round) for number, dose in doses.items() if dose]
        runs += batch
        results += results_of(batch, success)
        begin += size
    return runs + [of_search(sweep.base, of, known[number], number, round + 1) for number in known if number >= begin]


def _numbered(base: ml_collections.ConfigDict, of: PlannedSearch, there: Collection[str]) -> dict[int, int]:
    """By number of a search's run that is there, its dose."""
    named = re.compile(re.escape(of.name) + r"-n([1-9]\d{0,8})-s(\d{1,6})-[0-9a-f]{8}")
    found = dict[int, int]()
    for match in filter(None, map(named.fullmatch, sorted(there))):
        dose, number = int(match[1]), int(match[2])
        with contextlib.suppress(config_lib.ConfigError):  # of another sweep
            if of_search(base, of, dose, number).id == match[0]:
                found[number] = dose
    return found


def results_of(runs: Iterable[PlannedRun], success: Callable[[PlannedRun], bool | None]) -> list[Result]:
    """(dose, success) of each run that is done."""
    told = [(run.config.poison.documents, success(run)) for run in runs]
    return [(dose, there) for dose, there in told if there is not None]
