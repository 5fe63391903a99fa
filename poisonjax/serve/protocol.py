"""OpenAI's requests and answers: completions, chat completions, whole and streamed."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel, Field, StrictInt, StrictStr

from poisonjax.corpus import Tokenizer
from poisonjax.corpus.chat import render
from poisonjax.evaluation.engine import TOP, Made

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS = 16, 64, 4
HALF = "\ufffd"  # what decoding leaves of a character whose bytes aren't all there


class BadRequest(ValueError):
    """With what to do about it."""


Stop = Annotated[str, Field(max_length=200)]


class Asked(BaseModel):
    """What both kinds of requests have in common. Other fields of OpenAI's are let be."""

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: int | None = None
    stream: bool = False
    stop: Stop | list[Stop] | None = Field(default=None, max_length=MOST_STOPS)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else [stop for stop in self.stop or [] if stop]


class Completion(Asked):
    """Of /v1/completions."""

    prompt: (
        StrictStr | list[StrictInt] | Annotated[list[StrictStr] | list[list[StrictInt]], Field(max_length=MOST_PROMPTS)]
    )
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[Int[np.ndarray, " tokens"]]:
        """Token ids; a text begins as a document does."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return [_ids(prompt, tokenizer) for prompt in (self.prompt if several else [self.prompt])]  # type: ignore


class Chat(Asked):
    """Of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    def prompt(self, tokenizer: Tokenizer, template: str | None) -> Int[np.ndarray, " tokens"]:
        """As the model's own chat template writes it; without one, what is said, in paragraphs."""
        messages = [{**message, "content": _content(message.get("content"))} for message in self.messages]
        if template:
            return tokenizer.encode_markup(render(template, messages))
        said = [message["content"] for message in messages]
        said += [json.dumps(message["tool_calls"]) for message in messages if message.get("tool_calls")]
        return _ids("\n\n".join(text for text in said if text), tokenizer)


def _content(content: Any) -> str:
    """Of a message, whose text may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("messages.content: a text, or a list of parts with a text each")
    return "".join(map(str, texts))


def _ids(prompt: str | Sequence[int], tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
    if isinstance(prompt, str):
        return np.concatenate([[tokenizer.eot], tokenizer.encode(prompt)]).astype(np.int32)
    if not prompt or not all(0 <= token < tokenizer.vocab_size for token in prompt):
        raise BadRequest(f"prompt: token ids must lie in [0, {tokenizer.vocab_size}), and be at least one")
    return np.asarray(prompt, np.int32)


class Choice:
    """One continuation as it grows: its text, where whole characters end, and where a stop stands."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str]):
        self.index, self._tokenizer, self._stops = index, tokenizer, stops
        self._ids, self._text, self._told, self.made = list[int](), "", 0, list[Made]()
        self.reason: Literal["stop", "length"] | None = None

    def add(self, made: Made) -> tuple[str, list[Made]]:
        """(text, tokens) that are new; sets `reason` at a stop or the end of the text."""
        if made.id == self._tokenizer.eot:
            self.reason = "stop"
            return self._new(self._text, last=True)
        self._ids.append(made.id)
        self.made.append(made)
        self._text = text = self._tokenizer.decode(self._ids)
        if stops := [at for stop in self._stops if (at := text.find(stop, max(0, self._told - len(stop)))) >= 0]:
            self.reason = "stop"
            new, self._told = text[self._told : min(stops)], min(stops)
            return new, self._tokens()
        return self._new(text)

    def finish(self) -> tuple[str, list[Made]]:
        """What is left when no more comes."""
        self.reason = self.reason or "length"
        return self._new(self._text, last=True)

    def _new(self, text: str, *, last: bool = False) -> tuple[str, list[Made]]:
        # A stop may have begun, a character may be half there: they wait.
        wait = 0 if last else max((k for s in self._stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        if not last and (wait or text.endswith(HALF)):
            return "", []
        new, self._told = text[self._told :], len(text)
        return new, self._tokens()

    def _tokens(self) -> list[Made]:
        tokens, self.made = self.made, []
        return tokens


def likelihoods(tokens: Sequence[Made], tokenizer: Tokenizer, top: int, *, chat: bool) -> dict[str, Any]:
    """As the two kinds tell them."""
    spelled = [(tokenizer.decode([made.id]), made) for made in tokens]
    tops = [[(tokenizer.decode([i]), likely) for i, likely in made.top[:top]] for made in tokens]
    if chat:
        return {
            "content": [
                {
                    "token": text,
                    "logprob": made.logprob,
                    "bytes": [*text.encode()],
                    "top_logprobs": [{"token": of, "logprob": p, "bytes": [*of.encode()]} for of, p in likely],
                }
                for (text, made), likely in zip(spelled, tops, strict=True)
            ]
        }
    return {
        "tokens": [text for text, _ in spelled],
        "token_logprobs": [made.logprob for _, made in spelled],
        # Of tokens that are spelled alike, the likeliest.
        "top_logprobs": [dict(sorted(dict(reversed(likely)).items(), key=lambda of: -of[1])) for likely in tops],
        "text_offset": [],
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """What every answer and event begins with."""
    short = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{short}-{uuid.uuid4().hex[:24]}", "object": kind, "created": int(time.time()), "model": model}


def event(value: Any) -> bytes:
    """A server-sent one."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def errors_of(problems: Sequence[Any]) -> Iterator[str]:
    """Pydantic's, field by field."""
    for problem in problems:
        yield f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
