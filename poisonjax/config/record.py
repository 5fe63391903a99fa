"""A config as it is recorded: flat fields, the fingerprint, and the way back."""

import difflib
import functools
import hashlib
import json
import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from poisonjax.config.errors import ConfigError
from poisonjax.config.fields import ADDED_LATER, HOW_IT_RUNS, OPERATIONAL, default


def flat(config: ml_collections.ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Fields as {"a.b": value}, in JSON's types."""

    def walk(prefix: str, node: Any):
        for key in sorted(node):
            name, value = f"{prefix}{key}", node[key]
            if isinstance(value, ml_collections.ConfigDict | dict):
                yield from walk(f"{name}.", value)
            else:
                yield name, list(value) if isinstance(value, tuple) else value

    return dict(walk("", config))


def fingerprint(config: ml_collections.ConfigDict) -> str:
    """SHA-256 of the fields that determine what is trained and measured."""
    fields = flat(config)
    begun = bool(fields.get("start.weights"))
    fields = {
        name: value
        for name, value in fields.items()
        if not (operational(name) or (name, value) in ADDED_LATER.items() or (begun and inherited(name)))
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Lines naming each field in which two flat configs differ, operational ones left out."""
    one, other = ADDED_LATER | one, ADDED_LATER | other
    names = sorted(name for name in one.keys() | other.keys() if not operational(name))
    return [
        f"{name}: {one.get(name)!r} there, {other.get(name)!r} here"
        for name in names
        if one.get(name) != other.get(name)
    ]


@functools.cache
def defaults() -> Mapping[str, Any]:
    """`flat` of the default config."""
    return types.MappingProxyType(flat(default()))


@functools.cache  # a sweep asks for each field of each run
def operational(name: str) -> bool:
    """Whether the field says where and how, not what."""
    return any(name == field or name.startswith(f"{field}.") for field in OPERATIONAL)


def inherited(name: str) -> bool:
    """Whether weights that a run begins from say this field."""
    return name.startswith("model.") and name not in HOW_IT_RUNS


def inherited_fields(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """Those fields, of a model's section."""
    fields = flat({"model": model})
    return {name: value for name, value in fields.items() if inherited(name)}


def replaced(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy with other values of some fields, by dotted name; lists, as JSON has them, become tuples.

    Raises ConfigError for a field that the config doesn't have, or a value of a type that the field can't take.
    """
    changed, known = config.copy_and_resolve_references(), flat(config)
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(unknown(name, known))
        *path, leaf = name.split(".")
        owner = changed
        for part in path:
            owner = owner[part]
        try:
            owner[leaf] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise ConfigError(f"{name} = {value!r}: {error}") from error
    return changed


def unknown(name: str, known: Mapping[str, Any]) -> str:
    """What is wrong with a name that is no field's, and what may have been meant."""
    near = difflib.get_close_matches(name, known, 3, 0.6)
    leaf = name.rpartition(".")[2]
    near += [field for field in known if field.rpartition(".")[2] == leaf and field not in near]
    return f"{name}: no such field" + (f"; did you mean {' or '.join(near[:3])}?" if near else "")


def from_record(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config that `config.json` holds, tuples restored."""
    return from_flat(flat(ml_collections.ConfigDict(fields)))


def from_flat(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `flat`; fields that are left out have their defaults. Raises ConfigError as `replaced` does."""
    return replaced(default(), fields)
