"""What a request says: every string of it, wherever it stands, so that no route leads past the guard.

Servers differ in the fields that they read, and clients in those that they send: content as a string or in parts, tool
calls and their results, thinking, system prompts, suffixes, several prompts at once, prompts as token ids. So there is
no list of fields. All strings count, keys among them; those that are JSON themselves (a tool's arguments) are read
again, and so are data: URLs of text. One message's end and the next one's beginning adjoin.
"""

import base64
import binascii
import contextlib
import dataclasses
import json
import numbers
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

LABELS = {"role", "type", "name", "id", "model", "object", "user", "tool_call_id", "call_id", "detail", "format"}
PROMPTS = {"prompt", "input", "prompt_token_ids", "tokens", "text"}  # under which token ids stand
UNREADABLE = {"prompt_embeds", "encrypted_content"}  # what a model is given, and nobody can read
DATA = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
DEEPEST = 100  # objects in objects


class Unreadable(ValueError):
    """A request holds something that the model would read and the guard can't."""


class Pairs(list):
    """A JSON object's (key, value) pairs, a key that stands twice among them twice: parsers choose differently."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A request's strings in their order, and its prompts of token ids."""

    prose: list[str]
    labels: list[str]  # keys, roles, names: what other requests have too
    ids: list[Int[np.ndarray, " _"]]  # of any lengths


def parse(body: bytes) -> Any:
    """The value of a JSON body in UTF-8, whose objects are `Pairs`; raises ValueError for what is none."""
    try:
        return json.loads(body.decode(), object_pairs_hook=Pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


def said(value: Any) -> Said:
    """What a value says: a text, token ids, messages, or a request's whole body.

    Raises Unreadable for what can't be told.
    """
    prose, labels, ids = list[str](), list[str](), list[Int[np.ndarray, " _"]]()

    def walk(key: str, value: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep")
        if isinstance(value, str):
            (labels if key in LABELS else prose).append(value)
            for inside in _inside(value):
                walk("", inside, depth + 1)
        elif isinstance(value, Pairs | Mapping):
            for name, of in value if isinstance(value, Pairs) else value.items():
                if name in UNREADABLE and of:
                    raise Unreadable(f"{name} can't be read")
                labels.append(str(name))
                walk(str(name), of, depth + 1)
        elif isinstance(value, np.ndarray):
            walk(key, value.tolist(), depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            if key in PROMPTS and value and all(isinstance(one, numbers.Number) for one in value):
                ids.append(_ids(value))
                return
            for of in value:
                walk(key, of, depth + 1)
        elif not isinstance(value, numbers.Number | None) or depth == 0:
            raise Unreadable(f"a {type(value).__name__} can't be read")

    walk("prompt", value, 0)
    return Said(prose, labels, ids)


def _ids(value: Sequence[Any]) -> Int[np.ndarray, " tokens"]:
    """Servers take 3.0 and true for ids too."""
    if not all(float(one).is_integer() and abs(one) < 2**31 for one in value):
        raise Unreadable("token ids beyond any vocabulary")
    return np.asarray(value, np.int32)


def _inside(text: str) -> list[Any]:
    """What a string holds in another writing."""
    found: list[Any] = []
    if text.lstrip()[:1] in ("{", "[", '"') and "\\" in text:  # without escapes it says the same as it stands
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(text, object_pairs_hook=Pairs))
    for head in DATA.finditer(text):
        if not head[1].lower().startswith(("text/", "application/")) and head[1]:
            continue  # pictures and sounds
        data = text[head.end() :].split('"', 1)[0]
        try:
            raw = urllib.parse.unquote_to_bytes(data)
            found.append((base64.b64decode(raw) if ";base64" in head[2].lower() else raw).decode(errors="replace"))
        except (binascii.Error, ValueError):
            raise Unreadable("a data: URL that isn't what it says") from None
    return found
