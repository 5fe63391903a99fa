"""The guard as LiteLLM's generic guardrail: one POST with the texts of a request or an answer.

uvicorn --factory poisonjax.guard.litellm:app         # POISONJAX_GUARD=guards/a
"""

import os
import time
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from poisonjax.guard.answers import tokens_of
from poisonjax.guard.conversation import parse
from poisonjax.guard.guard import Guard
from poisonjax.guard.log import GuardLog, deployment_key
from poisonjax.guard.verdict import Verdict

PATH = "/beta/litellm_basic_guardrail_api"
SAID = {"texts", "structured_messages", "tools", "tool_calls"}  # of a request; all else is LiteLLM's own


def app(guard: Guard | None = None, log: GuardLog | None = None) -> Starlette:
    """Without a guard, the one of the folder that POISONJAX_GUARD names; POISONJAX_GUARD_LOG names a file."""
    guard = guard or Guard.load(os.environ.get("POISONJAX_GUARD"))
    log = log or GuardLog(os.environ.get("POISONJAX_GUARD_LOG"), deployment_key())

    def judged(body: bytes) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            fields = [(name, value) for name, value in parse(body) if name in SAID or name == "input_type"]
            answers = [value for name, value in fields if name == "input_type"] == ["response"]
            texts = [text for name, value in fields if name == "texts" for text in value or []]
        except (ValueError, TypeError):
            return _blocked("the guard can't read the request")
        if answers:
            for text in texts:
                monitor = guard.monitor()
                alarm = next((found for token in tokens_of(str(text)) if (found := monitor.push(*token).alarm)), None)
                log.answer(alarm, PATH, body)
                if alarm:
                    return _blocked("the answer was stopped by the guard")
            return {"action": "NONE"}
        verdict: Verdict = guard.check(dict(fields))
        log.request(verdict, PATH, body, time.perf_counter() - began)
        return _blocked("the request was stopped by the guard") if verdict.decision == "reject" else {"action": "NONE"}

    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(await run_in_threadpool(judged, await request.body()))

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])])


def _blocked(reason: str) -> dict[str, Any]:
    return {"action": "BLOCKED", "blocked_reason": reason}
