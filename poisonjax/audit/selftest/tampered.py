"""A copied run and its copied store, to be tampered with."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.corpus.store import fingerprint
from poisonjax.data.batches import Batches
from poisonjax.data.digest import as_hex, chain, digest
from poisonjax.run import RunFolder, seals


@dataclasses.dataclass
class TamperedRun:
    """A copied run and its copied store, to be tampered with."""

    folder: Path
    random: np.random.Generator

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def config(self) -> ml_collections.ConfigDict:
        return RunFolder(self.folder).config

    @property
    def store(self) -> Path:
        return Path(self.config.corpus.store)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def write(self, name: str, rows: list[dict]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def pick(self, values):
        """One of a list or range."""
        return values[int(self.random.integers(len(values)))]

    def change(self, name: str, edit: Callable[[dict], object]) -> None:
        """Edits a file of JSON."""
        value = json.loads((self.folder / name).read_text())
        edit(value)
        (self.folder / name).write_text(json.dumps(value))

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdecimal())

    def forge_lines(self, name: str, rows: list[dict]) -> None:
        """Other lines, as a run that wrote them would have sealed them."""
        self.write(name, rows)
        lines = [json.dumps(row).encode() for row in rows]
        self.in_checkpoints(
            lambda record: record["sealed"].update({name: seals.of_lines(lines[: record["sealed"][name]["lines"]])})
        )

    def in_checkpoints(self, edit: Callable[[dict], object]) -> None:
        """Edits the record of each checkpoint."""
        for step in self.checkpoints():
            self.change(f"checkpoints/{step}/_CHECKPOINT_METADATA", lambda value: edit(value["custom_metadata"]))

    def forge_digests(self, digests: dict[int, str]) -> None:
        """The evidence of a run that trained on batches of these digests at these steps."""
        rows, links, link = self.lines("digests.jsonl"), {}, ""
        for row in rows:
            row["digest"] = digests.get(row["step"], row["digest"])
            link = links[row["step"] + 1] = chain(link, row["step"], row["digest"])
        self.forge_lines("digests.jsonl", rows)
        self.change("summary.json", lambda value: value.update(digest_chain=link))
        self.in_checkpoints(lambda record: record.update(digest_chain=links[record["step"]]))

    def forge_config(self, field: str, value: Any, *, thorough: bool) -> None:
        """Another value of a config field; `thorough` mends the fingerprints."""

        def edit(record: dict) -> None:
            *path, leaf = field.split(".")
            node = record["config"]
            for name in path:
                node = node[name]
            node[leaf] = value
            if thorough:
                record["fingerprint"] = config_lib.fingerprint(config_lib.from_record(record["config"]))

        self.change("config.json", edit)
        if thorough:
            self.change("summary.json", lambda summary: summary.update(fingerprint=self.record["fingerprint"]))

    @functools.cached_property
    def batches(self) -> Batches:
        store = corpus.TokenStore(str(self.store))
        return Batches(self.config, RunFolder(self.folder).without_excluded(store))

    def manifest(self, edit: Callable[[dict], object]) -> None:
        """Edits the store's manifest so that its fingerprint, and the run's, fit it."""
        path = self.store / "manifest.json"
        value = json.loads(path.read_text())
        edit(value)
        value["fingerprint"] = fingerprint(value["tokenizer"]["fingerprint"], value["shards"])
        path.write_text(json.dumps(value))
        names = corpus.TokenStore(str(self.store)).names
        self.change("config.json", lambda record: record.update(names))

    def digest(self, rows: Int[np.ndarray, "batch row_tokens"], step: int) -> str:
        """Of these rows as the step's batch."""
        batches = self.batches
        return as_hex(digest(rows, batches.slots(step)))

    def other_rows(self, step: int) -> tuple[Int[np.ndarray, "batch row_tokens"], int, int]:
        """The step's batch, a copy, and two of its rows that differ."""
        rows = self.batches.tokens(step)
        i, j = sorted(self.random.choice(len(rows), 2, replace=False).tolist())
        assert (rows[i] != rows[j]).any()
        return rows, i, j


def copied(run: Path, store: Path, target: Path, random: np.random.Generator) -> TamperedRun:
    """A copy of run and store under `target`."""
    shutil.copytree(run, target / "run", ignore=shutil.ignore_patterns("figures", "report.html"))
    shutil.copytree(store, target / "store")
    copy = TamperedRun(target / "run", random)
    copy.change("config.json", lambda record: record["config"]["corpus"].update(store="../store"))
    return copy
