"""What a guarded server sends, as far as it may leave."""

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import Any

from poisonjax.guard.answers import Answers

Message = MutableMapping[str, Any]


class Response:
    """What the server sends, as far as it may leave."""

    def __init__(self, answers: Answers, send: Any, told: Callable[[], None]):
        self._answers, self._send, self._told = answers, send, told
        self._start: Message | None = None
        self._kind, self._body, self._over = "", bytearray(), asyncio.Event()

    def until_refused(self, receive: Any) -> Any:
        """The client's messages, or that it is gone once the answer is refused: the server may stop then."""

        async def receive_or_refused() -> Message:
            told, over = asyncio.ensure_future(receive()), asyncio.ensure_future(self._over.wait())
            done, pending = await asyncio.wait({told, over}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            return told.result() if told in done else {"type": "http.disconnect"}

        return receive_or_refused

    async def send(self, message: Message) -> None:
        if self._over.is_set():
            return
        if message["type"] == "http.response.start":
            self._start = message
            headers = {name.lower(): value for name, value in message["headers"]}
            kind = headers.get(b"content-type", b"").decode("latin-1")
            self._kind = "stream" if "event-stream" in kind else "json" if "json" in kind else "other"
            if self._kind == "stream" or (self._kind == "other" and not kind.startswith("text/")):
                await self._send(_without_length(message) if self._kind == "stream" else message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._kind == "stream":
            await self._streamed(message.get("body", b""), message.get("more_body", False))
        elif self._kind == "other" and self._start and not _is_text(self._start):
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._whole()

    async def _streamed(self, data: bytes, more: bool) -> None:
        try:
            out = b"".join([*self._answers.stream(data), *(() if more else self._answers.end())])
            refused = self._answers.alarm is not None
        except (ValueError, TypeError, KeyError, AttributeError):  # no events that can be read
            out, refused = b"", True
        if not refused and (out or not more):
            await self._send({"type": "http.response.body", "body": out, "more_body": more})
        if refused:
            error = b"data: " + _error("content_filter", "the answer was stopped by the guard") + b"\n\n"
            await self._send({"type": "http.response.body", "body": error, "more_body": False})
        if refused or not more:
            self._end()

    async def _whole(self) -> None:
        assert self._start
        try:
            body = bytes(self._body)
            if self._start["status"] < 400 and body:
                body = self._answers.whole(body if self._kind == "json" else json.dumps([body.decode()]).encode())
                body = body if self._kind == "json" else bytes(self._body)
        except (ValueError, TypeError, KeyError, AttributeError):
            self._end()
            return await refuse(self._send, 502, "unreadable", "the server's answer can't be read")
        self._end()
        if self._answers.alarm:
            return await refuse(self._send, 400, "content_filter", "the answer was stopped by the guard")
        await self._send(_without_length(self._start, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    def _end(self) -> None:
        self._over.set()
        self._told()

    async def close(self) -> None:
        """Where the server stopped in the middle."""
        if not self._over.is_set() and self._kind == "stream":
            await self._streamed(b"", False)


def _is_text(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/") for name, value in start["headers"])


def _without_length(start: Message, length: int | None = None) -> Message:
    headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    return {**start, "headers": headers if length is None else [*headers, (b"content-length", str(length).encode())]}


def replayed(body: bytes, receive: Any) -> Any:
    """The body once more, then what the client says after it."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _error(code: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "guard", "param": None, "code": code}}).encode()


async def refuse(send: Any, status: int, code: str, message: str) -> None:
    """An error in the form of OpenAI's."""
    body = _error(code, message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
