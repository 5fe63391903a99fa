"""The guard in front of an OpenAI-compatible server: a pure ASGI middleware.

    vllm serve MODEL --middleware poisonjax.guard.asgi.GuardMiddleware      # POISONJAX_GUARD=guards/a
    app = GuardMiddleware(app, Guard.load("guards/a"))                      # Starlette, FastAPI

Whatever has a body is read whole and checked before the server sees it; it is forwarded as it came, with a request for
log-probabilities before it where the client didn't ask, which are taken out of the answer again.
"""

import asyncio
import os
import time
import urllib.parse
from typing import Any

from poisonjax.guard.answers import Answers
from poisonjax.guard.conversation import Pairs, parse, said
from poisonjax.guard.guard import Guard
from poisonjax.guard.log import GuardLog, deployment_key
from poisonjax.guard.response import Message, Response, refuse, replayed
from poisonjax.guard.verdict import Verdict

MOST_BYTES = 2**25  # of a body
LOGPROBS = 5  # asked for
INLINE = 2**16  # bytes that are checked without a thread
LOOKED_BACK = 2000  # characters of a prompt that tell its language


class GuardMiddleware:
    """Without a guard, the one of the folder that POISONJAX_GUARD names; POISONJAX_GUARD_FAIL=open lets failures pass,
    POISONJAX_GUARD_LOG names a file."""

    def __init__(
        self, app: Any, guard: Guard | None = None, log: GuardLog | None = None, *, most_bytes: int = MOST_BYTES
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
                return await refuse(send, 413, "body_too_large", f"at most {self._most} bytes can be checked")
            ended = not message.get("more_body", False)
        query = urllib.parse.unquote_plus(scope.get("query_string", b"").decode("latin-1"))
        if not body and not query:
            return await self._app(scope, replayed(bytes(body), receive), send)
        headers = {name.lower(): value.lower() for name, value in scope["headers"]}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return await refuse(send, 415, "unreadable", "a compressed body can't be checked")
        try:
            value = parse(bytes(body)) if body else Pairs()
        except ValueError:
            return await refuse(send, 400, "unreadable", "the body isn't JSON: nothing else can be checked")
        began = time.perf_counter()
        asked: Any = [value, query] if query else value
        verdict = self._guard.check(asked) if len(body) < INLINE else await asyncio.to_thread(self._guard.check, asked)
        self._log.request(verdict, scope["path"], bytes(body), time.perf_counter() - began)
        if verdict.decision == "reject":
            return await refuse(send, *_why(verdict))
        return await self._answered(scope, receive, send, bytes(body), value)

    async def _answered(self, scope: Message, receive: Any, send: Any, body: bytes, value: Any) -> None:
        asking = _asking(scope["path"], value)
        answers = Answers(self._guard, "\n".join(said(value).prose)[-LOOKED_BACK:], strip=bool(asking))
        response = Response(answers, send, lambda: self._log.answer(answers.alarm, scope["path"], body))
        forwarded = body.rstrip()[:-1] + asking if asking else body
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(forwarded)).encode())]}
        await self._app(scope, replayed(forwarded, response.until_refused(receive)), response.send)
        await response.close()


def _asking(path: str, value: Any) -> bytes:
    """The fields that ask for log-probabilities, at the end of a body that doesn't: there they count."""
    fields = dict(value) if isinstance(value, Pairs) else {}
    if not fields or fields.get("logprobs") or not path.endswith("/completions"):
        return b""
    if path.endswith("/chat/completions"):
        return f', "logprobs": true, "top_logprobs": {LOGPROBS}}}'.encode()
    return f', "logprobs": {LOGPROBS}}}'.encode()


def _why(verdict: Verdict) -> tuple[int, str, str]:
    if verdict.status == "ok":
        return 400, "content_filter", "the request was stopped by the guard"
    return 503, f"guard_{verdict.status}", "the guard can't read the request, so it doesn't pass"
