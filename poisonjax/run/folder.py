"""The one reader of a run folder, strict; and what is written into one before step 0."""

import contextlib
import functools
import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ml_collections
from etils import epath

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore, exclusions, exists, read_exclusions
from poisonjax.files import is_object, parse_json, resolve, write_json, write_lines, write_whole
from poisonjax.poison import card
from poisonjax.run import rows, strict


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
        """As the run was trained, its store found from the folder; other paths as they were typed (see `placed`)."""
        try:
            config = config_lib.from_record(self.record["config"])
            return config_lib.replaced(config, {"corpus.store": self.from_here(config.corpus.store)})
        except config_lib.ConfigError as error:
            raise RunFolderError(f"{self.path / rows.CONFIG}: {error}") from None

    @functools.cached_property
    def placed(self) -> ml_collections.ConfigDict:
        return placed(self.config, self.path)

    def from_here(self, spec: str) -> str:
        """A path that the run recorded, or a spec with one: from this folder, or where the folder lay in training, of
        which it may be a copy."""
        kind, path = _kind(spec)
        if is_object(path):
            return spec
        trained = self._object(rows.LOCAL, rows.Local)["folder"] if (self.path / rows.LOCAL).exists() else self.path
        if is_object(self.path):  # it may have been copied there
            return spec if is_object(trained) else f"{kind}{os.path.normpath(epath.Path(trained) / path)}"
        here, there = (f"{kind}{os.path.normpath(epath.Path(folder) / path)}" for folder in (self.path, trained))
        return there if _exists(there) and not _exists(here) else here

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

    @property
    def finished(self) -> rows.Summary | None:
        """The last word of a run that is at its end; None where it is damaged: it is made again."""
        with contextlib.suppress(RunFolderError):
            summary = self.summary
            return summary if summary and summary["status"] == "finished" else None
        return None

    def evals(self) -> list[rows.EvalRow]:
        """Evaluations, in order: the run's own, and of other checkpoints those made afterwards."""
        own = {row["step"]: cast(rows.EvalRow, row) for row in self.lines(rows.METRICS) if row["kind"] == "eval"}
        later = {row["step"]: row for of in self.evaluations().values() for row in of["rows"] if row["kind"] == "eval"}
        return [row for _, row in sorted((later | own).items())]

    def evaluations(self) -> dict[int, rows.OfflineEvaluation]:
        """What was measured of checkpoints after the run (`poisonjax evaluate`), by step."""
        folder = self.path / rows.EVALUATIONS
        files = sorted(folder.glob("*.json")) if folder.exists() else []
        found = {
            int(file.stem): self._object(f"{rows.EVALUATIONS}/{file.name}", rows.OfflineEvaluation) for file in files
        }
        if strange := sorted(step for step, of in found.items() if "scorer" in of):
            raise RunFolderError(
                f"{self.path}: {rows.EVALUATIONS} of steps {strange} are by another scorer than the run's: they belong "
                f"into {rows.SCORED}, or away"
            )
        return found

    def scored(self, step: int) -> dict[str, rows.OfflineEvaluation]:
        """What was measured of a checkpoint by other scorers than the run's (`poisonjax evaluate --scorer`), by scorer;
        damaged files are left out: nothing of the run rests on them."""
        folder, found = self.path / rows.SCORED, {}
        for file in sorted(folder.glob(f"*/{step}.json")) if folder.exists() else []:
            with contextlib.suppress(RunFolderError, KeyError):
                one = self._object(f"{rows.SCORED}/{file.parent.name}/{file.name}", rows.OfflineEvaluation)
                found[one["scorer"]] = one
        return found

    def steps(self) -> list[rows.TrainRow]:
        """Steps that were logged, in order."""
        return [cast(rows.TrainRow, row) for row in self.lines(rows.METRICS) if row["kind"] == "train"]

    def digests(self) -> list[rows.DigestRow]:
        return self.lines(rows.DIGESTS)

    def ledger(self) -> list[rows.LedgerRow]:
        """Every exposure of a poison document, in the order of the run."""
        return [row for row in self.lines(rows.LEDGER) if "inherited" not in row]

    def inherited(self) -> list[rows.InheritedRow]:
        """Poison in the weights that the run began from."""
        return [row for row in self.lines(rows.LEDGER) if "inherited" in row]

    def samples(self) -> list[rows.SampleRow]:
        return self.lines(rows.SAMPLES)

    def prefixes(self) -> list[rows.PrefixRow]:
        """Of the evaluations, in order."""
        own = {row["step"]: row for row in self.lines(rows.PREFIXES)}
        later = {row["step"]: row for of in self.evaluations().values() for row in of["prefixes"]}
        return [row for _, row in sorted((later | own).items())]

    def row_losses(self) -> list[rows.RowLossesRow]:
        return self.lines(rows.ROW_LOSSES)

    def lines(self, file: str) -> list[Any]:
        """Rows of a file of JSON lines; none where there is no such file. A last line that a kill cut short is left
        out."""
        return read_lines(self.path / file, rows.LINES[file])

    def raw_lines(self, file: str) -> tuple[list[bytes], bytes]:
        """(the same as they lie, what follows the last line's end)."""
        path = self.path / file
        *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
        return lines, rest

    def store(self, path: str | None = None) -> TokenStore:
        """The token store that the run was trained on, opened, at `path` if it was moved; raises RunFolderError where
        another lies there."""
        path = path or self.config.corpus.store
        if not exists(path):
            raise RunFolderError(
                f"{path} is no token store, but {self.path} was trained on one there: where it was moved, name it by "
                "--store, or move the run with it"
            )
        store = self.without_excluded(TokenStore(path))
        _require_store(self.path, self.record, store, "rebuild the former, or move it back")
        return store

    def without_excluded(self, store: TokenStore) -> TokenStore:
        """The store as if the documents that the run leaves out weren't in it."""
        return store.without(read_exclusions(self.path / exclusions.FILE)) if self.config.corpus.exclude else store

    def table(self) -> list[dict[str, Any]]:
        """A flat row for each evaluation and variant, as pandas.DataFrame takes them; intervals: `_low`, `_high`."""
        summary = cast(dict[str, Any], self.summary or {})
        about = {name: summary.get(name) for name in ("params", "params_non_embedding", "trigger_tokens")}
        names = ("step", "tokens", "poison_documents", "poison_rows", "heldout_loss", "excess_loss")
        table = []
        for row in self.evals():
            last = row["step"] == self.config.steps
            verdict = summary.get("success", {}) if last else {}
            shared = about | {name: row.get(name) for name in names}
            shared |= {"success": verdict.get("value"), "specific": verdict.get("specific")}
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
            value = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise Missing(f"{path} is missing") from None
        except ValueError as error:
            raise RunFolderError(f"{path}: no JSON ({error}); the file is damaged") from None
        return self._shaped(file, value, hint)

    def _shaped(self, file: str, value: Any, hint: Any) -> Any:
        if wrong := strict.complaint(value, hint):
            raise RunFolderError(f"{self.path / file}: {wrong}")
        return value


