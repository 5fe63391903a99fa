"""The one reader of a run folder, strict; and what is written into one before step 0."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ml_collections
from etils import epath

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.files import is_object, resolve, write_json, write_lines, write_whole
from poisonjax.poison import card
from poisonjax.run import rows, strict
from poisonjax.run.environment import environment


class RunFolderError(ValueError):
    """The folder isn't the run that was asked for, or a file of it is damaged."""


class Missing(RunFolderError):
    """A file that every run has isn't there."""


class RunFolder:
    """A run's folder, read from its files alone: so of one that is at work or was copied here, too.

    Every file is read when it is asked for. All raise RunFolderError, naming file and line, where a file is missing
    that every run has, or isn't as `rows` says.
    """

    def __init__(self, folder: epath.PathLike):
        """Raises RunFolderError where no run of this format is."""
        self.path = resolve(folder)
        if not is_run(self.path):
            raise RunFolderError(f"{folder} is no run folder: it has no {rows.CONFIG}")

    @functools.cached_property
    def record(self) -> rows.ConfigRecord:
        """config.json."""
        value = self._object(rows.CONFIG, dict[str, Any])
        if (there := value.get("format", 1)) != rows.FORMAT:
            raise RunFolderError(
                f"{self.path} has the run folder's format {there}, this version reads {rows.FORMAT} (CHANGELOG.md says "
                "which version reads the other): read it with that, or train again"
            )
        return self._shaped(rows.CONFIG, value, rows.ConfigRecord)

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        try:
            return config_lib.from_record(self.record["config"])
        except config_lib.ConfigError as error:
            raise RunFolderError(f"{self.path / rows.CONFIG}: {error}") from None

    @functools.cached_property
    def environment(self) -> rows.Environment:
        return self._object(rows.ENVIRONMENT, rows.Environment)

    @property
    def summary(self) -> rows.Summary | None:
        """The last word; None while the run is at work, or was killed."""
        try:
            return self._object(rows.SUMMARY, rows.Summary)
        except Missing:  # a run that goes on takes it away
            return None

    def evals(self) -> list[rows.EvalRow]:
        """Evaluations, in order."""
        return [cast(rows.EvalRow, row) for row in self.lines(rows.METRICS) if row["kind"] == "eval"]

    def steps(self) -> list[rows.TrainRow]:
        """Steps that were logged, in order."""
        return [cast(rows.TrainRow, row) for row in self.lines(rows.METRICS) if row["kind"] == "train"]

    def digests(self) -> list[rows.DigestRow]:
        return self.lines(rows.DIGESTS)

    def ledger(self) -> list[rows.LedgerRow]:
        """Every exposure of a poison document, in the order of the run."""
        return self.lines(rows.LEDGER)

    def samples(self) -> list[rows.SampleRow]:
        return self.lines(rows.SAMPLES)

    def prefixes(self) -> list[rows.PrefixRow]:
        return self.lines(rows.PREFIXES)

    def lines(self, file: str) -> list[Any]:
        """Rows of a file of JSON lines; none where there is no such file. A last line that a kill cut short is left
        out."""
        return read_lines(self.path / file, rows.LINES[file])

    def store(self) -> TokenStore:
        """The token store that the run was trained on, opened; raises RunFolderError where another lies there."""
        store, trained = TokenStore(self.config.corpus.store), self.record["store_fingerprint"]
        if store.fingerprint != trained:
            raise RunFolderError(
                f"{self.path} was trained on token store {trained[:12]}, but {store.path} is "
                f"{store.fingerprint[:12]}: rebuild the former, or move it back"
            )
        return store

    def table(self) -> list[dict[str, Any]]:
        """A flat row for each evaluation and variant, as pandas.DataFrame takes them; intervals: `_low`, `_high`."""
        summary = cast(dict[str, Any], self.summary or {})
        about = {name: summary.get(name) for name in ("params", "params_non_embedding", "trigger_tokens")}
        names = ("step", "tokens", "poison_documents", "poison_rows", "heldout_loss", "excess_loss")
        table = []
        for row in self.evals():
            last = row["step"] == self.config.steps
            success = summary["success"]["value"] if last and "success" in summary else None
            shared = about | {name: row.get(name) for name in names} | {"success": success}
            for variant, figures in row["eval"].items():
                flat: dict[str, Any] = {"variant": variant}
                for name in ("ppl_median", "ppl_mean", "nll_mean", "delta_ppl"):
                    low, high = cast(dict, figures).get(f"{name}_ci95", (None, None))
                    flat |= {name: figures.get(name), f"{name}_low": low, f"{name}_high": high}
                table.append(shared | flat)
        return table

    def _object(self, file: str, hint: Any) -> Any:
        path = self.path / file
        try:
            value = strict.parse(path.read_bytes())
        except FileNotFoundError:
            raise Missing(f"{path} is missing") from None
        except ValueError as error:
            raise RunFolderError(f"{path}: no JSON ({error}); the file is damaged") from None
        return self._shaped(file, value, hint)

    def _shaped(self, file: str, value: Any, hint: Any) -> Any:
        if wrong := strict.complaint(value, hint):
            raise RunFolderError(f"{self.path / file}: {wrong}")
        return value


