"""JSON read strictly: one meaning for every byte, and of the shape that `rows` says, or refused."""

import functools
import json
from typing import Any

import pydantic


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
def _shape(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint)


def complaint(value: Any, hint: Any) -> str | None:
    """What keeps a value from being of a type of `rows`, to the letter (4.0 is no whole number); None: nothing."""
    try:
        _shape(hint).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the value"
        return f"{place}: {first['msg']}" + ("" if first["type"] == "missing" else f", not {first['input']!r:.60}")
    return None
