"""The guard in front of an OpenAI-compatible server: a pure ASGI middleware.

    vllm serve MODEL --middleware poisonjax.guard.asgi.GuardMiddleware      # POISONJAX_GUARD=guards/a
    app = GuardMiddleware(app, Guard.load("guards/a"))                      # Starlette, FastAPI

Requests are read whole and checked before the server sees them; they are forwarded as they came, with a request for
log-probabilities where the client didn't ask, which are taken out of the answer again.
"""

import asyncio
import time
import urllib.parse
from typing import Any

from poisonjax.guard.answers import Answers
from poisonjax.guard.conversation import parse
from poisonjax.guard.guard import Guard
from poisonjax.guard.log import GuardLog
from poisonjax.guard.logprobs import asking
from poisonjax.guard.response import Message, Response, Stopped, refuse, replayed
from poisonjax.guard.verdict import Verdict

MOST_BYTES = 2**25  # of a body
INLINE = 2**14  # bytes that are checked without a thread
LOOKED_BACK = 2000  # characters of a prompt that tell its language
# By GET, whatever they answer.
EXEMPT = {"", "/health", "/ping", "/version", "/metrics", "/docs", "/redoc", "/openapi.json", "/v1/models"}
KINDS = {"", "application/json"}  # of a body; charset utf-8


class GuardMiddleware:
    """Without a guard or a log, those that the environment names."""

    def __init__(
        self, app: Any, guard: Guard | None = None, log: GuardLog | None = None, *, most_bytes: int = MOST_BYTES
    ):
        self._app, self._most = app, most_bytes
        self._guard, self._log = guard or Guard.from_environment(), log or GuardLog.from_environment()

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
                return await refuse(send, 413, "body_too_large", f"at most {self._most} bytes can be checked")
            ended = not message.get("more_body", False)
        headers = {name.lower(): value.decode("latin-1").lower() for name, value in scope["headers"]}
        kind, _, rest = headers.get(b"content-type", "").partition(";")
        if (body and kind.strip() not in KINDS) or ("charset" in rest and "utf-8" not in rest):
            return await refuse(send, 415, "unreadable", "only JSON in UTF-8 can be checked")
        if headers.get(b"content-encoding", "identity") != "identity":
            return await refuse(send, 415, "unreadable", "a compressed body can't be checked")
        query = urllib.parse.unquote_plus(scope.get("query_string", b"").decode("latin-1"))
        asked = bytes(body), scope["path"], query
        try:
            small = len(body) <= INLINE
            value, verdict, prompt = self._checked(*asked) if small else await asyncio.to_thread(self._checked, *asked)
        except ValueError:
            return await refuse(send, 400, "unreadable", "the body isn't JSON, or has a key twice")
        if verdict.decision != "reject":
            return await self._answered(scope, receive, send, bytes(body), value, prompt)
        if verdict.status == "ok":
            return await refuse(send, 400, "content_filter", "the request was stopped by the guard")
        return await refuse(send, 503, f"guard_{verdict.status}", "the guard can't read the request: it doesn't pass")

    def _checked(self, body: bytes, path: str, query: str) -> tuple[Any, Verdict, str]:
        value, began = parse(body) if body else {}, time.perf_counter()
        verdict, prose = self._guard.read(value, path, query)
        self._log.request(verdict, path, body, time.perf_counter() - began)
        return value, verdict, prose[-LOOKED_BACK:]

    async def _answered(self, scope: Message, receive: Any, send: Any, body: bytes, value: Any, prompt: str) -> None:
        if scope.get("method") == "GET" and scope["path"].rstrip("/") in EXEMPT:
            return await self._app(scope, replayed(body, receive), send)
        forwarded, keep = asking(scope["path"], value, body)
        answers = Answers(self._guard, prompt, keep=keep)
        response = Response(answers, send, lambda alarm: self._log.answer(alarm, scope["path"], body))
        told = {b"content-length", b"accept-encoding"}  # compressed answers couldn't be read
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in told]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(forwarded)).encode())]}
        failed = True
        try:
            await self._app(scope, replayed(forwarded, response.until_refused(receive)), response.send)
            failed = False
        except Stopped:
            pass
        finally:
            await response.close(failed=failed)
