"""What a sweep plans: runs, and searches for a dose, each with a slot in a job array."""

import dataclasses
import re

import ml_collections

from poisonjax import config as config_lib
from poisonjax.analysis.adaptive import Search
from poisonjax.sweep.points import Point

DOSE = "poison.documents"  # the field that may be a Search


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


def planned_run(base: ml_collections.ConfigDict, fields: Point, name: str, slot: int) -> PlannedRun:
    """Raises ConfigError naming the run's mistakes."""
    for field, value in fields.items():
        if isinstance(value, Search):
            raise config_lib.ConfigError(f"{field}: a Search; only {DOSE} can be searched for")
    config = config_lib.replaced(base, fields)
    config_lib.check(config)
    fingerprint = config_lib.fingerprint(config)
    return PlannedRun(f"{slug(name)}-{fingerprint[:8]}", fields, config, fingerprint, slot)


def slug(name: str, most: int = 80) -> str:
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-")[:most] or "run"


def words(point: Point) -> str:
    """A point in short."""
    return "_".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items())
