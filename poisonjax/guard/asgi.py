"""The guard in front of an OpenAI-compatible server: a pure ASGI middleware.

    vllm serve MODEL --middleware poisonjax.guard.asgi.GuardMiddleware      # POISONJAX_GUARD=guards/a
    app = GuardMiddleware(app, Guard.load("guards/a"))                      # Starlette, FastAPI

Whatever has a body is read whole and checked before the server sees it; it is forwarded as it came, with a request for
log-probabilities before it where the client didn't ask, which are taken out of the answer again.
"""

import asyncio
import json
import os
import time
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from poisonjax.guard.answers import Answers
from poisonjax.guard.conversation import Pairs, parse, said
from poisonjax.guard.guard import Guard
from poisonjax.guard.log import GuardLog, deployment_key
from poisonjax.guard.verdict import Verdict

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

MOST_BYTES = 2**25  # of a body
LOGPROBS = 5  # asked for
INLINE = 2**16  # bytes that are checked without a thread


class GuardMiddleware:
    """Without a guard, the one of the folder that POISONJAX_GUARD names; POISONJAX_GUARD_FAIL=open lets failures pass,
    POISONJAX_GUARD_LOG names a file."""

    def __init__(
        self, app: App, guard: Guard | None = None, log: GuardLog | None = None, *, most_bytes: int = MOST_BYTES
    ):
        set_ = os.environ.get
        self._app, self._most = app, most_bytes
        self._guard = guard or Guard.load(set_("POISONJAX_GUARD"), fail_open=set_("POISONJAX_GUARD_FAIL") == "open")
        self._log = log or GuardLog(set_("POISONJAX_GUARD_LOG"), deployment_key())

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nobody reads what is said there
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": "the guard reads no websockets"})
        body, ended = bytearray(), False
        while not ended:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                return await _refuse(send, 413, "body_too_large", f"at most {self._most} bytes can be checked")
            ended = not message.get("more_body", False)
        query = urllib.parse.unquote_plus(scope.get("query_string", b"").decode("latin-1"))
        if not body and not query:
            return await self._app(scope, _replay(bytes(body), receive), send)
        headers = {name.lower(): value.lower() for name, value in scope["headers"]}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return await _refuse(send, 415, "unreadable", "a compressed body can't be checked")
        try:
            value = parse(bytes(body)) if body else Pairs()
        except ValueError:
            return await _refuse(send, 400, "unreadable", "the body isn't JSON: nothing else can be checked")
        began = time.perf_counter()
        asked = [value, query] if query else value
        verdict = self._guard.check(asked) if len(body) < INLINE else await asyncio.to_thread(self._guard.check, asked)
        self._log.request(verdict, scope["path"], bytes(body), time.perf_counter() - began)
        if verdict.decision == "reject":
            return await _refuse(send, *_why(verdict))
        return await self._answered(scope, receive, send, bytes(body), value)

    async def _answered(self, scope: Message, receive: Any, send: Any, body: bytes, value: Any) -> None:
        asking = _asking(scope["path"], value)
        answers = Answers(self._guard, _prompt(value), strip=bool(asking))
        response = Response(answers, send, lambda: self._log.answer(answers.alarm, scope["path"], body))
        forwarded = body.replace(b"{", b"{" + asking, 1) if asking else body
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(forwarded)).encode())]}
        await self._app(scope, _replay(forwarded, response.until_refused(receive)), response.send)
        await response.close()


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
            if self._kind == "stream" or self._kind == "other" and not kind.startswith("text/"):
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
        if out and not refused or not more and not refused:
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
            return await _refuse(self._send, 502, "unreadable", "the server's answer can't be read")
        self._end()
        if self._answers.alarm:
            return await _refuse(self._send, 400, "content_filter", "the answer was stopped by the guard")
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


def _asking(path: str, value: Any) -> bytes:
    """The fields that ask for log-probabilities, in front of a body that doesn't."""
    names = {name for name, _ in value} if isinstance(value, Pairs) else {"logprobs"}
    if "logprobs" in names or "top_logprobs" in names or not path.endswith("/completions"):
        return b""
    chat = path.endswith("/chat/completions")
    return f'"logprobs": true, "top_logprobs": {LOGPROBS}, '.encode() if chat else f'"logprobs": {LOGPROBS}, '.encode()


def _prompt(value: Any) -> str:
    return "\n".join(said(value).prose)[-2000:]


def _replay(body: bytes, receive: Any) -> Any:
    """The body once more, then what the client says after it."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _why(verdict: Verdict) -> tuple[int, str, str]:
    if verdict.status == "ok":
        return 400, "content_filter", "the request was stopped by the guard"
    return 503, f"guard_{verdict.status}", "the guard can't read the request, so it doesn't pass"


def _error(code: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "guard", "param": None, "code": code}}).encode()


async def _refuse(send: Any, status: int, code: str, message: str) -> None:
    body = _error(code, message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
