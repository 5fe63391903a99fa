"""Values of the shape that `rows` says, or refused."""

import functools
from typing import Any

import pydantic


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
