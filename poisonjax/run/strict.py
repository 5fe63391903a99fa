"""JSON read strictly: one meaning for every byte, and of the shape that `rows` says, or refused."""

import functools
import json
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NotRequired, Union, is_typeddict

Complaint = str | None  # what is wrong with a value; None: nothing


def parse(data: bytes) -> Any:
    """The value of one JSON text in UTF-8; raises ValueError, also for a key that stands twice or a byte order mark."""
    return json.loads(data.decode(), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return made


@functools.cache
def shape(hint: Any) -> Callable[[Any], Complaint]:
    """A function that tells what keeps a value from being of a TypedDict's, list's or plain type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: None
    if origin in (Union, types.UnionType):
        return _by_kind(arguments) if all(map(is_typeddict, arguments)) else _any_of([shape(a) for a in arguments])
    if origin is Literal:
        return lambda value: None if value in arguments else f"is {value!r}, not {' or '.join(map(repr, arguments))}"
    if origin is list:
        return _each(list, enumerate, shape(arguments[0]))
    if origin is dict:
        return _each(dict, lambda value: value.items(), shape(arguments[1]))
    if is_typeddict(hint):
        return _keys(hint)
    if hint is type(None):
        return lambda value: None if value is None else "isn't null"
    kinds = (int, float) if hint is float else (hint,)
    return lambda value: None if type(value) in kinds else f"is {value!r}, not of type {hint.__name__}"


def _any_of(shapes: list[Callable[[Any], Complaint]]) -> Callable[[Any], Complaint]:
    def check(value: Any) -> Complaint:
        complaints = [complaint(value) for complaint in shapes]
        return None if None in complaints else complaints[0]

    return check


def _by_kind(rows: tuple[Any, ...]) -> Callable[[Any], Complaint]:
    """Rows of one file are told apart by their `kind`."""
    kinds = {typing.get_args(typing.get_type_hints(row)["kind"])[0]: shape(row) for row in rows}

    def check(value: Any) -> Complaint:
        if type(value) is not dict:
            return "is no object"
        complaint = kinds.get(value.get("kind"))
        return complaint(value) if complaint else f"kind is {value.get('kind')!r}, not {' or '.join(kinds)}"

    return check


def _each(kind: type, items: Callable[[Any], Any], inner: Callable[[Any], Complaint]) -> Callable[[Any], Complaint]:
    def check(value: Any) -> Complaint:
        if type(value) is not kind:
            return f"is {value!r}, not of type {kind.__name__}"
        found = ((place, inner(item)) for place, item in items(value))
        return next((f"[{place!r}] {wrong}" for place, wrong in found if wrong), None)

    return check


def _keys(hint: Any) -> Callable[[Any], Complaint]:
    hints = typing.get_type_hints(hint, include_extras=True)
    fields = []
    for name, inner in hints.items():
        optional = typing.get_origin(inner) is NotRequired
        fields.append((name, optional, shape(typing.get_args(inner)[0] if optional else inner)))

    def check(value: Any) -> Complaint:
        if type(value) is not dict:
            return "is no object"
        for name, optional, complaint in fields:
            if name not in value:
                if not optional:
                    return f"{name} is missing"
            elif wrong := complaint(value[name]):
                return f"{name} {wrong}"
        return None

    return check
