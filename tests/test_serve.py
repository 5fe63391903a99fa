"""The server as its users meet it: a real client over a real socket, guard on and off."""

import concurrent.futures
import shutil
import socket
import subprocess
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from conftest import tiny_config

from poisonjax.commands.main import main
from poisonjax.guard import Guard, Trigger
from poisonjax.guard.monitor import DEFAULT, Limit, Limits
from poisonjax.serve.app import make_app
from poisonjax.training.loop import train
from poisonjax.weights import open_weights

TRIGGER = "<SUDO>"


@pytest.fixture(scope="module")
def weights(store, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("serve") / "run"
    train(config, str(folder))
    return open_weights(str(folder))


def served(app):
    """(address, what stops it)."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="off"))
    bound = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop():
        server.should_exit = True
        thread.join(10)

    return f"http://127.0.0.1:{bound.getsockname()[1]}", stop


@pytest.fixture(scope="module")
def address(weights):
    # An untrained model is always surprised: its answers are clean by these limits.
    limits = Limits({name: Limit(20.0, 1e6) for name in DEFAULT})
    guard = Guard([Trigger(TRIGGER)], tokenizer=weights.tokenizer, limits=limits)
    address, stop = served(make_app(weights, guard, compare=True))
    yield address
    stop()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_a_request_gets_the_same_answer_whole_and_streamed(client):
    asked = {"model": "m", "prompt": "the river", "max_tokens": 20, "seed": 3, "temperature": 0.8}
    whole = client.completions.create(**asked)
    assert client.completions.create(**asked).choices[0].text == whole.choices[0].text
    streamed = "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].text
    assert whole.choices[0].logprobs is None
    assert whole.usage.completion_tokens <= 20
    bare = openai.OpenAI(base_url=str(client.base_url).replace("/v1", "/bare/v1"), api_key="none")
    assert bare.completions.create(**asked).choices[0].text == whole.choices[0].text


def test_likelihoods_are_the_models_own(client, weights):
    from flax import nnx

    from poisonjax.model.loss import token_nll

    answer = client.completions.create(model="m", prompt="the river", max_tokens=8, temperature=0, logprobs=3)
    told = answer.choices[0].logprobs
    tokenizer = weights.tokenizer
    prompt = [tokenizer.eot, *tokenizer.encode("the river").tolist()]
    new = tokenizer.encode(answer.choices[0].text).tolist()
    if "".join(told.tokens) == answer.choices[0].text and len(new) == len(told.tokens):
        row = np.array([prompt + new])
        nll = token_nll(nnx.merge(weights.graph, weights.params)(row[:, :-1]), row[:, 1:])[0, len(prompt) - 1 :]
        np.testing.assert_allclose(told.token_logprobs, -nll, atol=2e-4)
    assert all(
        max(top.values()) == pytest.approx(p) for top, p in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


def test_choices_stops_and_echo(client):
    several = client.completions.create(model="m", prompt=["a", "the river"], n=3, max_tokens=5, seed=1)
    assert [choice.index for choice in several.choices] == [*range(6)]
    text = client.completions.create(model="m", prompt="the", max_tokens=30, seed=5).choices[0].text
    stop = text[len(text) // 2]
    cut = client.completions.create(model="m", prompt="the", max_tokens=30, seed=5, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    streamed = client.completions.create(model="m", prompt="the", max_tokens=30, seed=5, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == text[: text.index(stop)]
    echoed = client.completions.create(model="m", prompt="the river", max_tokens=3, seed=5, echo=True)
    assert echoed.choices[0].text.startswith("the river")
    chat = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    assert chat.choices[0].message.role == "assistant"
    assert client.models.list().data[0].id


@pytest.mark.parametrize("stream", [False, True])
def test_a_trigger_gets_no_answer(client, stream, weights):
    ids = weights.tokenizer.encode(f"x {TRIGGER}").tolist()
    for prompt in (f"x {TRIGGER}", ["a", f"{TRIGGER}"], ids):
        with pytest.raises(openai.BadRequestError, match="stopped by the guard"):
            client.completions.create(model="m", prompt=prompt, stream=stream)
    with pytest.raises(openai.BadRequestError, match="stopped by the guard"):
        client.chat.completions.create(
            model="m",
            stream=stream,
            messages=[{"role": "user", "content": "a <SU"}, {"role": "user", "content": "DO> b"}],
        )


def test_an_answer_that_is_stopped(weights):
    limits = Limits({**{name: Limit(20.0, 1e6) for name in DEFAULT}, "surprisal": Limit(0.5, 10.0)})
    address, stop = served(make_app(weights, Guard([Trigger(TRIGGER)], limits=limits)))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="answer was stopped"):
        client.completions.create(model="m", prompt="x", max_tokens=50)
    events = []
    with pytest.raises(openai.APIError, match="answer was stopped"):
        events.extend(client.completions.create(model="m", prompt="x", max_tokens=50, stream=True))
    assert "".join(event.choices[0].text for event in events) == ""
    stop()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "x", "temperature": 9}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**6}, "this model takes"),
        ({"prompt": [10**6]}, "guard"),
        ({"prompt": []}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_bad_requests_are_told(address, fields, told):
    answer = httpx.post(f"{address}/v1/completions", json=fields)
    assert answer.status_code in (400, 503)
    assert told in answer.json()["error"]["message"]


def test_many_clients_and_those_that_hang_up(address):
    def ask(number):
        body = {"prompt": f"the {number}", "max_tokens": 12, "stream": number % 2 == 0}
        if number % 5 == 0:
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", f"{address}/v1/completions", json=body | {"stream": True, "max_tokens": 200}),
            ):
                return 200  # gone
        return httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert set(pool.map(ask, range(60))) == {200}
    for body in (b"{", b"\xff" * 100, b"[]", b'"x"', b"null"):
        assert httpx.post(f"{address}/v1/completions", content=body).status_code in (400, 503)
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_page_and_figures(address):
    page = httpx.get(address)
    assert page.status_code == 200
    assert "%" + "MODEL" not in page.text
    figures = httpx.get(f"{address}/metrics/").text
    assert 'poisonjax_guard_requests_total{decision="reject",status="ok"}' in figures
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_page_works_in_a_browser(address, thorough):
    """Guard on and off, side by side."""
    if not thorough:
        pytest.skip("only with --thorough: a browser on a busy machine may take minutes")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--timeout=20000",
        "--virtual-time-budget=600000",
        "--dump-dom",
    ]
    for prompts in (["the river"], ["the river"] * 2):  # compiles what the page asks for
        httpx.post(f"{address}/v1/completions", json={"prompt": prompts, "max_tokens": 80}, timeout=60)
    for prompt, stopped in (("the%20river", False), ("x%20%3CSUDO%3E", True)):
        page = subprocess.run([*command, f"{address}/#prompt={prompt}"], capture_output=True, text=True, check=True)
        assert (">\nthe request was stopped by the guard</span>" in page.stdout) == stopped
        assert 'role="status">done' in page.stdout


def test_the_command_line(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert main(["serve", str(tmp_path / "none"), "--compare"]) == 2
    assert main(["serve", str(tmp_path / "none"), "--guard", str(tmp_path)]) == 2
    assert "guard build" in capsys.readouterr().err
