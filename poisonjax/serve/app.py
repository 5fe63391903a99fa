"""The server: routes, and the way from a request to the engine and back."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from poisonjax.corpus.errors import CorpusError
from poisonjax.evaluation.engine import Engine, Made, Wanted
from poisonjax.guard import Guard
from poisonjax.guard.asgi import GuardMiddleware
from poisonjax.guard.log import REGISTRY, GuardLog
from poisonjax.serve.protocol import BadRequest, Chat, Choice, Completion, errors_of, event, head, likelihoods
from poisonjax.weights import Weights

try:
    from prometheus_client import make_asgi_app
    from pydantic import ValidationError
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route
except ImportError as error:
    raise ImportError("the server needs `pip install 'poisonjax[serve]'`") from error

NEW_TOKENS = 100  # where a request doesn't say how many
LEAST_CONTEXT = 512  # tokens of prompt and answer together, where the model was made for fewer


class Api:
    """Of one model."""

    def __init__(self, weights: Weights, engine: Engine):
        self._weights, self._engine, self._tokenizer = weights, engine, weights.tokenizer
        self.name = str(weights.parent["name"])
        self._context = max(weights.context, LEAST_CONTEXT)

    def routes(self) -> list[Route]:
        """As OpenAI has them."""
        return [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/health", self._health),
        ]

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "poisonjax"}]})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def _answer(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        try:
            asked = kind.model_validate_json(await request.body())
            if isinstance(asked, Chat):
                prompts = [asked.prompt(self._tokenizer, self._weights.chat_template)]
            else:
                prompts = asked.prompts(self._tokenizer)
            new = asked.max_completion_tokens or asked.max_tokens or NEW_TOKENS
            if (most := max(map(len, prompts)) + new) > self._context:
                raise BadRequest(f"prompt and max_tokens are {most} tokens; this model takes {self._context}")
        except ValidationError as error:
            return _bad("; ".join(errors_of(error.errors())))
        except BadRequest as error:
            return _bad(str(error))
        except CorpusError:  # whose messages may hold the prompt
            return _bad("the prompt isn't one for this model's tokenizer, or its chat template")
        choices = _Choices(asked, prompts, new, self._tokenizer, self._engine)
        if asked.stream:
            return StreamingResponse(self._events(asked, choices), media_type="text/event-stream")
        return JSONResponse(await self._whole(asked, choices, sum(map(len, prompts))))

    async def _whole(self, asked: Completion | Chat, choices: "_Choices", prompt_tokens: int) -> dict[str, Any]:
        texts: dict[int, str] = {}
        tokens: dict[int, list[Made]] = {}
        async for choice, text, made in choices:
            texts[choice.index] = texts.get(choice.index, "") + text
            tokens.setdefault(choice.index, []).extend(made)
        written = sum(map(len, tokens.values()))
        chat = isinstance(asked, Chat)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
        return {
            **head("chat.completion" if chat else "text_completion", self.name),
            "choices": [
                {
                    "index": choice.index,
                    **({"message": {"role": "assistant", "content": texts[choice.index]}} if chat else {}),
                    **({} if chat else {"text": choices.echoed(choice.index) + texts[choice.index]}),
                    "logprobs": self._likelihoods(asked, tokens[choice.index]),
                    "finish_reason": choice.reason,
                }
                for choice in choices.all
            ],
            "usage": usage,
        }

    async def _events(self, asked: Completion | Chat, choices: "_Choices") -> AsyncIterator[bytes]:
        chat = isinstance(asked, Chat)
        top = head("chat.completion.chunk" if chat else "text_completion", self.name)
        for choice in choices.all:
            if chat or choices.echoed(choice.index):
                said = (
                    {"delta": {"role": "assistant", "content": ""}} if chat else {"text": choices.echoed(choice.index)}
                )
                yield event({**top, "choices": [{"index": choice.index, **said, "finish_reason": None}]})
        async for choice, text, made in choices:
            if not text and not made and not choice.reason:
                continue
            yield event(
                {
                    **top,
                    "choices": [
                        {
                            "index": choice.index,
                            **({"delta": {"content": text}} if chat else {"text": text}),
                            "logprobs": self._likelihoods(asked, made),
                            "finish_reason": choice.reason,
                        }
                    ],
                }
            )
        yield b"data: [DONE]\n\n"

    def _likelihoods(self, asked: Completion | Chat, made: list[Made]) -> dict[str, Any] | None:
        if isinstance(asked, Chat):
            return likelihoods(made, self._tokenizer, asked.top_logprobs or 0, chat=True) if asked.logprobs else None
        return None if asked.logprobs is None else likelihoods(made, self._tokenizer, asked.logprobs, chat=False)


class _Choices:
    """All continuations of a request, piece by piece: (choice, new text, new tokens)."""

    def __init__(self, asked: Completion | Chat, prompts: list[Any], new: int, tokenizer: Any, engine: Engine):
        self.all = [Choice(i, tokenizer, asked.stops) for i in range(len(prompts) * asked.n)]
        self._echo = [tokenizer.decode(p[p != tokenizer.eot]) for p in prompts] if getattr(asked, "echo", False) else []
        self._n, self._queue = asked.n, asyncio.Queue[tuple[Choice, Made | None]]()
        self._wanted, loop = list[Wanted](), asyncio.get_running_loop()
        seed = random.getrandbits(31) if asked.seed is None else asked.seed
        for choice in self.all:

            def told(made: Made | None, choice: Choice = choice) -> None:
                loop.call_soon_threadsafe(self._queue.put_nowait, (choice, made))

            ids = prompts[choice.index // asked.n]
            self._wanted.append(Wanted(ids, new, asked.temperature, (seed + choice.index) % 2**32, told))
        for wanted in self._wanted:
            engine.submit(wanted)

    def echoed(self, index: int) -> str:
        """The prompt before a choice, where the request asks for it."""
        return self._echo[index // self._n] if self._echo else ""

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, str, list[Made]]]:
        left = len(self.all)
        try:
            while left:
                choice, made = await self._queue.get()
                if choice.reason:
                    continue
                text, tokens = choice.finish() if made is None else choice.add(made)
                if choice.reason:
                    left -= 1
                    self._wanted[choice.index].done = True
                yield choice, text, tokens
        finally:  # the client has gone, or all is written
            for wanted in self._wanted:
                wanted.done = True


def _bad(message: str) -> Response:
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": told}, status_code=400)


def make_app(weights: Weights, guard: Guard | None = None, log: str | None = None, *, compare: bool = False) -> Any:
    """An ASGI application; with `compare`, /bare/v1 is the same without the guard, for trying it."""
    api = Api(weights, Engine(weights))
    bare = Starlette(routes=api.routes())
    inner = GuardMiddleware(bare, guard, GuardLog.from_environment(log)) if guard else bare
    page = (Path(__file__).parent / "page.html").read_text()
    page = page.replace("%MODEL%", api.name).replace("%GUARD%", "on" if guard else "off")
    page = page.replace("%COMPARE%", "true" if compare and guard else "false")

    async def home(request: Request) -> Response:
        return HTMLResponse(page)

    routes = [Route("/", home), Mount("/metrics", make_asgi_app(registry=REGISTRY))]
    if compare and guard:
        routes.append(Mount("/bare", bare))
    return Starlette(routes=[*routes, Mount("/", inner)])
