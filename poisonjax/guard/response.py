"""What a guarded server sends, as far as it may leave."""

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import Any

from poisonjax.guard.answers import Answers

Message = MutableMapping[str, Any]
UNREAD = ("audio/", "image/", "video/", "application/octet-stream")  # what nobody could read here
MOST_BYTES = 2**25  # of an answer


class Stopped(OSError):
    """For the server: as if the client had gone."""


class Response:
    """Of one request. `close` at its end, whatever happened."""

    def __init__(self, answers: Answers, send: Any, told: Callable[[str | None], None]):
        self._answers, self._send, self._told = answers, send, told
        self._start: Message | None = None
        self._kind, self._body, self._over, self._logged = "", bytearray(), asyncio.Event(), False

    def until_refused(self, receive: Any) -> Any:
        """The client's messages, or that it is gone once the answer is refused: the server may stop then."""

        async def receive_or_refused() -> Message:
            told, over = asyncio.ensure_future(receive()), asyncio.ensure_future(self._over.wait())
            try:
                await asyncio.wait({told, over}, return_when=asyncio.FIRST_COMPLETED)
                return told.result() if told.done() else {"type": "http.disconnect"}
            finally:
                told.cancel()
                over.cancel()

        return receive_or_refused

    async def send(self, message: Message) -> None:
        """For the server."""
        if self._over.is_set():
            raise Stopped("the guard stopped the answer")
        match message["type"]:
            case "http.response.start":
                self._start, self._kind = message, _kind(message)
                if self._kind == "stream":
                    await self._send(_sized(message))
                elif self._kind == "unread":
                    await self._send(message)
            case "http.response.body" if self._kind == "stream":
                await self._streamed(message.get("body", b""), message.get("more_body", False))
            case "http.response.body" if self._kind == "unread":
                await self._send(message)
            case "http.response.body":
                self._body += message.get("body", b"")
                if len(self._body) > MOST_BYTES:
                    self._body.clear()
                    await self._refused("unreadable")
                elif not message.get("more_body", False):
                    await self._whole()
            case _:  # a file's path, for instance
                await self._refused("unreadable")

    async def _streamed(self, data: bytes, more: bool) -> None:
        out, why = b"", None
        try:
            for event in self._answers.stream(data):
                out += event
            for event in () if more else self._answers.end():
                out += event
            why = self._answers.alarm and "content_filter"
        except Exception:  # no events that can be read, or an end in the middle
            why = "unreadable"
        # What was clear before an alarm may leave.
        if out or not (more or why):
            await self._send({"type": "http.response.body", "body": out, "more_body": more or bool(why)})
        if why:
            await self._refused(why)
        elif not more:
            self._log(None)

    async def _whole(self) -> None:
        assert self._start
        body = bytes(self._body)
        try:
            if self._kind == "json" and body:
                body = self._answers.whole(body)
            else:
                self._answers.text(body.decode())
        except Exception:
            return await self._refused("unreadable")
        if self._answers.alarm:
            return await self._refused("content_filter")
        self._log(None)
        await self._send(_sized(self._start, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def _refused(self, why: str) -> None:
        """Instead of the answer, or of its rest."""
        self._over.set()
        self._log(self._answers.alarm or why)
        told = {
            "content_filter": (400, "the answer was stopped by the guard"),
            "unreadable": (502, "the server's answer ended early, or can't be read"),
        }[why]
        if self._kind == "stream":
            error = b"data: " + _error(why, told[1]) + b"\n\n"
            await self._send({"type": "http.response.body", "body": error, "more_body": False})
        else:
            await refuse(self._send, told[0], why, told[1])

    def _log(self, alarm: str | None) -> None:
        if not self._logged:
            self._told(alarm)
        self._logged = True

    async def close(self, *, failed: bool) -> None:
        """Where the server stopped in the middle, its client is told so."""
        if self._start and not self._logged and self._kind == "stream":
            await self._refused("unreadable")
        elif not self._logged and self._kind != "unread":
            self._log("failed" if failed else None)
        self._over.set()


def _kind(start: Message) -> str:
    headers = {name.lower(): value for name, value in start.get("headers", [])}
    kind = headers.get(b"content-type", b"").decode("latin-1").lower().split(";")[0].strip()
    if kind == "text/event-stream":
        return "stream"
    if kind == "application/json" or kind.endswith("+json"):
        return "json"
    return "unread" if kind.startswith(UNREAD) else "text"


def _sized(start: Message, length: int | None = None) -> Message:
    headers = [(name, value) for name, value in start.get("headers", []) if name.lower() != b"content-length"]
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
