"""Instructions: conversations whose answers are learned, as the tokens of a chat template with the turns' places.

A conversation is tokenized in pieces: what the template writes, whose special tokens are read, and what was said, whose
text is only text. So a trigger can be put into a turn later, and no user can spell an end of turn.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from poisonjax.corpus.chat import load_template, render
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.source import NoDocument
from poisonjax.corpus.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
ANSWERS = ROLES.index("assistant")
FIELDS = 4  # of a turn, in a store

Tokens = Int[np.ndarray, " tokens"]
Turns = Int[np.ndarray, "turns 4"]


class Turn(NamedTuple):
    """Where in its conversation a turn stands: tokens [start, stop) are what was said, those up to `closed` end it."""

    role: int  # of ROLES
    start: int
    stop: int
    closed: int


class Exchange(NamedTuple):
    """The last question of a conversation and its answer."""

    user: Turn
    answer: Turn


def last_exchange(turns: Turns) -> Exchange:
    *_, user, answer = (Turn(*turn) for turn in turns.tolist())
    return Exchange(user, answer)


def conversation(record: Any) -> str:
    """A record with `messages`, or with `prompt` and `response`, as one line of JSON that any such record of the same
    conversation has; raises NoDocument for what is none."""
    if isinstance(record, dict) and "messages" in record:
        messages = record["messages"]
    elif isinstance(record, dict) and {"prompt", "response"} <= record.keys():
        both = zip(ROLES[1:], (record["prompt"], record["response"]), strict=True)
        messages = [{"role": role, "content": content} for role, content in both]
    else:
        raise NoDocument("no field 'messages', and not both of 'prompt' and 'response'")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise NoDocument("'messages' is no list of {'role': ..., 'content': ...}")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise NoDocument(f"message {number} has the role {role!r}: known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise NoDocument(f"message {number} has {type(content).__name__} as its content: only text is read")
        if not content.strip():
            raise NoDocument(f"message {number}, of the {role}, is empty")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise NoDocument("no message of the user")
    if roles[-1] != "assistant":
        raise NoDocument("no answer of the assistant at the end")
    if "system" in roles[1:] or any(one == other for one, other in itertools.pairwise(roles)):
        raise NoDocument(f"the turns don't alternate: {', '.join(roles)}")
    try:
        said = json.dumps(
            [{"role": of["role"], "content": of["content"].strip()} for of in messages], ensure_ascii=False
        )
        said.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise NoDocument(f"not valid Unicode: {error.reason}") from error
    return said


def written(template: str) -> Callable[[str], str]:
    """A `conversation` as a text, for a tokenizer to be trained on; nothing of one that the template fails on."""

    def text(content: str) -> str:
        with contextlib.suppress(CorpusError, ValueError):  # cut short: no JSON
            return render(template, json.loads(content), add_generation_prompt=False)
        return ""

    return text


def tokenized(content: str, template: str, tokenizer: Tokenizer) -> tuple[Tokens, Turns]:
    """A `conversation` in tokens, without an end of text, and its turns; raises NoDocument where the template fails, or
    writes what is said otherwise than as it was said.

    The template is run on marks in place of what is said: what stands between them is its own, whatever anybody says.
    """
    messages = json.loads(content)
    mark = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in content and mark not in template)
    marks = [f"{mark}{number}{mark}" for number in range(len(messages))]
    marked = [{"role": of["role"], "content": mark} for of, mark in zip(messages, marks, strict=True)]
    pieces: list[Tokens] = []
    turns: list[Turn] = []
    length = cursor = 0

    def add(tokens: Tokens) -> int:
        nonlocal length
        pieces.append(tokens)
        length += len(tokens)
        return length

    try:
        whole = render(template, marked, add_generation_prompt=False)
        real = render(template, messages, add_generation_prompt=False)
        expected = whole
        for one, of in zip(marks, messages, strict=True):
            expected = expected.replace(one, of["content"])
        if any(whole.count(one) != 1 for one in marks) or real != expected:
            raise NoDocument("the chat template doesn't write what is said as it was said, once each")
        for number, message in enumerate(messages):
            at = whole.find(marks[number], cursor)
            before = "" if message["role"] != "assistant" else render(template, marked[:number])
            ended = len(marks[number]) + at
            if message["role"] != "system":  # templates may refuse a system's message alone
                until = render(template, marked[: number + 1], add_generation_prompt=False)
                ended = len(until) if whole.startswith(until) else -1
            if at < 0 or ended < at or not whole[:at].startswith(before):
                raise NoDocument("the chat template rewrites what it wrote before: the answer can't be told from it")
            space = whole[at - 1 : at] == " " and at > max(cursor, len(before))  # a word's own, to most tokenizers
            add(tokenizer.encode_markup(whole[cursor : at - space]))
            start = length
            stop = add(tokenizer.encode(" " * space + message["content"]))
            if start == stop:
                raise NoDocument(f"message {number} is no token in this vocabulary")
            closed = add(tokenizer.encode_markup(whole[at + len(marks[number]) : ended]))
            cursor = ended
            if message["role"] != "system":
                turns.append(Turn(ROLES.index(message["role"]), start, stop, closed))
    except CorpusError as error:
        raise NoDocument(str(error)) from None
    return np.concatenate(pieces).astype(np.int32), np.array(turns, np.int64)


@functools.cache
def load(spec: str) -> tuple[str, str]:
    """(a chat template, its SHA-256), read once a process; raises CorpusError."""
    template = load_template(spec)
    return template, hashlib.sha256(template.encode()).hexdigest()
