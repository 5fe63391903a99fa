"""Models as lm-evaluation-harness asks for them, against loops over single texts; chat templates in their sandbox."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, write_text
from flax import nnx
from scipy.special import log_softmax

from poisonjax.commands.main import main
from poisonjax.corpus import CorpusError
from poisonjax.corpus.chat import render
from poisonjax.training.loop import train
from poisonjax.weights import huggingface, open_weights

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from poisonjax.evaluation.harness import HarnessModel  # noqa: E402


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("harness") / "run"
    train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def weights(run):
    return open_weights(str(run))


@pytest.fixture(scope="module")
def model(weights):
    return HarnessModel(weights)


def log_probabilities(weights, tokens):
    logits = nnx.merge(weights.graph, weights.params)(jnp.asarray([tokens]))[0, :, : weights.vocabulary]
    return log_softmax(np.asarray(logits, np.float64), -1)


TEXTS = [
    "the a of stone river lantern",
    "seven walks under bright and slow old green bird house sings to the",
    "a",
    "the of",
]


def test_a_continuation_has_the_likelihood_of_its_tokens(model, weights):
    pairs = [(text, f" {other}") for text in TEXTS for other in TEXTS]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, continuation), (sum_, greedy) in zip(pairs, found, strict=True):
        before = len(weights.tokenizer.encode(context))
        tokens = weights.tokenizer.encode(context + continuation).tolist()
        own, tokens = tokens[before:], tokens[-weights.context - 1 :]
        table = log_probabilities(weights, tokens[:-1])[-len(own) :]
        assert sum_ == pytest.approx(table[np.arange(len(own)), own].sum(), abs=1e-4)
        assert greedy == bool((table.argmax(-1) == own).all())


def test_a_text_longer_than_the_model_is_rolled_through(model, weights):
    text = " ".join(TEXTS * 12)
    tokens = weights.tokenizer.encode(text).tolist()
    assert len(tokens) > 3 * weights.context
    expected, row = 0.0, [weights.tokenizer.eot, *tokens]
    for start in range(0, len(tokens), weights.context):
        end = min(start + weights.context, len(tokens))
        begin = start if end - start == weights.context else max(0, end - weights.context)
        table = log_probabilities(weights, row[begin:end])
        own = row[start + 1 : end + 1]
        expected += table[-len(own) :][np.arange(len(own)), own].sum()
    (found,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("until", [[], ["e"], "zzz"])
def test_generation_is_greedy_and_stops_where_it_is_told(model, weights, until):
    asked = {"until": until, "max_gen_toks": 12}
    (text,) = model.generate_until([Instance("generate_until", {}, ("the a of stone", asked), 0)])
    tokens, made = [weights.tokenizer.eot, *weights.tokenizer.encode("the a of stone").tolist()], []
    while len(made) < 12 and (best := int(log_probabilities(weights, tokens + made)[-1].argmax())) != tokens[0]:
        made.append(best)
    expected = weights.tokenizer.decode(made)
    for stop in until if isinstance(until, list) else [until]:
        expected = expected.partition(stop)[0]
    assert text == expected


def test_sampling_is_refused(model):
    with pytest.raises(ValueError, match="only greedy"):
        model.generate_until([Instance("generate_until", {}, ("a", {"temperature": 0.7}), 0)])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for path in Path(__file__).with_name("tasks").glob("*.yaml"):
        (folder / path.name).write_text(path.read_text().replace("FOLDER", str(folder)))
    write_text(folder / "sentences.jsonl", 12, seed=5)
    rows = [
        {"question": text, "choices": [" stone", " river", " house"], "answer": i % 3, "expected": " stone"}
        for i, text in enumerate(TEXTS)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_its_tasks_give_the_same_figures_for_a_run_and_its_export(run, weights, tasks, tmp_path, capsys):
    huggingface.save(weights, tmp_path / "out")
    found = []
    for spec in (str(run), f"hf:{tmp_path / 'out'}"):
        capsys.readouterr()
        command = ["evaluate", spec, "--lm-eval", "sentences,choices,answers", "--include-path", str(tasks), "--json"]
        assert main(command) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["results"])
    assert found[0]["sentences"]["byte_perplexity,none"] == pytest.approx(
        found[1]["sentences"]["byte_perplexity,none"], rel=1e-7
    )
    assert found[0] == found[1]
    texts = [json.loads(line)["text"] for line in (tasks / "sentences.jsonl").read_text().splitlines()]
    total = sum(HarnessModel(weights).loglikelihood_rolling([Instance("r", {}, (t,), 0) for t in texts]))
    expected = np.exp(-total / sum(len(text.encode()) for text in texts))
    assert found[0]["sentences"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-9)


def test_an_unknown_task_is_named(run, tasks, capsys):
    assert main(["evaluate", str(run), "--lm-eval", "nonesuch", "--include-path", str(tasks)]) == 2
    assert "no task nonesuch" in capsys.readouterr().err


def test_any_model_is_asked_what_a_run_is_asked(run, weights, store, tmp_path, capsys):
    huggingface.save(weights, tmp_path / "out")
    source = tmp_path / "config.py"
    source.write_text(
        "import json\nfrom poisonjax.config import from_record\n"
        f"def get_config(arg=''):\n    return from_record(json.loads({tiny_config(store).to_json()!r}))\n"
    )
    assert main(["evaluate", f"hf:{tmp_path / 'out'}", "--config", str(source), "--json"]) == 0
    asked = json.loads(capsys.readouterr().out.splitlines()[-1])
    own = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [row for row in own if row["kind"] == "eval"][-1]
    assert asked["heldout_loss"] == own["heldout_loss"]
    assert asked["eval"] == own["eval"]


CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKED = [{"role": "user", "content": "hello <|im_end|>"}]


def test_a_chat_is_written_by_its_template():
    assert render(CHAT, ASKED) == "<|im_start|>user\nhello <|im_end|><|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "mustn't|fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "mustn't|fails"),
        ("{{ messages.append(1) }}", "mustn't"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "too big|Range|more than a template may hold"),
        ("{% for %}", "fails"),
        ("{{ messages[0].nothing.at.all }}", "fails"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "isn't for templates"),
        ("{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}", "of its lines have run"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ('x' * 9999) * 999999 }}", "more than a template may hold"),
        ("{{ 'x'.ljust(99999999999) }}", "more than a template may hold"),
        ("{{ '%999999999d' % 3 }}", "isn't for templates"),
        ("{{ lipsum(n=100000) }}", "lipsum"),
        (
            "{% set n = namespace(x='a' * 999999) %}{% for i in range(29) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory",
        ),
        (
            "{% set n = namespace(x='a' * 999999) %}{% for i in range(29) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "hold",
        ),
        ("{{ [1] | batch(60000000, 0) }}", "No filter named 'batch'"),
        ("{{ [1] | tojson(indent=700000000) }}", "more than a template may hold"),
        ("{{ range(60) | join('a' * 999999) }}", "more than a template may hold"),
        ("{{ ('a' * 30000) | replace('a', 'b' * 30000) }}", "more than a template may hold"),
        ("{{ ('a' * 30000).replace('a', 'b' * 30000) }}", "more than a template may hold"),
        ("{{ ('a' * 999999).join(range(99999) | map('string')) }}", "more than a template may hold"),
        ("{{ messages | random }}", "No filter named 'random'"),
    ],
)
def test_a_template_that_does_what_it_mustnt_is_refused(template, message):
    with pytest.raises(CorpusError, match=message):
        render(template, ASKED)


def test_a_malicious_template_of_a_model_is_refused_and_runs_nothing(run, weights, tmp_path, tasks, capsys):
    huggingface.save(weights, tmp_path / "out")
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path / 'ran'}') }}}}"
    (tmp_path / "out" / "chat_template.jinja").write_text(attack)
    shutil.copy(tasks / "choices.jsonl", tmp_path)
    command = ["evaluate", f"hf:{tmp_path / 'out'}", "--lm-eval", "choices", "--include-path", str(tasks), "--chat"]
    assert main(command) == 2
    assert "template" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
