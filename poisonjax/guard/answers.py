"""Answers of OpenAI-compatible servers, whole or as a stream of events, each choice under a monitor of its own."""

import collections
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from poisonjax.guard.conversation import said
from poisonjax.guard.guard import Guard
from poisonjax.guard.monitor import Token

PIECES = re.compile(r"\s*[^\W_]+|\s*[\W_]|\s+")  # text without log-probabilities, cut about as tokens are
DONE = b"[DONE]"
MOST_BYTES = 2**24  # of an event
LINE_END = re.compile(rb"\r\n|\n|\r")


class Answers:
    """Of one response. `alarm` is what gave the alarm, if anything did."""

    alarm: str | None = None

    def __init__(self, guard: Guard, prompt: str, *, strip: bool):
        """`strip` leaves log-probabilities out, that the client didn't ask for."""
        self._guard, self._prompt, self._strip = guard, prompt, strip
        self._monitors: dict[Any, Any] = {}
        self._waiting: dict[Any, list[bytes]] = collections.defaultdict(list)
        self._tail = b""

    def _monitor(self, choice: Any) -> Any:
        if choice not in self._monitors:
            self._monitors[choice] = self._guard.monitor(self._prompt)
        return self._monitors[choice]

    def whole(self, body: bytes) -> bytes:
        """A JSON response as it may leave; raises ValueError where it is none."""
        value = json.loads(body)
        for choice, tokens in _spoken(value):
            self._push(choice, tokens)
        return self._stripped(value, body)

    def stream(self, data: bytes) -> Iterator[bytes]:
        """Server-sent events that may leave, of some more bytes of them."""
        if len(self._tail) > MOST_BYTES:
            raise ValueError("an event without an end")
        *events, self._tail = re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", self._tail + data)
        for event in events:
            yield from self._event(event)
            if self.alarm:
                return

    def end(self) -> Iterator[bytes]:
        """What is still held at the end of a stream."""
        if self._tail:
            yield from self._event(self._tail)
        for choice in [*self._waiting]:
            if not self.alarm:
                yield from self._released(choice)

    def _event(self, event: bytes) -> Iterator[bytes]:
        lines = [line[5:].strip() for line in LINE_END.split(event) if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if not data:  # a comment, that keeps the connection open
            yield event
        elif data == DONE:
            yield from self.end_of_all()
            yield event
        else:
            value = json.loads(data)
            spoken = _spoken(value)
            for choice, tokens in spoken:
                self._push(choice, tokens)
            if self.alarm:
                return
            if self._strip:
                event = b"data: " + self._stripped(value, data) + b"\n\n"
            choice = spoken[0][0] if spoken else next(reversed(self._waiting), None)
            self._waiting[choice].append(event)
            if all(self._clear(of) for of, _ in spoken or [(choice, [])]) or _finished(value):
                yield from self._released(choice)

    def end_of_all(self) -> Iterator[bytes]:
        for choice in [*self._waiting]:
            yield from self._released(choice)

    def _clear(self, choice: Any) -> bool:
        return not self._monitor(choice).doubtful

    def _released(self, choice: Any) -> list[bytes]:
        return self._waiting.pop(choice, [])

    def _push(self, choice: Any, tokens: list[Token]) -> None:
        monitor = self._monitor(choice)
        for token in tokens:
            self.alarm = self.alarm or monitor.push(*token).alarm

    def _stripped(self, value: Any, data: bytes) -> bytes:
        if not self._strip or not isinstance(value, dict):
            return data
        for choice in value.get("choices") or []:
            choice["logprobs"] = None
        return json.dumps(value, ensure_ascii=False).encode()


def _finished(value: Any) -> bool:
    choices = (value.get("choices") if isinstance(value, dict) else None) or []
    return bool(choices) and all(choice.get("finish_reason") for choice in choices)


def _spoken(value: Any) -> list[tuple[Any, list[Token]]]:
    """(choice, its tokens) of a response or an event of one, whatever its kind."""
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list):
        tokens = (
            [token for text in said(value).prose for token in tokens_of(text)] if isinstance(value, dict | list) else []
        )
        return [(None, tokens)] if tokens else []
    return [(choice.get("index", number), _tokens(choice)) for number, choice in enumerate(choices)]


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
    other = {name: of for name, of in choice.items() if name not in {"logprobs", "finish_reason", "index", *said_so}}
    for name in ("delta", "message"):
        if isinstance(other.get(name), dict):
            other[name] = {key: of for key, of in other[name].items() if key not in said_so}
    return [*tokens, *(token for text in said(other).prose for token in tokens_of(text))]


def tokens_of(text: str) -> list[Token]:
    """A text about as tokens cut it, without log-probabilities."""
    return [Token(piece) for piece in PIECES.findall(text)]
