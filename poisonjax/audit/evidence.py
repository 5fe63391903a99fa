"""What a run left behind, read when it is asked for, and how a place in it is named that isn't as it must be."""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from poisonjax import config as config_lib
from poisonjax import runfolder
from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batches
from poisonjax.files import resolve
from poisonjax.training.checkpoints import Checkpoints


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
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:  # a changed file may make any library raise anything
        raise Unreadable(file, error) from error


# What the checks rely on in each line; the rest of a line is compared, not used.
FIELDS: dict[str, dict[str, type]] = {
    "digests.jsonl": {"step": int, "digest": str},
    "ledger.jsonl": {"id": int, "slot": int},
    "metrics.jsonl": {"step": int, "kind": str},
    "canaries.jsonl": {"slot": int},
    "clean_uses.jsonl": {"slot": int},
}


class Run:
    """A run folder as evidence: each file is read when a check first asks for it.

    Raises Unreadable where what is asked for can't be read.
    """

    def __init__(
        self, workdir: str, chosen: Sequence[int] | None = None, sample: int | None = None, store: str | None = None
    ):
        """`chosen` steps are replayed, or a random `sample` of so many; None: all. `store` is where the token store
        lies now, if not where config.json says."""
        self.folder = resolve(workdir)
        if not (self.folder / "config.json").exists():
            raise runfolder.RunFolderError(f"{workdir} is no run folder: it has no config.json")
        self._chosen, self._sample, self._store = chosen, sample, store
        self.verified: set[int] = set()  # steps whose digest the replay confirmed
        self.found: collections.Counter[int] = collections.Counter()  # poison documents found in them
        self.clean_uses = 0  # planned uses of the trigger found in them
        self.elsewhere = 0  # other occurrences of it in them, outside of poison documents

    @property
    def whole(self) -> bool:
        """Whether every step is replayed."""
        return self._chosen is None and self._sample is None

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        return self._json("config.json")

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        with _reading("config.json"):
            config = config_lib.from_record(self.record["config"])
            config.corpus.store = self._store or config.corpus.store
            config_lib.check(config)
            return config

    @functools.cached_property
    def store(self) -> TokenStore:
        path = self.config.corpus.store
        with _reading(path):
            store = TokenStore(path)
            assert store.tokenizer.vocab_size  # load it now, or say that it can't be
            return store

    @functools.cached_property
    def batches(self) -> Batches:
        store = self.store
        with _reading("config.json"):
            return Batches(self.config, store)

    @functools.cached_property
    def plan(self) -> list[dict]:
        """The ledger as it must be."""
        return self.batches.plan.ledger()

    @functools.cache  # noqa: B019  (a run lives as long as its audit)
    def lines(self, name: str) -> list[dict]:
        with _reading(name):
            rows = list(runfolder.read_lines(self.folder / name))
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise Unreadable(name, f"line {number} is no object")
            for field, kind in FIELDS[name].items():
                if not isinstance(row.get(field), kind):
                    raise Unreadable(name, f"line {number}: {field} is {row.get(field)!r}")
        return rows

    @functools.cached_property
    def digests(self) -> dict[int, str]:
        return {row["step"]: row["digest"] for row in self.lines("digests.jsonl")}

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        return self._json("summary.json") if (self.folder / "summary.json").exists() else {}

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        return self._json("environment.json")

    def _json(self, name: str) -> dict[str, Any]:
        with _reading(name):
            value = json.loads((self.folder / name).read_text())
        if not isinstance(value, dict):
            raise Unreadable(name, "is no object")
        return value

    @functools.cached_property
    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """{step in the folder's name: the record that was saved in it}.

        A run that goes on may remove a checkpoint while it is read: what is gone by then is left out.
        """
        folder, records = self.folder / "checkpoints", {}
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        reader = Checkpoints(self.folder, self.config) if names else None
        for step in sorted(int(name) for name in names if name.isdecimal()):
            assert reader
            try:
                with _reading(f"checkpoints/{step}"):
                    records[step] = reader.record(step)
            except Unreadable:
                if (folder / str(step)).exists():
                    raise
        return records

    @functools.cached_property
    def steps(self) -> int:
        """How many steps the run made, by the most that any of its files tells of.

        A run writes a step's digest before the files that rest on it, so digests are read last: the audit of a run
        that goes on sees no checkpoint or metrics without their digests.
        """
        told = list(self.checkpoints)
        told += [row["step"] + (row["kind"] == "train") for row in self.lines("metrics.jsonl")]
        if isinstance(steps := self.summary.get("steps"), int):
            told.append(steps)
        told += [step + 1 for step in self.digests]
        return min(max(told, default=0), self.config.steps)

    def replayed(self) -> Sequence[int]:
        """The steps to replay."""
        if self._sample is not None:
            chosen = np.random.default_rng().choice(self.steps, min(self._sample, self.steps), replace=False)
            return sorted(chosen.tolist())
        return range(self.steps) if self._chosen is None else self._chosen