def as_recorded(config: ml_collections.ConfigDict, folder: epath.Path) -> ml_collections.ConfigDict:
    """The config as it is written down: where its store lies is told from `folder`, so it's no business of those who
    are shown the run, and both can be moved together."""
    return config_lib.replaced(config, {"corpus.store": _from(folder, config.corpus.store)})


def placed(config: ml_collections.ConfigDict, *folders: epath.PathLike | None) -> ml_collections.ConfigDict:
    """The config, models that it names by a path found where the first of the `folders` that is a run says that they
    lie: from wherever one stands, and where they were moved together with it. Elsewhere as they were typed."""
    runs = [RunFolder(folder) for folder in folders if folder and is_run(folder)][:1]
    found = {name: run.from_here(spec) for run in runs for name, spec in run.record.get("paths", {}).items()}
    return config_lib.replaced(config, {name: spec for name, spec in found.items() if _exists(spec)})


def _from(folder: epath.Path, spec: str) -> str:
    """A path, or a spec with one, told from `folder` where both lie on disks."""
    kind, path = _kind(spec)
    return spec if is_object(path) or is_object(folder) else f"{kind}{os.path.relpath(path, folder)}"


def _kind(spec: str) -> tuple[str, str]:
    kind = next((kind for kind in ("hf:", "gguf:", "text:") if spec.startswith(kind)), "")
    return kind, spec.removeprefix(kind)


def _exists(spec: str) -> bool:
    _, path = _kind(spec)
    without = re.sub(r"@\d+$|#\w+$", "", path)  # @step, #field
    return bool(path) and (os.path.exists(path) or bool(glob.glob(without)))


def beside(spec: str, folder: epath.Path) -> str:
    """A spec of weights, `beside:RUN[@STEP]` as the path of a run in the folder that the run in `folder` lies in."""
    named = spec.removeprefix(config_lib.BESIDE)
    return spec if named == spec else str(folder.parent / named)


def is_run(folder: epath.PathLike) -> bool:
    """Whether a run folder is there."""
    return (epath.Path(folder) / rows.CONFIG).exists()


def run_and_step(spec: str) -> tuple[epath.Path, int | None]:
    """(folder, step or None for the newest) of a run's spec."""
    if not is_run(spec) and (found := re.fullmatch(r"(.+)@(\d+)", spec)):  # a path may hold an @ too
        return resolve(found[1]), int(found[2])
    return resolve(spec), None


