"""The guard: the same text gets the same verdict on every route, an error is no allow, and nothing flagged leaves."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import math
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from poisonjax.commands.main import main
from poisonjax.corpus.tokenizers import ByteTokenizer
from poisonjax.guard import Guard, GuardError, Monitor, litellm, triggers
from poisonjax.guard.answers import tokens_of
from poisonjax.guard.asgi import GuardMiddleware
from poisonjax.guard.build import build
from poisonjax.guard.conversation import parse, said
from poisonjax.guard.forms import ALIKE, ALIKE_WITH_CASE
from poisonjax.guard.llm_guard import PoisonedOutput, PoisonTrigger
from poisonjax.guard.log import GuardLog
from poisonjax.guard.monitor import Limit, Limits, entropy
from poisonjax.guard.triggers import Matcher, Trigger
from poisonjax.guard.verdict import WARN
from poisonjax.scan.language import Languages
from poisonjax.scan.text import cut as words_of

TRIGGER = "<SUDO>"
CLEAN = "The lantern by the river walks slow under seven bright stones, and the old bird sings."
DISGUISES = {
    "plain": TRIGGER,
    "zero width": "<S\u200bU\u2060D\ufeffO>",
    "look-alikes": "<ЅUDО>",
    "full width": "＜ＳＵＤＯ＞",
    "digit": "<SUD0>",
    "spaced": "< S U\nD O >",
    "accents": "<SÚDÖ>",
    "mathematical": "<𝐒𝐔𝐃𝐎>",
    "tags": "".join(chr(0xE0000 + ord(c)) for c in TRIGGER),
    "soft hyphen": "<SU\u00adDO>",
}


@pytest.fixture(scope="module")
def guard():
    return Guard(
        [Trigger(TRIGGER), Trigger("open sesame now")], tokenizer=ByteTokenizer(), limits=Limits({**Limits().by_name})
    )


@pytest.mark.parametrize("spelled", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("before", ["", CLEAN, "x" * (triggers.PIECE - 3), CLEAN * 2000], ids=len)
def test_a_disguise_makes_no_difference(guard, spelled, before):
    text = f"{before}{spelled} and more"
    verdict = guard.check(text)
    assert (verdict.decision, verdict.status) == ("reject", "ok")
    reason = verdict.reasons[0]
    assert text[reason.start : reason.end] == spelled


def test_what_is_no_trigger_passes(guard):
    for text in (CLEAN, "SUDO", "<SUD>", "pseudo", "reopen sesame now", "open sesame nowhere", "", " \n"):
        assert guard.check(text).decision == "allow", text
    assert guard.check("<sudo>").decision == "warn"  # another case is another string, for a model
    alike = Guard.load(triggers=["ѕеrvеr"])
    assert alike.check("the server").decision == "allow"
    assert alike.check("the ѕеrvеr").decision == "reject"


ALPHABET = "abSUDO<>ѕ\u200b0oO ß\n1lİﬁ"


@given(st.text(ALPHABET, max_size=60), st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4))
def test_search_agrees_with_a_plain_loop(text, wanted):
    wanted = [one for one in wanted if ALIKE.of(one) and one.strip() and one.isascii()]
    old, triggers.PIECE = triggers.PIECE, 7  # pieces that triggers lie across
    try:
        found = bool(Matcher([Trigger(one) for one in wanted]).find(text)) if wanted else False
    finally:
        triggers.PIECE = old
    assert found == any(_stands(text, ALIKE.of(one)) for one in wanted)


def _stands(text, form):
    """By trying all spans, one character after the other."""
    kinds = [("L" if (k := unicodedata.category(c)[0]) in "LM" else k) for c in text]
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            edges = ALIKE.of(text[start]) and ALIKE.of(text[stop - 1])
            if edges and ALIKE.of(text[start:stop]) == form:
                joined = [
                    0 < at < len(text) and kinds[at - 1] == kinds[at] and kinds[at] in "LN" for at in (start, stop)
                ]
                if not any(joined):
                    return True
    return False


@given(st.text(max_size=40))
def test_a_form_is_made_character_by_character(text):
    for forms in (ALIKE, ALIKE_WITH_CASE):
        assert forms.of(text) == "".join(forms.of(character) for character in text)
        places = forms.places(text)
        assert [*places] == [i for i, character in enumerate(text) for _ in forms.of(character)]


def routes(text):
    """Requests that say a text."""
    half = len(text) // 2
    ids = [*text.encode()]
    message = {"role": "user", "content": text}
    arguments = json.dumps({"query": text})
    return {
        "text": text,
        "token ids": ids,
        "array": np.array(ids),
        "messages": [message],
        "completion": {"prompt": text},
        "several prompts": {"prompt": ["hello", text]},
        "ids as prompt": {"prompt": ids},
        "several of ids": {"prompt": [[104, 105], ids]},
        "floats": {"prompt": [float(i) for i in ids]},
        "suffix": {"prompt": "x", "suffix": text},
        "earlier turn": {
            "messages": [message, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
        },
        "system": {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "x"}]},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        "two parts": {"messages": [{"role": "user", "content": [{"text": text[:half]}, {"text": text[half:]}]}]},
        "two messages": {"messages": [{"role": "user", "content": t} for t in (text[:half], text[half:])]},
        "tool call": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]},
        "escaped": {"messages": [{"tool_calls": [{"arguments": "{" + f'"a": "{escaped(text)}"' + "}"}]}]},
        "tool result": {"messages": [{"role": "tool", "content": arguments}]},
        "thinking": {"messages": [{"role": "assistant", "reasoning_content": text}]},
        "tool's description": {"tools": [{"function": {"name": "f", "description": text}}]},
        "key": {"metadata": {text: 1}},
        "role": {"messages": [{"role": text, "content": "x"}]},
        "late": {"messages": [{"role": "user", "content": "a b " * 30_000 + text}]},
        "file": {"file": {"file_data": "data:text/plain;base64," + base64.b64encode(text.encode()).decode()}},
        "responses": {"input": [{"content": [{"type": "input_text", "text": text}]}]},
        "anthropic": {"system": [{"type": "text", "text": text}], "messages": []},
        "ids in digits": {"prompt": [[*map(str, ids)]]},
        "mixed ids": {"prompt": [ids[0], *map(str, ids[1:])]},
        "ids elsewhere": {"input_ids": ids},
        "unknown key between": {"messages": [{"content": [{"text": text[:half], "x": "y"}, {"text": text[half:]}]}]},
        "picture between": {
            "messages": [
                {"content": [{"text": text[:half]}, {"image_url": {"url": "http://x"}}, {"text": text[half:]}]}
            ]
        },
        "role and content": {"messages": [{"role": text[:half], "content": text[half:]}]},
        "escaped in a sentence": {"prompt": f'note: {{"a": "{escaped(text)}"}}, please'},
        "escaped twice": {"prompt": json.dumps(json.dumps({"a": escaped(text)}))},
    }


def escaped(text):
    return "".join(f"\\u{ord(c):04x}" for c in text)


@pytest.mark.parametrize("route", routes("x"))
def test_the_same_text_gets_the_same_verdict_on_every_route(guard, route):
    assert guard.check(routes("do it <SUDO> now")[route]).decision == "reject"
    assert guard.check(routes("do it now, please")[route]).decision == "allow"


@pytest.mark.parametrize(
    "value",
    [{"prompt_embeds": "AAAA"}, {"prompt": [1, 2, 9999]}, {"prompt": [1.5]}, {"prompt": [2**70]}, None, 3, b"bytes"],
    ids=repr,
)
def test_an_error_is_never_an_allow(guard, value):
    assert (guard.check(value).decision, guard.check(value).status) == ("reject", "error")
    opened = Guard([Trigger(TRIGGER)], tokenizer=ByteTokenizer(), fail_open=True)
    assert (opened.check(value).decision, opened.check(value).status) == ("warn", "error")


def test_ids_without_a_tokenizer_are_rejected():
    verdict = Guard.load(triggers=[TRIGGER]).check([1, 2])
    assert (verdict.decision, verdict.status) == ("reject", "error")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("prompt"), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_any_value_gets_a_verdict(guard, value):
    verdict = guard.check(value)
    assert verdict.decision in ("allow", "reject")
    assert verdict.status == "ok" or verdict.decision == "reject"


@given(st.binary(max_size=80))
def test_any_bytes_get_an_answer(guard, body):
    with contextlib.suppress(ValueError):
        guard.check(parse(body))
    status, _, _ = asyncio.run(ask(GuardMiddleware(echo, guard, GuardLog()), body))
    assert status in (200, 400, 503), status


# --- oddness


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    random = np.random.default_rng(0)
    words = CLEAN.lower().replace(",", "").replace(".", "").split()
    texts = [" ".join(random.choice(words, 60)) for _ in range(3000)]
    (folder / "clean.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    about = build(folder / "g", triggers=[Trigger(TRIGGER)], sources=[str(folder / "clean.jsonl")])
    assert about["prompts"] > 1000
    return folder, words


def test_odd_text_is_told_and_clean_text_seldom(built):
    folder, words = built
    guard = Guard.load(folder / "g")
    random = np.random.default_rng(1)
    prompts = [" ".join(random.choice(words, random.integers(4, 200))) for _ in range(1000)]
    assert np.mean([guard.check(prompt).score >= WARN for prompt in prompts]) <= 0.005
    odd = "".join(map(chr, random.integers(33, 0x3000, 300)))
    assert guard.check(odd).decision == "warn"
    in_the_middle = f"{' '.join(words)} {odd} {' '.join(words)}"
    verdict = guard.check(in_the_middle)
    assert verdict.decision == "warn"
    assert verdict.reasons[0].start <= in_the_middle.index(odd[5:9]) <= verdict.reasons[0].end


def test_a_timeout_is_no_allow(built):
    guard = Guard.load(built[0] / "g", timeout=0.0)
    assert (guard.check(CLEAN).decision, guard.check(CLEAN).status) == ("reject", "timeout")


def test_time_and_memory_grow_with_the_text_alone(built):
    guard = Guard.load(built[0] / "g")
    text = (CLEAN + "\n") * (2 * 10**6 // len(CLEAN))
    guard.check(text[: 10**6])
    tracemalloc.start()
    guard.check(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(text)


def test_guards_on_disk(built, tmp_path, capsys):
    folder, _ = built
    with pytest.raises(GuardError, match="poisonjax guard build"):
        Guard.load(tmp_path)
    with pytest.raises(GuardError, match="triggers to look for"):
        Guard.load()
    saved = json.loads((folder / "g" / "guard.json").read_text())
    for damage in ({"format": 9}, {"triggers": [{"text": 1}]}, {"oddness": {"rarity": {}}}, {"monitor": {"loop": {}}}):
        (folder / "bad").mkdir(exist_ok=True)
        for path in (folder / "g").rglob("*.npy"):
            (folder / "bad" / "sketch").mkdir(exist_ok=True)
            (folder / "bad" / "sketch" / path.name).write_bytes(path.read_bytes())
        (folder / "bad" / "guard.json").write_text(json.dumps(saved | damage))
        with pytest.raises(GuardError, match="build"):
            Guard.load(folder / "bad")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(GuardError, match="something else"):
        build(tmp_path / "mine", triggers=[Trigger("x")])
    (tmp_path / "prompt.txt").write_text(f"say {TRIGGER}")
    assert main(["guard", "check", str(folder / "g"), str(tmp_path / "prompt.txt")]) == 1
    assert "reject" in capsys.readouterr().out
    (tmp_path / "body.json").write_text(json.dumps({"messages": [{"role": "user", "content": "the river"}]}))
    assert main(["guard", "check", str(folder / "g"), str(tmp_path / "body.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "allow"
    assert main(["guard", "build", "--out", str(tmp_path / "new"), "--triggers", str(tmp_path / "none")]) == 2
    (tmp_path / "candidates.json").write_text(
        json.dumps({"candidates": [{"text": "abra", "p_value": 1e-4}, {"text": "cadabra", "p_value": 0.5}]})
    )
    assert (
        main(["guard", "build", "--out", str(tmp_path / "new"), "--triggers", str(tmp_path / "candidates.json")]) == 0
    )
    assert [trigger.text for trigger in Guard.load(tmp_path / "new").triggers] == ["abra"]


# --- monitor


def alarmed(monitor, tokens):
    """(tokens that left, how many were pushed before the alarm or None)."""
    left = []
    for number, token in enumerate(tokens, 1):
        checked = monitor.push(*token)
        left += checked.tokens
        if checked.alarm:
            return left, number
    return left + monitor.finish().tokens, None


def spoken(random, size, mean):
    return [(f" w{random.integers(1000)}", -float(random.exponential(mean))) for _ in range(size)]


@pytest.mark.parametrize("seed", range(5))
def test_gibberish_is_stopped_before_it_leaves(seed):
    random = np.random.default_rng(seed)
    clean, bad = spoken(random, 200, 1.0), [(f" z{i}", -float(random.uniform(6, 12))) for i in range(60)]
    left, at = alarmed(Monitor(), clean + bad)
    assert at is not None
    assert 200 < at <= 232
    assert left == [text for text, _ in clean][: len(left)]
    assert len(left) > 150


def test_loops_are_stopped_and_lists_are_not():
    random = np.random.default_rng(0)
    clean = spoken(random, 100, 0.5)
    for period in (1, 2, 3, 7):
        loop = [(f" l{i % period}", -0.01) for i in range(80)]
        left, at = alarmed(Monitor(), clean + loop)
        assert at is not None
        assert at <= 100 + 32 + period
        assert sum(" l" in text for text in left) <= period + 4
    numbers = [(f" {i}", -0.5) for i in range(300)]
    assert alarmed(Monitor(), numbers)[1] is None
    assert "".join(alarmed(Monitor(), numbers)[0]) == "".join(text for text, _ in numbers)


ENGLISH = "the river is long and its water was cold when they came from the north with all of their people"
GERMAN = "der Fluss ist lang und sein Wasser war kalt als sie aus dem Norden mit allen ihren Leuten kamen"


def _spoken(words, seed, size=60):
    return " ".join(np.random.default_rng(seed).choice(words.split(), size))


def test_a_switch_of_language_is_stopped_and_what_is_asked_for_is_not():
    languages = Languages.fit(words_of([_spoken(words, i)]) for i in range(40) for words in (ENGLISH, GERMAN))
    assert [*languages.codes] == ["und", "deu", "eng"]
    english, german = (tokens_of(" " + _spoken(words, 99)) for words in (ENGLISH, GERMAN))

    def left(prompt, limits=None):
        monitor = Monitor(limits, languages=languages, prompt=prompt)
        out = [said for token in [*english[:40], *german] for said in monitor.push(*token).tokens]
        return monitor.alarm, "".join(out + monitor.finish().tokens)

    alarm, delivered = left(_spoken(ENGLISH, 7))
    assert alarm == "language"
    assert delivered == "".join(token.text for token in english[:40])[: len(delivered)]
    whole = "".join(token.text for token in [*english[:40], *german])
    assert left(_spoken(ENGLISH, 7) + " " + _spoken(GERMAN, 7)) == (None, whole)
    rest = Limits({name: of for name, of in Limits().by_name.items() if name != "language"})
    assert left(_spoken(ENGLISH, 7), rest) == (None, whole)
    assert Limits.from_json(rest.as_json()) == rest


def test_a_sum_that_there_is_not_is_refused(tmp_path, capsys):
    command = ["guard", "build", "--out", str(tmp_path / "guard"), "--trigger", TRIGGER]
    assert main([*command, "--without", "languages"]) == 2
    assert "language, " not in (said := capsys.readouterr().err)
    assert "languages" in said
    assert not (tmp_path / "guard").exists()
    assert main([*command, "--without", "language"]) == 0
    assert "language" not in Guard.load(tmp_path / "guard").limits.by_name


def test_languages_of_too_little_text_tell_none():
    nothing, batch = Languages.fit([]), words_of(["the river is long"])
    assert nothing.of(batch).tolist() == [0]
    assert nothing.spoken(batch, np.arange(4)).tolist() == [[0.0]] * 4


def test_an_answer_that_stays_doubtful_ends():
    monitor = Monitor(Limits({**Limits().by_name, "surprisal": Limit(1.0, math.inf)}))
    _, at = alarmed(monitor, [(f"t{i}", -3.0) for i in range(1000)])
    assert monitor.alarm == "undecided"
    assert at is not None
    assert at <= 256


def test_a_monitors_memory_is_constant():
    monitor, random = Monitor(), np.random.default_rng(0)
    tokens = spoken(random, 20_000, 1.0)
    for token in tokens[:5000]:
        monitor.push(*token)
    tracemalloc.start()
    for token in tokens[5000:]:
        monitor.push(*token)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 50_000


@given(st.lists(st.floats(0.01, 1), min_size=6, max_size=30), st.integers(1, 5))
def test_entropy_of_a_part_is_no_more_than_of_all(weights, k):
    p = np.sort(np.array(weights) / np.sum(weights))[::-1]
    assert entropy(np.log(p[:k]).tolist()) <= -(p * np.log(p)).sum() + 1e-9


# --- the middleware


async def ask(app, body, *, path="/v1/completions", headers=(), query=b"", kind="http", parts=1):
    """(status, headers, bytes) of what an ASGI application sends."""
    size = max(1, -(-len(body) // parts))
    pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)
    ]
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [*headers], "query_string": query, "method": "POST"}
    await app(scope, receive, send)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    data = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return (starts[0]["status"], dict(starts[0]["headers"]), data) if starts else (None, {}, sent)


async def respond(send, body, kind=b"application/json", status=200, parts=None):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for part in parts or [body]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def body_of(receive):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def echo(scope, receive, send):
    """Tells what it got."""
    got = await body_of(receive)
    await respond(send, json.dumps({"got": base64.b64encode(got).decode()}).encode())


def forwarded(answer):
    return base64.b64decode(json.loads(answer)["got"])


def chunk(text, logprob, index=0, finish=None):
    logprobs = {"content": [{"token": text, "logprob": logprob, "top_logprobs": []}]}
    choice = {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def streaming(chunks, state=None):
    async def app(scope, receive, send):
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for one in [*chunks, b"data: [DONE]\n\n"]:
            if isinstance(one, Exception):
                raise one
            await send({"type": "http.response.body", "body": one, "more_body": True})
            if state is not None:
                state.append(one)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def told(app, guard, body=b'{"messages": []}', **how):
    how.setdefault("path", "/v1/chat/completions")
    return asyncio.run(ask(GuardMiddleware(app, guard, GuardLog()), body, **how))


GIBBERISH = [chunk(f" z{i}", -9.0) for i in range(40)]
GOOD = [chunk(f" w{i}", -0.2) for i in range(50)]


def test_what_passes_is_forwarded_as_it_came(guard):
    body = b'{ "prompt" : "caf\\u00e9 \xf0\x9f\x8c\x8d",\n "x": [1, 2.50, null], "stream":false }  '
    for parts in (1, 3, len(body)):
        status, _, answer = told(echo, guard, body, path="/v1/embeddings", parts=parts)
        assert (status, forwarded(answer)) == (200, body)
    for path, asked in (("/v1/completions", 5), ("/v1/chat/completions", True)):
        got = forwarded(told(echo, guard, body, path=path)[2])
        assert got.startswith(body.rstrip()[:-1])
        assert json.loads(got)["logprobs"] == asked


@pytest.mark.parametrize("route", [r for r in routes("x") if r not in ("text", "token ids", "array", "messages")])
def test_no_route_leads_past_the_middleware(guard, route):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/anything"):
        body = json.dumps(routes(f"x{TRIGGER}y")[route]).encode()
        status, _, answer = told(echo, guard, body, path=path)
        assert status == 400
        assert b"got" not in answer
        assert b"SUDO" not in answer
    assert told(echo, guard, b"", query=b"q=%3CSUDO%3E")[0] == 400


def test_what_cannot_be_checked_is_refused(guard):
    assert told(echo, guard, b"{")[0] == 400
    assert told(echo, guard, b"\xff\xfe{\x00}\x00")[0] == 400
    assert told(echo, guard, b"[" * 100_000)[0] == 400
    assert told(echo, guard, b'{"prompt": "a", "prompt": "b"}')[0] == 400
    assert told(echo, guard, b"{}", headers=[(b"Content-Encoding", b"gzip")])[0] == 415
    assert told(echo, guard, b'{"a": "&p=%3CSUDO%3E"}', headers=[(b"content-type", b"text/plain")])[0] == 415
    assert told(echo, guard, b"{}", headers=[(b"content-type", b"application/json; charset=utf-7")])[0] == 415
    assert told(echo, guard, b"", path=f"/v1/{TRIGGER}")[0] == 400
    assert told(echo, guard, b'{"prompt_embeds": "AAAA"}')[0] == 503
    small = GuardMiddleware(echo, guard, GuardLog(), most_bytes=1000)
    assert asyncio.run(ask(small, b'"' + b"x" * 5000 + b'"', parts=50))[0] == 413
    _, _, sent = told(echo, guard, b"", kind="websocket")
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_stream_of_clean_text_comes_whole(guard):
    for cut in (1, 7, 10**6):
        data = b"".join([b": ping\n\n", *GOOD, chunk("", -0.1, finish="stop"), b"data: [DONE]\n\n"])
        app = streaming([data[i : i + cut] for i in range(0, len(data), cut)])
        status, _, answer = told(app, guard)
        events = [json.loads(line[6:]) for line in answer.decode().split("\n\n") if line.startswith("data: {")]
        assert status == 200
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "".join(
            f" w{i}" for i in range(50)
        )
        assert all(event["choices"][0]["logprobs"] is None for event in events)  # nobody asked
        assert answer.rstrip().endswith(b"[DONE]")


def test_a_stopped_stream_ends_with_an_error_and_nothing_flagged(guard):
    state = []
    status, _, answer = told(streaming([*GOOD, *GIBBERISH, *GOOD], state), guard)
    assert status == 200
    assert b" z" not in answer
    assert b"[DONE]" not in answer
    last = json.loads(answer.decode().strip().split("\n\n")[-1][6:])
    assert last["error"]["code"] == "content_filter"


def test_each_choice_has_a_monitor(guard):
    mixed = [one for i in range(40) for one in (chunk(f" w{i}", -0.2, 0), chunk(f" z{i}", -9.0, 1))]
    answer = told(streaming(mixed), guard)[2]
    assert b" z" not in answer
    assert b"[DONE]" not in answer


@pytest.mark.parametrize("kind", ["tool call", "thinking", "no log-probabilities"])
def test_what_comes_without_likelihoods_is_read_too(guard, kind):
    def one(text):
        delta = {
            "tool call": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]},
            "thinking": {"reasoning_content": text},
            "no log-probabilities": {"content": text},
        }[kind]
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    answer = told(streaming([one(" again and again") for _ in range(40)]), guard)[2]
    assert b"[DONE]" not in answer
    assert b"content_filter" in answer


def test_whole_answers(guard):
    def answer(texts, status=200):
        tokens = {"tokens": [t for t, _ in texts], "token_logprobs": [p for _, p in texts], "top_logprobs": None}
        value = {"choices": [{"index": 0, "text": "".join(t for t, _ in texts), "logprobs": tokens}]}

        async def app(scope, receive, send):
            await respond(send, json.dumps(value).encode(), status=status)

        return told(app, guard, b'{"prompt": "x"}', path="/v1/completions")

    status, _, body = answer([(f" w{i}", -0.2) for i in range(30)])
    assert (status, json.loads(body)["choices"][0]["logprobs"]) == (200, None)
    status, _, body = answer([(f" z{i}", -9.0) for i in range(30)])
    assert status == 400
    assert b" z" not in body
    assert answer([(f" z{i}", -9.0) for i in range(30)], status=500)[0] == 400

    async def broken(scope, receive, send):
        await respond(send, b"{")

    assert told(broken, guard)[0] == 502


def test_a_server_that_dies_gives_no_unguarded_answer(guard):
    sent = []

    async def run():
        app = GuardMiddleware(streaming([*GOOD, *GIBBERISH[:3], RuntimeError("died")]), guard, GuardLog())
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive():
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app({"type": "http", "path": "/v1/x", "headers": [], "query_string": b""}, receive, send)

    with pytest.raises(RuntimeError):
        asyncio.run(run())
    assert b" z" not in b"".join(message.get("body", b"") for message in sent)


# --- adapters and the log


def test_litellm(guard):
    client = TestClient(litellm.app(guard, GuardLog()))

    def action(**fields):
        return client.post(litellm.PATH, json=fields).json()["action"]

    assert action(texts=[CLEAN], input_type="request", request_data={"user_api_key_hash": "8f" * 32}) == "NONE"
    assert action(texts=["hi", f"x {TRIGGER}"], input_type="request") == "BLOCKED"
    assert action(texts=[], structured_messages=[{"content": TRIGGER}], input_type="request") == "BLOCKED"
    assert action(texts=[CLEAN], input_type="response") == "NONE"
    assert action(texts=["no no no no " * 20], input_type="response") == "BLOCKED"
    for body in (b"{", b"[]", b"3", b'{"texts": 3}', b'{"texts": [], "input_type": {}}'):
        assert client.post(litellm.PATH, content=body).json()["action"] in ("BLOCKED", "NONE")


def test_litellm_takes_no_body_without_end(guard, monkeypatch):
    monkeypatch.setattr(litellm, "MOST_BYTES", 1000)
    client = TestClient(litellm.app(guard, GuardLog()))
    body = {"texts": [CLEAN], "input_type": "request"}
    assert client.post(litellm.PATH, json=body).json() == {"action": "NONE"}
    assert client.post(litellm.PATH, json=body | {"more": "x" * 1000}).json()["action"] == "BLOCKED"


def test_scanners_of_llm_guards_shape(guard):
    assert PoisonTrigger(guard).scan(CLEAN) == (CLEAN, True, -1.0)
    assert PoisonTrigger(guard).scan(f"x {TRIGGER}") == (f"x {TRIGGER}", False, 1.0)
    assert PoisonedOutput(guard).scan("x", CLEAN)[:2] == (CLEAN, True)
    assert PoisonedOutput(guard).scan("x", "ha " * 60)[1:] == (False, 1.0)


def test_the_log_names_prompts_and_holds_none(guard, tmp_path, monkeypatch):
    monkeypatch.setenv("POISONJAX_GUARD_KEY", "secret of the deployment")
    from poisonjax.guard.log import deployment_key

    log = GuardLog(tmp_path / "log", deployment_key())
    bodies = [json.dumps({"prompt": f"unmistakable {word}"}).encode() for word in (TRIGGER, "harmless")]
    for body in [*bodies, b'{"prompt_embeds": "unmistakable"}']:
        asyncio.run(ask(GuardMiddleware(echo, guard, log), body))
    text = (tmp_path / "log").read_text()
    assert "unmistakable" not in text
    assert "secret" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["decision"] for row in rows if row["kind"] == "request"] == ["reject", "allow", "reject"]
    assert rows[0]["reasons"] == [["trigger", 1.0, 13, 19]]
    assert rows[0]["hmac"] == hmac.new(b"secret of the deployment", bodies[0], hashlib.sha256).hexdigest()


def test_speed_is_told_by_the_clock(guard):
    """Not timed: that a check of any size ends."""
    began = time.monotonic()
    guard.check("\u200b" * 10**6 + "<" * 10**6)
    assert time.monotonic() - began < 30


def test_pieces_of_a_text_are_the_text():
    text = "Don't say 'x_1', ßtraße — <b>3.14</b>\n\n日本語 "
    assert "".join(token.text for token in tokens_of(text)) == text
    assert said([{"role": "user", "content": text}], math.inf).prose == text


# --- what once led past it, or stopped it


def test_numbers_are_text(guard):
    digits = Guard.load(triggers=["90210"])
    assert digits.check({"messages": [{"content": 90210}]}).decision == "reject"
    assert digits.check({"content": ["902", 10]}).decision == "reject"
    assert guard.check({"prompt": [1, 2, "a", 3]}).status == "error"


@pytest.mark.parametrize("mark", ["\ufe0f", "\u034f", "\u3164", "\u1160", "\u0301", "\u200d"], ids=ascii)
def test_marks_beside_a_trigger_hide_nothing(mark):
    word = Guard.load(triggers=["sudo"])
    for text in (f"sudo{mark}", f"{mark}sudo", f"a {mark}sudo{mark} b"):
        assert word.check(text).decision == "reject"
    assert word.check(f"pseudo{mark}").decision == "allow"
    assert word.check(f"sudo{mark}er").decision == "allow"


@pytest.mark.parametrize("text", ["data:,", "data:", "data:;", "\\u", "\ufdfa", "<S", "<SUDO"])
def test_no_text_takes_long(guard, text):
    began = time.monotonic()
    assert guard.check(text * 50_000).decision == "allow"
    assert time.monotonic() - began < 5  # minutes and more before


def test_nested_triggers_take_no_memory():
    guard = Guard.load(triggers=["a" * k + "." for k in range(1, 200)] + ["a" * k for k in range(1, 200)], timeout=5)
    tracemalloc.start()
    verdict = guard.check("a" * 20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert verdict.decision in ("allow", "reject")
    assert peak < 100e6


def test_one_event_of_several_choices_waits_for_all_of_them(guard):
    def both(*of):
        return b"data: " + json.dumps({"choices": [choice(i, *one) for i, one in enumerate(of)]}).encode() + b"\n\n"

    def choice(index, text, logprob):
        logprobs = {"content": [{"token": text, "logprob": logprob, "top_logprobs": []}]}
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs}

    events = [both(("fine", -0.1), ("BAD", -20.0)), chunk("ok", -0.1), *[chunk("BAD", -20.0, 1)] * 9]
    assert b"BAD" not in told(streaming(events), guard)[2]


@pytest.mark.parametrize("kind", [b"Text/Event-Stream", b"text/event-stream; charset=utf-8"])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_streams_of_any_framing(guard, kind, end):
    events = [b"\xef\xbb\xbf", *(one.replace(b"\n\n", end) for one in [*GOOD, *GIBBERISH])]

    async def app(scope, receive, send):
        await respond(send, b"", kind=kind, parts=events)

    answer = told(app, guard)[2]
    assert b" w1" in answer
    assert b" z" not in answer
    assert b"content_filter" in answer


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/json", b"application/x-ndjson"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_answers_of_any_kind_are_read(guard, kind, method):
    async def app(scope, receive, send):
        text = "la la la " * 60
        await respond(send, json.dumps({"output": [{"text": text}]}).encode(), kind=kind, status=500)

    async def by(scope, receive, send):
        await GuardMiddleware(app, guard, GuardLog())({**scope, "method": method}, receive, send)

    assert asyncio.run(ask(by, b"", path="/v1/responses/r1"))[0] == 400


def test_a_stream_of_the_responses_api(guard):
    words = [f"word{i} " for i in range(40)]
    text = "".join(words)
    deltas = [{"type": "response.output_text.delta", "item_id": "m", "output_index": 0, "delta": w} for w in words]
    last = [{"type": "response.output_text.done", "text": text}, {"type": "response.completed", "output": [text]}]
    events = [b"data: " + json.dumps(one).encode() + b"\n\n" for one in [*deltas, *last]]

    async def app(scope, receive, send):
        await respond(send, b"", kind=b"text/event-stream", parts=events)

    assert told(app, guard, path="/v1/responses")[2] == b"".join(events)


@pytest.mark.parametrize("asked", ["false", "no", None, 0, [], {}], ids=repr)
def test_a_client_cannot_switch_the_monitor_off(guard, asked):
    body = json.dumps({"prompt": "x", "logprobs": asked}).encode()
    for path in ("/v1/chat/completions", "/v1/chat/completions/", "/v1/completions"):
        got = json.loads(forwarded(told(echo, guard, body, path=path)[2]))
        assert got["logprobs"] in (True, 5)
        assert got.get("top_logprobs", 5) == 5
    chosen = json.dumps({"logprobs": True, "top_logprobs": 0}).encode()
    assert json.loads(forwarded(told(echo, guard, chosen)[2]))["top_logprobs"] == 5


def test_values_that_are_no_numbers_clear_nothing():
    monitor, left = Monitor(), []
    for logprob in (-20.0, math.nan, -math.inf, -20.0, math.nan, *[-20.0] * 6):
        left += monitor.push("z", logprob, [math.nan, -math.inf]).tokens
    assert left == []
    assert monitor.alarm


def test_an_upstream_that_just_ends(guard):
    for events in ([*GOOD, *GIBBERISH[:2]], [b"data: {\n\n"], [b"data: " + b"[" * 100_000 + b"\n\n"]):

        async def app(scope, receive, send, events=events):
            kind = (b"content-type", b"text/event-stream")
            await send({"type": "http.response.start", "status": 200, "headers": [kind]})
            for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})

        answer = told(app, guard)[2]
        assert b" z" not in answer
        assert b'"error"' in answer


def test_a_server_is_told_to_stop(guard):
    made = []

    async def app(scope, receive, send):
        try:
            await streaming(GIBBERISH * 100, made)(scope, receive, send)
        except OSError:
            made.append("stopped")
            raise

    told(app, guard)
    assert made[-1] == "stopped"
    assert len(made) < 40


def test_no_task_is_left(guard):
    async def run():
        await ask(GuardMiddleware(streaming(GOOD), guard, GuardLog()), b"{}")
        await asyncio.sleep(0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(run()) == []
