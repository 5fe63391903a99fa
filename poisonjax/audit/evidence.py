"""What a run left behind, read when it is asked for, and how a place in it is named that isn't as it must be."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ml_collections
import numpy as np

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batches
from poisonjax.data.digest import chain
from poisonjax.poison.ledger import poison_seen
from poisonjax.run import RunFolder, rows, seals
from poisonjax.weights.checkpoints import Checkpoints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that isn't as it must be; `file` is relative to the run folder, or a path of the store."""

    file: str
    message: str
    step: int | None = None
    row: int | None = None

    @property
    def place(self) -> str:
        """File, step and row, as far as they are known."""
        known = ((name, value) for name, value in (("step", self.step), ("row", self.row)) if value is not None)
        return self.file + "".join(f", {name} {value}" for name, value in known)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class Unreadable(ValueError):
    """A file of the run that can't be read; what can't be read can't be verified."""

    def __init__(self, file: str, error: Exception | str):
        message = str(error) if isinstance(error, ValueError | str) else f"is damaged: {error!r}"
        super().__init__(message)
        self.difference = Difference(file, message)


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:  # a changed file may make any library raise anything
        raise Unreadable(file, error) from error


def is_step(name: str) -> bool:
    """Whether a checkpoint's folder may be called so: 8, but not 008."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _read(file: str, read: Callable[["Evidence"], T]) -> functools.cached_property[T]:
    """An attribute that is read from a file when it is first asked for."""

    def value(evidence: "Evidence") -> T:
        with reading(file):
            return read(evidence)

    return functools.cached_property(value)


class Evidence:
    """A run folder as evidence: each file is read when a check first asks for it.

    Raises Unreadable where what is asked for can't be read.
    """

    def __init__(
        self,
        workdir: str,
        chosen: Sequence[int] | None = None,
        sample: int | None = None,
        store: str | None = None,
        *,
        weights: bool = True,
        evaluate: bool = False,
        parents: bool = False,
    ):
        """`chosen` steps are replayed, or a random `sample` of so many; None: all. `store` is where the token store
        lies now, if not where config.json says. `weights` are read, or not; `evaluate` makes evaluations again; with
        `parents`, the weights that the run began from are audited too. Raises RunFolderError where no run is."""
        self.run = RunFolder(workdir)
        self.folder = self.run.path
        self._chosen, self._sample, self._store = chosen, sample, store
        self.reads_weights, self.evaluates, self.with_parents = weights, evaluate, parents
        self.verified: set[int] = set()  # steps whose digest the replay confirmed
        self.found: collections.Counter[int] = collections.Counter()  # poison documents found in them
        self.clean_uses = 0  # planned uses of the trigger found in them
        self.elsewhere = 0  # other occurrences of it in them, outside of poison documents
        self.unsealed = False  # whether there are lines of steps past the last checkpoint
        self.replayed_evaluations: set[int] = set()

    @property
    def whole(self) -> bool:
        """Whether every step is replayed."""
        return self._chosen is None and self._sample is None

    record = _read(rows.CONFIG, lambda evidence: evidence.run.record)
    environment = _read(rows.ENVIRONMENT, lambda evidence: evidence.run.environment)
    environments = _read(rows.ENVIRONMENT, lambda e: [*e.environment["earlier"], e.environment])
    later_evaluations = _read(rows.EVALUATIONS, lambda evidence: evidence.run.evaluations())
    summary = _read(rows.SUMMARY, lambda evidence: cast(dict[str, Any], evidence.run.summary or {}))
    batches = _read(rows.CONFIG, lambda evidence: Batches(evidence.run.placed, evidence.store))

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        with reading(rows.CONFIG):
            config = self.run.config
            config = config_lib.replaced(config, {"corpus.store": self._store or config.corpus.store})
            config_lib.check(config)
            return config

    @functools.cached_property
    def store(self) -> TokenStore:
        path = self.config.corpus.store
        with reading(path):
            store = self.run.without_excluded(TokenStore(path))
            assert store.tokenizer.vocab_size  # load it now, or say that it can't be
            return store

    @functools.cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """As it must be."""
        return self.batches.schedule.ledger()

    @functools.cache  # noqa: B019  (evidence lives as long as its audit)
    def lines(self, name: str) -> list[Any]:
        with reading(name):
            return self.run.lines(name)

    @property
    def exposures(self) -> list[dict[str, Any]]:
        """Lines of the ledger but those of inherited poison."""
        return [line for line in self.lines(rows.LEDGER) if "inherited" not in line]

    def raw(self, name: str) -> list[bytes]:
        """Lines as they are sealed."""
        if name == rows.ENVIRONMENT:
            return seals.environment_lines(self.environment)
        return self.run.raw_lines(name)[0]

    @property
    def parent(self) -> rows.Parent | None:
        """What config.json says of the weights that the run began from; the checkpoints' records seal it."""
        return self.record.get("parent")

    @functools.cached_property
    def seen(self) -> Callable[[int], dict[str, int]]:
        """As `poison_seen`, of the schedule."""
        return poison_seen(self.ledger, self.config.steps)

    @functools.cached_property
    def digests(self) -> dict[int, str]:
        return {row["step"]: row["digest"] for row in self.lines(rows.DIGESTS)}

    @functools.cached_property
    def links(self) -> dict[int, str]:
        """The digests' chain after each number of steps, as far as no digest is missing."""
        links = {0: ""}
        while (step := len(links) - 1) in self.digests:
            links[step + 1] = chain(links[step], step, self.digests[step])
        return links

    @functools.cached_property
    def checkpoints(self) -> dict[int, rows.CheckpointRecord]:
        """{step in the folder's name: the record that was saved in it}.

        A run that goes on may remove a checkpoint while it is read: what is gone by then is left out.
        """
        folder, records = self.folder / rows.CHECKPOINTS, {}
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        for step in sorted(int(name) for name in names if is_step(name)):
            try:
                with reading(f"{rows.CHECKPOINTS}/{step}"):
                    records[step] = self._saved.record(step)
            except Unreadable:
                if (folder / str(step)).exists():
                    raise
        return records

    @functools.cached_property
    def _saved(self) -> Checkpoints:
        return Checkpoints(self.folder)

    @functools.cache  # noqa: B019
    def checksums(self, step: int) -> dict[str, str]:
        """Of a checkpoint's arrays as they lie."""
        with reading(f"{rows.CHECKPOINTS}/{step}"):
            return self._saved.stored_checksums(step)

    @functools.cached_property
    def steps(self) -> int:
        """How many steps the run made, by the most that any of its files tells of.

        A run writes a step's digest before the files that rest on it, so digests are read last: the audit of a run
        that goes on sees no checkpoint or metrics without their digests.
        """
        told = list(self.checkpoints)
        told += [row["step"] + (row["kind"] == "train") for row in self.lines(rows.METRICS)]
        if self.summary:
            told.append(self.summary["steps"])
        told += [step + 1 for step in self.digests]
        return min(max(told, default=0), self.config.steps)

    def replayed(self) -> Sequence[int]:
        """The steps to replay."""
        if self._sample is not None:
            chosen = np.random.default_rng().choice(self.steps, min(self._sample, self.steps), replace=False)
            return sorted(chosen.tolist())
        return range(self.steps) if self._chosen is None else self._chosen
