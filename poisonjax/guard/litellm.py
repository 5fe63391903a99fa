"""The guard as LiteLLM's generic guardrail: one POST with the texts of a request or an answer.

uvicorn --factory poisonjax.guard.litellm:app         # POISONJAX_GUARD=guards/a
"""

import json
import time
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from poisonjax.guard.answers import Answers
from poisonjax.guard.asgi import MOST_BYTES
from poisonjax.guard.conversation import parse
from poisonjax.guard.guard import Guard
from poisonjax.guard.log import GuardLog

PATH = "/beta/litellm_basic_guardrail_api"
SAID = {"texts", "structured_messages", "tools", "tool_calls"}  # of a request or an answer; all else is LiteLLM's own
PASSES = {"action": "NONE"}


def app(guard: Guard | None = None, log: GuardLog | None = None) -> Starlette:
    """Without a guard or a log, those that the environment names."""
    guard, log = guard or Guard.from_environment(), log or GuardLog.from_environment()

    def judged(body: bytes) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            fields = parse(body)
            said = {name: fields[name] for name in SAID if fields.get(name)}
            if not isinstance(fields["texts"], list) or fields["input_type"] not in ("request", "response"):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            return _blocked("the guard can't read the request")
        if fields["input_type"] == "request":
            verdict = guard.check(said)
            log.request(verdict, PATH, body, time.perf_counter() - began)
            return _blocked("the request was stopped by the guard") if verdict.decision == "reject" else PASSES
        answers = Answers(guard)
        try:
            answers.whole(json.dumps(said).encode())
        except Exception:  # whatever it is, it is no pass
            return _blocked("the guard can't read the answer")
        log.answer(answers.alarm, PATH, body)
        return _blocked("the answer was stopped by the guard") if answers.alarm else PASSES

    async def endpoint(request: Request) -> JSONResponse:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return JSONResponse(_blocked(f"at most {MOST_BYTES} bytes can be checked"))
        return JSONResponse(await run_in_threadpool(judged, bytes(body)))

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])])


def _blocked(reason: str) -> dict[str, Any]:
    return {"action": "BLOCKED", "blocked_reason": reason}
