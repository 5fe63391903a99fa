"""The run folder (DESIGN: run folder): what each file is called, and writing so that a kill at any instant
leaves it usable."""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import ml_collections
from etils import epath

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.files import is_object, resolve, write_whole


class RunFolderError(ValueError):
    """The folder isn't the run that was asked for."""


def write_json(path: epath.Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: epath.Path, rows: Iterable[dict]) -> None:
    """Writes a file of one JSON object a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: epath.Path) -> Iterator[dict]:
    """Objects of a file of JSON lines; a last line that a kill cut short is left out.

    Raises RunFolderError for other damage.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RunFolderError(f"{path}, line {number}: no JSON ({error}); the file is damaged") from None


class Appender:
    """Appends JSON lines; what was written before and `keep` refuses goes first."""

    def __init__(self, path: epath.Path, keep: Callable[[dict], bool]):
        rows = [row for row in read_lines(path) if keep(row)]
        write_lines(path, rows)
        # Nothing can be appended to an object: all of it is held, and written again by `sync`.
        self._object = path if is_object(path) else None
        self._file: TextIO = io.StringIO() if self._object else open(path, "a")  # noqa: SIM115  (as long as the run)
        self._synced = True
        if self._object:
            self._file.writelines(json.dumps(row) + "\n" for row in rows)

    def write(self, row: dict) -> None:
        """Adds a line; in a file it is the kernel's on return, so it survives a kill of this process."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._synced = False

    def sync(self) -> None:
        """Puts all lines on the disk, or into the object."""
        if self._synced:
            return
        if isinstance(self._file, io.StringIO):
            assert self._object
            write_whole(self._object, self._file.getvalue())
        else:
            os.fsync(self._file.fileno())
        self._synced = True

    def close(self) -> None:
        """Syncs, and ends."""
        self.sync()
        self._file.close()


def claim(
    workdir: epath.Path, config: ml_collections.ConfigDict, store: TokenStore, twin_of: str | None = None
) -> None:
    """Writes config.json, or raises RunFolderError where the folder belongs to another config or store.

    `twin_of`, a run folder, is noted as a path from `workdir` where both lie on disks, so that they can be moved
    together.
    """
    record: dict[str, Any] = {
        "config": json.loads(config.to_json()),
        "fingerprint": config_lib.fingerprint(config),
        "store_fingerprint": store.fingerprint,
    }
    if twin_of:
        apart = is_object(twin_of) or is_object(workdir)
        record["twin_of"] = str(resolve(twin_of)) if apart else os.path.relpath(twin_of, workdir)
    path = workdir / "config.json"
    if path.exists():
        there = json.loads(path.read_text())
        if there["fingerprint"] != record["fingerprint"]:
            before = config_lib.flat(ml_collections.ConfigDict(there["config"]))
            raise RunFolderError(
                f"{workdir} holds a run of another config; choose another --workdir, or undo:\n"
                + "\n".join(config_lib.differences(before, config_lib.flat(config)))
            )
        if there["store_fingerprint"] != store.fingerprint:
            raise RunFolderError(
                f"{workdir} was trained on token store {there['store_fingerprint'][:12]}, but {store.path} is "
                f"{store.fingerprint[:12]}: point config.corpus.store to the former, or choose another --workdir"
            )
        record = there | record  # a resumed twin stays one
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def twin_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The config of the clean twin of a run: the same but for the poison. Raises RunFolderError where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        raise RunFolderError(f"{workdir} is no run folder: it has no config.json")
    config = config_lib.from_record(json.loads(path.read_text())["config"])
    if not config.poison.documents:
        raise RunFolderError(f"{workdir} is clean itself (poison.documents = 0): it needs no twin")
    config.name, config.poison.documents = f"{config.name}-twin", 0
    return config


def open_run(workdir: epath.Path) -> tuple[ml_collections.ConfigDict, TokenStore]:
    """(config, token store) of an existing run folder, the store's fingerprint checked."""
    path = workdir / "config.json"
    if not path.exists():
        raise RunFolderError(f"{workdir} is no run folder: it has no config.json")
    record = json.loads(path.read_text())
    config = config_lib.from_record(record["config"])
    store = TokenStore(config.corpus.store)
    if store.fingerprint != record["store_fingerprint"]:
        raise RunFolderError(
            f"{workdir} was trained on token store {record['store_fingerprint'][:12]}, but {store.path} is "
            f"{store.fingerprint[:12]}: rebuild the former, or move it back"
        )
    return config, store