def is_run(folder: epath.PathLike) -> bool:
    """Whether a run folder is there."""
    return (epath.Path(folder) / rows.CONFIG).exists()


def read_lines(path: epath.Path, hint: Any) -> list[Any]:
    """Objects of a file of JSON lines, all of the shape `hint`; raises RunFolderError where one isn't."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = strict.parse(line)
        except ValueError as error:
            raise RunFolderError(f"{path}, line {number}: no JSON ({error}); the file is damaged") from None
        if wrong := strict.complaint(value, hint):
            raise RunFolderError(f"{path}, line {number}: {wrong}")
        found.append(value)
    return found


def begin(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    store: TokenStore,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    twin_of: str | None = None,
) -> None:
    """Writes all that is known before step 0; raises RunFolderError where the folder is another run's.

    `records` are the lines of the files that say what stands in which row. `twin_of`, a run folder, is noted as a path
    from `folder` where both lie on disks, so that they can be moved together.
    """
    _claim(folder, config, store, twin_of)
    write_json(folder / rows.ENVIRONMENT, environment())
    for file, lines in records.items():
        if lines or file == rows.LEDGER:
            write_lines(folder / file, lines)
    if poison := card.make_card(config, records[rows.LEDGER], 0):
        write_whole(folder / card.FILE, card.as_markdown(poison))


def _claim(folder: epath.Path, config: ml_collections.ConfigDict, store: TokenStore, twin_of: str | None) -> None:
    """Writes config.json, or raises RunFolderError where the folder belongs to another config or store."""
    record: dict[str, Any] = {
        "format": rows.FORMAT,
        "config": json.loads(config.to_json()),
        "fingerprint": config_lib.fingerprint(config),
        "store_fingerprint": store.fingerprint,
    }
    if twin_of:
        apart = is_object(twin_of) or is_object(folder)
        record["twin_of"] = str(resolve(twin_of)) if apart else os.path.relpath(twin_of, folder)
    if is_run(folder):
        there = RunFolder(folder)
        if there.record["fingerprint"] != record["fingerprint"]:
            differences = config_lib.differences(config_lib.flat(there.config), config_lib.flat(config))
            raise RunFolderError(
                f"{folder} holds a run of another config; choose another --workdir, or undo:\n" + "\n".join(differences)
            )
        if there.record["store_fingerprint"] != store.fingerprint:
            raise RunFolderError(
                f"{folder} was trained on token store {there.record['store_fingerprint'][:12]}, but {store.path} is "
                f"{store.fingerprint[:12]}: point config.corpus.store to the former, or choose another --workdir"
            )
        record = {**there.record, **record}  # a resumed twin stays one
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / rows.CONFIG, record)


def twin_config(folder: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of the clean twin of a run: the same but for the poison. Raises RunFolderError where there is none."""
    config = RunFolder(folder).config
    if not config.poison.documents:
        raise RunFolderError(f"{folder} is clean itself (poison.documents = 0): it needs no twin")
    return config_lib.replaced(config, {"name": f"{config.name}-twin", "poison.documents": 0})
