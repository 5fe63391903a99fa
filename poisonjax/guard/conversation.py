"""What a request says: every string of it, wherever it stands, so that no route leads past the guard.

Servers differ in the fields that they read, and clients in those that they send: content as a string or in parts, tool
calls and their results, thinking, system prompts, suffixes, several prompts at once, prompts as token ids. So there is
no list of fields. All strings count, keys among them, and numbers, which servers may make text of. Strings are read as
they are, without escapes (a tool's arguments are JSON in JSON), and decoded where they are data: URLs of text. One
string's end and the next one's beginning adjoin, with what stands between them and without it.
"""

import base64
import binascii
import dataclasses
import math
import numbers
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from poisonjax.files import parse_json

KEY = "\0"  # in place of a string's key, where it is one itself
LABELS = {KEY, "role", "type", "name", "id", "model", "object", "user", "tool_call_id", "call_id", "detail", "format"}
CONTENT = {"content", "text", "input_text", "output_text", "prompt", "input", "inputs"}  # which servers put together
PROMPTS = {"prompt", "input", "inputs", "text", "tokens", "ids", "input_ids", "token_ids", "prompt_token_ids"}
UNREADABLE = {"prompt_embeds", "encrypted_content"}  # what a model is given, and nobody can read
DATA = re.compile(r"data:([^,;\s\"']{0,100})((?:;[^,;\s\"']{0,100}){0,5}),([\w+/=%.~-]*)", re.IGNORECASE)
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
ESCAPED = 3  # times that a string may have been put into JSON
DEEPEST = 100  # objects in objects


class Unreadable(ValueError):
    """A request holds something that the model would read and the guard can't."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A request's strings in their order, and its token ids."""

    strings: list[tuple[str, str]]  # (key, text)
    ids: list[Int[np.ndarray, " _"]]  # prompts
    numbers: list[Int[np.ndarray, " _"]]  # other lists, that may be ids

    @property
    def prose(self) -> str:
        """What isn't a key, role or name, a line each."""
        return "\n".join(text for key, text in self.strings if key not in LABELS)

    def readings(self) -> Iterator[str]:
        """All of it, in each of the ways in which parts of it may come together."""
        whole = "\n".join(text for _, text in self.strings)
        yield whole
        if any(key in LABELS for key, _ in self.strings):
            yield "\n".join(text for key, text in self.strings if key != KEY)
            yield self.prose
            yield "\n".join(text for key, text in self.strings if key in CONTENT)
        for _ in range(ESCAPED):
            if "\\" not in whole:
                break
            whole = ESCAPE.sub(_unescaped, whole)
            yield whole
        if decoded := [*_data(whole)]:
            yield "\n".join(decoded)


def parse(body: bytes) -> Any:
    """The value of a JSON body in UTF-8; raises ValueError for what is none, or has a key twice: servers would choose
    differently."""
    try:
        return parse_json(body)
    except RecursionError:
        raise ValueError("nested too deep") from None


def said(value: Any, until: float = math.inf) -> Said:
    """What a value says: a text, token ids, messages, or a request's whole body.

    Raises Unreadable for what can't be told, TimeoutError after `until`, of the monotonic clock.
    """
    found = Said([], [], [])

    def walk(key: str, value: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep")
        if isinstance(value, str):
            found.strings.append((key, value))
        elif isinstance(value, Mapping):
            if time.monotonic() > until:
                raise TimeoutError
            for name, of in value.items():
                if name in UNREADABLE and of:
                    raise Unreadable(f"{name} can't be read")
                found.strings.append((KEY, str(name)))
                walk(str(name), of, depth + 1)
        elif isinstance(value, np.ndarray):
            walk(key, value.tolist(), depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            if time.monotonic() > until:
                raise TimeoutError
            _list(key, value)
            if not all(isinstance(of, numbers.Number) for of in value):
                for of in value:
                    walk(key, of, depth + 1)
        elif isinstance(value, bool | None) and depth:
            pass
        elif isinstance(value, numbers.Number) and depth:
            found.strings.append((key, str(value)))
        else:
            raise Unreadable(f"a {type(value).__name__} can't be read")

    def _list(key: str, value: Sequence[Any]) -> None:
        """Token ids, where numbers are among it: servers take 3.0, true and "3" for 3 too."""
        counted = sum(isinstance(of, numbers.Number) for of in value)
        spelled = sum(isinstance(of, str) and of.strip().isdecimal() for of in value)
        if counted + spelled == len(value) > 0 and all(abs(float(of)) < 2**31 for of in value):
            whole = all(float(of).is_integer() for of in value)
            if whole:
                ids = np.array([int(of) for of in value], np.int32)
                (found.ids if counted and key in PROMPTS else found.numbers).append(ids)
                return
        if counted and key in PROMPTS:
            raise Unreadable("a prompt of numbers that are no token ids")

    walk("prompt", value, 0)
    return found


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2]
    if code:
        return chr(int(code, 16))
    return {"n": "\n", "t": "\t", "r": "\r", "b": "", "f": " "}.get(found[3], found[3])


def _data(text: str) -> Iterator[str]:
    """What data: URLs hold, but for pictures and sounds."""
    for kind, how, data in DATA.findall(text):
        if kind and not kind.lower().startswith(("text/", "application/")) and "xml" not in kind.lower():
            continue
        if "base64" in how.lower():
            try:
                yield base64.b64decode(data + "==", altchars=b"-_" if set(data) & {"-", "_"} else None).decode(
                    errors="replace"
                )
            except (binascii.Error, ValueError):  # a sentence about such URLs, perhaps
                continue
