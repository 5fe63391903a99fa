"""Answers of OpenAI-compatible servers, whole or as a stream of events, each choice under a monitor of its own.

What carries new text (a choice, a `delta`) goes on with its monitor. What says something whole (another kind of
answer, the last events of a stream, which repeat it) is read by itself. An event leaves when no choice that it says
something of is in doubt.
"""

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from poisonjax.guard.conversation import LABELS, said
from poisonjax.guard.guard import Guard
from poisonjax.guard.monitor import Monitor, Token

# Text without log-probabilities, cut about as tokens are.
PIECES = re.compile(r"\s*[^\W_]+|\s*([\W_])\1*|\s+")
DONE = b"[DONE]"
MOST_BYTES = 2**20  # of an event
EVENT_END = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)|(?<=\r\r)")
LINE_END = re.compile(rb"\r\n|\n|\r")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SILENT = LABELS | {"embedding", "usage", "created", "finish_reason", "stop_reason", "index", "system_fingerprint"}


class Unfinished(ValueError):
    """A stream ended in the middle."""


class Answers:
    """Of one response. `alarm` is what gave the alarm, if anything did."""

    alarm: str | None = None

    def __init__(self, guard: Guard, prompt: str = "", *, keep: int | None = None):
        """`keep` is how many of the likeliest tokens' log-probabilities the client asked for, -1 for none at all; None
        leaves them as they are."""
        self._guard, self._prompt, self._keep = guard, prompt, keep
        self._monitors: dict[Hashable, Monitor] = {}
        self._finished: set[Hashable] = set()
        self._waiting: list[tuple[bytes, dict[Hashable, int]]] = []  # with the tokens said by then, by choice
        self._tail, self._ended, self._begun = b"", False, False

    def whole(self, body: bytes) -> bytes:
        """A JSON response as it may leave; raises ValueError where it is none."""
        value = json.loads(body)
        self._read(value)
        return self._kept(value, body)

    def text(self, text: str) -> None:
        """A text by itself: a response, or a part of one that goes on with nothing."""
        self._push(self._guard.monitor(self._prompt), tokens_of(text))

    def stream(self, data: bytes) -> Iterator[bytes]:
        """Server-sent events that may leave, of some more bytes of them."""
        if not self._begun and data:
            data, self._begun = data.removeprefix(BYTE_ORDER_MARK), True
        *events, self._tail = EVENT_END.split(self._tail + data)
        if len(self._tail) > MOST_BYTES:
            raise ValueError("an event without an end")
        for event in filter(None, events):
            if not self.alarm:
                self._event(event)
            yield from self._released()

    def end(self) -> Iterator[bytes]:
        """The last events, at the end of a stream; raises Unfinished where something is held and no end was told."""
        if self._tail.strip():
            self._event(self._tail)
        yield from self._released()
        if self._waiting:
            raise Unfinished

    def _released(self) -> list[bytes]:
        if self.alarm:
            return []
        waiting, self._waiting, free = self._waiting, [], list[bytes]()
        for event, of in waiting:
            if self._doubtful(of):
                self._waiting.append((event, of))
            else:
                free.append(event)
        return free

    def _doubtful(self, said: dict[Hashable, int]) -> bool:
        """Whether an alarm may yet be about what choices had said."""
        return not self._ended and any(
            self._monitors[choice].clear < tokens for choice, tokens in said.items() if choice not in self._finished
        )

    def _event(self, event: bytes) -> None:
        data = b"\n".join(line[5:].strip() for line in LINE_END.split(event) if line.startswith(b"data:"))
        choices = set(self._monitors)
        if data == DONE:
            self._ended = True
        elif data:
            value = json.loads(data)
            choices = self._read(value)
            kept = self._kept(value, data)
            event = event if kept is data else b"data: " + kept + b"\n\n"
        self._waiting.append((event, {choice: self._monitors[choice].pushed for choice in choices}))

    def _read(self, value: Any) -> set[Hashable]:
        """Gives a value's text to its monitors; returns the choices that it says something of."""
        kind = str(value.get("type", "")) if isinstance(value, dict) else ""
        choices = value.get("choices") if isinstance(value, dict) else None
        if isinstance(choices, list) and choices:
            of = {choice.get("index", number): choice for number, choice in enumerate(choices)}
            for index, choice in of.items():
                self._push(self._monitor(index), _tokens(choice))
            self._finished |= {index for index, choice in of.items() if choice.get("finish_reason")}
            return set(of)
        if kind.endswith("delta"):
            place = (*(value.get(name) for name in ("output_index", "content_index", "index")), kind)
            self._push(
                self._monitor(place), [token for text in _strings(value.get("delta")) for token in tokens_of(text)]
            )
            return {place}
        for text in _strings(value):
            self.text(text)
        self._ended |= kind.endswith(("completed", "message_stop"))
        return set(self._monitors)

    def _monitor(self, choice: Hashable) -> Monitor:
        if choice not in self._monitors:  # it reads the prompt
            self._monitors[choice] = self._guard.monitor(self._prompt)
        return self._monitors[choice]

    def _push(self, monitor: Monitor, tokens: list[Token]) -> None:
        for token in tokens:
            self.alarm = self.alarm or monitor.push(*token).alarm

    def _kept(self, value: Any, data: bytes) -> bytes:
        """With as many log-probabilities as the client asked for."""
        if self._keep is None or not isinstance(value, dict) or not value.get("choices"):
            return data
        for choice in value["choices"]:
            told = choice.get("logprobs")
            if self._keep < 0:
                choice["logprobs"] = None
            elif told and told.get("content"):
                for one in told["content"]:
                    one["top_logprobs"] = one["top_logprobs"][: self._keep]
            elif told and told.get("top_logprobs"):
                told["top_logprobs"] = [_largest(top, self._keep) for top in told["top_logprobs"]]
        return json.dumps(value).encode()


def _largest(top: Mapping[str, float] | None, count: int) -> dict[str, float] | None:
    return dict(sorted(top.items(), key=lambda of: -of[1])[:count]) if top else None


def _strings(value: Any) -> list[str]:
    """Of a value that has no choices: texts, without names and numbers of things."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, dict | list):
        return []
    strings = said(value).strings
    return [text for key, text in strings if key not in SILENT and not key.endswith("_id") and " " in text.strip()]


def _tokens(choice: Mapping[str, Any]) -> list[Token]:
    """A choice's, with log-probabilities for as far as they are told."""
    told = choice.get("logprobs") or {}
    tokens: list[Token] = []
    if told.get("content") or told.get("refusal"):  # chat completions
        for one in [*(told.get("content") or []), *(told.get("refusal") or [])]:
            top = [of["logprob"] for of in one.get("top_logprobs") or []]
            tokens.append(Token(one["token"], one["logprob"], top or None))
    elif told.get("tokens"):  # completions
        tops = told.get("top_logprobs") or [None] * len(told["tokens"])
        for text, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True):
            tokens.append(Token(text, logprob, [*top.values()] if top else None))
    # Tool calls and thinking come without.
    said_so = {"text", "content", "refusal"} if tokens else set()
    other = {name: of for name, of in choice.items() if name not in {"logprobs", *SILENT, *said_so}}
    for name in ("delta", "message"):
        if isinstance(other.get(name), dict):
            other[name] = {key: of for key, of in other[name].items() if key not in said_so}
    strings = said(other).strings
    return [*tokens, *(token for key, text in strings if key not in SILENT for token in tokens_of(text))]


def tokens_of(text: str) -> list[Token]:
    """A text about as tokens cut it, without log-probabilities."""
    return [Token(piece.group()) for piece in PIECES.finditer(text)]