def read_lines(path: epath.Path, hint: Any) -> list[Any]:
    """Objects of a file of JSON lines, all of the shape `hint`; raises RunFolderError where one isn't."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = parse_json(line)
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
    scorer: str | None = None,
    parent: rows.Parent | None = None,
) -> None:
    """Writes all that is known before step 0; raises RunFolderError where the folder is another run's.

    `records` are the lines of the files that say what stands in which row. `twin_of`, a run folder, is noted as a path
    from `folder` where both lie on disks, so that they can be moved together. `scorer` is what `eval.scorer` names,
    `parent` the weights that the run begins from.
    """
    _claim(folder, config, store, twin_of, scorer, parent)
    if store.exclusions:
        write_whole(folder / exclusions.FILE, store.exclusions.text())
    for file, lines in records.items():
        if file == rows.LEDGER:
            lines = [*inherited_lines(parent), *lines]
        if (folder / file).exists() and read_lines(folder / file, rows.LINES[file]) != [*lines]:
            raise RunFolderError(
                f"{folder / file} isn't what the config plans now: the file was changed, or one that the config names "
                "(poison.payload_vocabulary, poison.payload_source). Restore it, or choose another --workdir"
            )
        if lines or file == rows.LEDGER:
            write_lines(folder / file, lines)
    if poison := card.make_card(config, records[rows.LEDGER], 0, parent, store.planted):
        write_whole(folder / card.FILE, card.as_markdown(poison))


def inherited_lines(parent: rows.Parent | None) -> list[rows.InheritedRow]:
    """The ledger's, of poison in the weights that a run began from."""
    cards = card.inherited(parent)
    return [{"inherited": of["run"], "trigger": of["trigger"], "dose": of["dose_seen"]} for of in cards]


def _claim(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    store: TokenStore,
    twin_of: str | None,
    scorer: str | None,
    parent: rows.Parent | None,
) -> None:
    """Writes config.json, or raises RunFolderError where the folder belongs to another config or store."""
    fields = config_lib.flat(placed(config, folder, twin_of))
    paths = {name: _from(folder, fields[name]) for name in rows.PATHS if _exists(fields[name])}
    record: dict[str, Any] = {
        "format": rows.FORMAT,
        "config": json.loads(as_recorded(config, folder).to_json()),
        "fingerprint": config_lib.fingerprint(config),
        **store.names,
        **({"scorer": scorer} if scorer else {}),
        **({"parent": parent} if parent else {}),
        **({"paths": paths} if paths else {}),
    }
    if twin_of:
        _require_store(resolve(twin_of), RunFolder(twin_of).record, store, "a twin reads the same: rebuild the former")
        apart = is_object(twin_of) or is_object(folder)
        record["twin_of"] = str(resolve(twin_of)) if apart else os.path.relpath(twin_of, folder)
    if is_run(folder):
        there = RunFolder(folder)
        if there.record["fingerprint"] != record["fingerprint"]:
            differences = config_lib.differences(config_lib.flat(there.config), config_lib.flat(config))
            raise RunFolderError(
                f"{folder} holds a run of another config; choose another --workdir, or undo:\n" + "\n".join(differences)
            )
        _require_store(
            folder, there.record, store, "point config.corpus.store to the former, or choose another --workdir"
        )
        require_scorer(folder, there.record, scorer)
        if (began := there.record.get("parent")) != parent:
            raise RunFolderError(
                f"{folder} began from weights {began and began['weights']}, config.start.weights is "
                f"{parent and parent['weights']} now: bring the former back, or choose another --workdir"
            )
        if there.finished:
            return  # nothing of it is touched
        record = {**there.record, **record}  # a resumed twin stays one
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / rows.CONFIG, record)
    if not is_object(folder):  # after it: what it says is told from here now
        write_json(folder / rows.LOCAL, rows.Local(folder=str(folder)))


def _require_store(folder: epath.Path, record: rows.ConfigRecord, store: TokenStore, remedy: str) -> None:
    names = {name for name, there in store.names.items() if cast(dict, record).get(name) != there}
    if "store_fingerprint" in names:
        raise RunFolderError(
            f"{folder} was trained on token store {record['store_fingerprint'][:12]}, but {store.path} is "
            f"{store.fingerprint[:12]}: {remedy}"
        )
    if "store_excluded" in names:
        raise RunFolderError(
            f"{folder} left other documents of {store.path} out than corpus.exclude lists now; it keeps its own list "
            f"in {exclusions.FILE}: restore it, or choose another --workdir"
        )
    if names:
        raise RunFolderError(
            f"{store.path / 'manifest.json'} doesn't say of the store what it said when {folder} began: its sources, "
            "licences or settings were changed"
        )


def require_scorer(folder: epath.Path, record: rows.ConfigRecord, scorer: str | None) -> None:
    """Raises RunFolderError where `eval.scorer` names another model now than when the run began."""
    if record.get("scorer") != scorer:
        raise RunFolderError(
            f"{folder}: eval.scorer was {record.get('scorer')} when the run began, now it is {scorer}: figures of two "
            "scorers don't compare. Bring the former back; to name one step for good write eval.scorer = runs/a@400"
        )


def twin_config(folder: epath.PathLike) -> ml_collections.ConfigDict:
    """The config of the clean twin of a run: the same but for the poison. Raises RunFolderError where there is none."""
    config = RunFolder(folder).config
    if not config.poison.documents:
        raise RunFolderError(f"{folder} is clean itself (poison.documents = 0): it needs no twin")
    return config_lib.replaced(config, {"name": f"{config.name}-twin", "poison.documents": 0})
