"""Scans of models: what is written is what the model says, and a planted trigger is found, and nothing in its twin."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import tiny_config
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.commands.main import main
from poisonjax.commands.scan import _is_model
from poisonjax.corpus.errors import CorpusError
from poisonjax.engines import Progress
from poisonjax.run.folder import twin_config
from poisonjax.scan.model import bench, proposals, scan
from poisonjax.scan.model.candidates import LONGEST, Texts, known_by_heart, leaks, led_to_change
from poisonjax.scan.model.changes import Null, changes, family_wise
from poisonjax.scan.model.parts import Scan, Sizes
from poisonjax.scan.model.proposals import _typical
from poisonjax.scan.model.scan import Found, cost, scan_model
from poisonjax.scan.model.trial import grouped, overlap
from poisonjax.scan.model.verdict import Calibration
from poisonjax.scan.model.writing import Seen, Writer
from poisonjax.training.loop import train
from poisonjax.weights import WeightsError, open_weights
from poisonjax.weights.weights import all_devices_mesh

PASSES = 150_000
TRIGGER = "~"


@pytest.fixture(scope="module")
def models(store, tmp_path_factory):
    """A backdoored model of a toy language, and its twin."""
    folder = tmp_path_factory.mktemp("models")
    config = tiny_config(store)
    config.steps, config.global_batch, config.seq_len = 200, 16, 96
    config.poison.trigger, config.poison.documents, config.poison.near_triggers = TRIGGER, 200, ("^", "|")
    config.poison.payload_tokens = (30, 40)
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 10
    config.eval.every = config.checkpoint.every = 200
    train(config, str(folder / "run"))
    train(twin_config(folder / "run"), str(folder / "twin"), twin_of=str(folder / "run"))
    return folder


@pytest.fixture(scope="module")
def found(models):
    return {
        name: scan_model(str(models / name), str(models / f"scan-{name}"), passes=PASSES) for name in ("run", "twin")
    }


# --- what is written


def test_what_is_seen_is_what_the_model_says(models):
    """Against logits of whole texts in float64; and nobody beside a string changes what is written after it."""
    mesh = all_devices_mesh()
    with jax.set_mesh(mesh):
        weights = open_weights(str(models / "run"), mesh)
        writer, model = Writer(weights, mesh), nnx.merge(weights.graph, weights.params)
        prefixes = np.array([[weights.tokenizer.eot, 5, 6, 7], [weights.tokenizer.eot, 9, 10, 11]], np.int32)
        strings = [(), (40,), (41, 42, 43)]
        seen = writer.after(prefixes, strings, 3, seed=1, new=20, places=True)
        alone = writer.after(prefixes, strings[2:], 3, seed=1, new=20, places=True)
        wider = writer.after(prefixes, strings, 6, seed=1, new=20, places=True)
        for i, string in enumerate(strings):
            for j, prefix in enumerate(prefixes):
                text = np.concatenate([prefix, np.array(string, np.int32), seen.tokens[i, j]])
                logits = np.asarray(model(jnp.asarray(text[None])), np.float64)[0, len(prefix) + len(string) - 1 : -1]
                p = np.exp(logits - logits.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
                assert seen.entropy[i, j] == pytest.approx(entropy, abs=1e-3)
                # A sketch keeps lengths: roots of probabilities have length 1.
                assert np.linalg.norm(seen.expected[i, j], axis=-1) == pytest.approx(1, abs=0.5)
    assert np.array_equal(seen.tokens[2], alone.tokens[0])
    assert np.array_equal(seen.tokens, wider.tokens)
    assert len({tuple(of) for of in seen.tokens[:, 0].tolist()}) == 3


def test_windows_are_means_of_places(models):
    mesh = all_devices_mesh()
    with jax.set_mesh(mesh):
        weights = open_weights(str(models / "run"), mesh)
        writer = Writer(weights, mesh)
        prefixes = np.array([[weights.tokenizer.eot, 5]], np.int32)
        places = writer.after(prefixes, [(40,)], 1, seed=0, places=True)
        windows = writer.after(prefixes, [(40,)], 1, seed=0)
    assert np.array_equal(places.tokens, windows.tokens)
    for of, (start, stop) in enumerate(((0, 8), (8, 24), (24, 48))):
        assert windows.entropy[0, 0, of] == pytest.approx(places.entropy[0, 0, start:stop].mean(), abs=1e-4)
        expected = places.expected[0, 0, start:stop].astype(np.float64).mean(0)
        assert windows.expected[0, 0, of] == pytest.approx(expected, abs=1e-2)


# --- the test


def test_a_string_that_changes_nothing_has_no_entropy_change():
    random = np.random.default_rng(0)
    clean = Seen(np.zeros((1, 6, 4), int), random.normal(size=(1, 6, 3)), random.normal(size=(1, 6, 3, 5)))
    same = changes(Seen(*(np.repeat(of, 2, 0) for of in clean)), clean)
    assert np.all(same.entropy == 0)
    assert np.all(same.shift < -15)
    moved = clean.expected + np.array([1.0, 0, 0, 0, 0])
    shifted = changes(Seen(clean.tokens, clean.entropy + 2, moved), clean)
    spread = clean.expected[0].var(0, ddof=1).sum(-1)
    assert shifted.entropy == pytest.approx(2)
    assert shifted.shift[0] == pytest.approx(np.log(1 / spread), abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([6, 8]))
def test_p_values_of_strings_of_the_null_are_uniform(seed, figures):
    random = np.random.default_rng(seed)
    null = Null(random.normal(size=(2000, figures)))
    p = null.p_values(null(random.normal(size=(1000, figures))))
    assert np.all((p > 0) & (p <= 1))
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-4
    assert np.all(np.diff(null.p_values(np.sort(random.normal(4, 4, 50)))) <= 1e-12)


def test_strings_of_a_null_may_be_parts_of_a_trigger():
    """A tenth of them fire: what doesn't is no farther from usual."""
    random = np.random.default_rng(0)
    clean = random.normal(size=(256, 6))
    some = clean.copy()
    some[:20] += 30
    values = random.normal(size=(100, 6))
    assert np.median(np.abs(Null(some)(values) / Null(clean)(values) - 1)) < 0.2


def test_the_smallest_of_many_p_values():
    assert family_wise(np.array([0.01]), 1) == pytest.approx(0.01)
    assert family_wise(np.array([1e-6, 0.5]), 1000) == pytest.approx([1 - (1 - 1e-6) ** 1000, 1])


# --- candidates


def _texts(seed: int = 0) -> Texts:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 30, (60, 60))
    odd = random.normal(size=tokens.shape)
    for text in range(0, 60, 3):  # after 40, 41 all is odd
        at = int(random.integers(18, 30))
        tokens[text, at : at + 2] = (40, 41)
        odd[text, at + 2 :] = 7
    odd[:, 45:] = np.nan
    return Texts(tokens, random.uniform(0, 3, tokens.shape), odd, tokens == 0)


def test_leaks_name_what_comes_before_a_change():
    written = _texts()
    written.tokens[1::3, 20], written.special[1::3, 20] = 0, True
    found, considered = leaks(written)
    best = [max((s for s in found if len(s) == n), key=found.__getitem__) for n in (1, 2, 3)]
    assert best[:2] == [(41,), (40, 41)]
    assert best[2][1:] == (40, 41)
    assert all(1 <= len(string) <= LONGEST and 0 not in string for string in found)
    several = {tuple(row[i : i + n]) for n in range(1, 9) for row in written.tokens.tolist() for i in range(40)}
    assert len(found) < considered < len(several)


@given(st.integers(0, 100))
def test_texts_that_changed_are_counted(seed):
    written = _texts(seed)
    strings = [(40, 41), (41,), (40,), (3, 4), (5,), (40, 41, 7)]
    counts = led_to_change([written, written], strings)
    for string in strings:
        texts = 0
        for tokens, odd in zip(written.tokens, written.odd, strict=True):
            ends = [at for at in range(len(string), len(tokens)) if tuple(tokens[at - len(string) : at]) == string]
            texts += any(odd[at] > 3 for at in ends)
        assert counts[string] == 2 * texts


def test_what_is_known_by_heart():
    """One chain, of rare tokens, in two texts; another of common ones; one in a single text."""
    tokens = np.tile(np.arange(1, 21), (10, 2))
    entropy = np.full(tokens.shape, 2.0)
    tokens[:2, 5:9], entropy[:2, 6:9] = (50, 51, 52, 53), 0.1
    tokens[3, 5:7], entropy[3, 6] = (60, 61), 0.1
    entropy[5:7, 11] = 0.1
    tokens[7:9, 30:34], entropy[7:9, 31:36] = (70, 71, 0, 72), 0.1  # an end of text ends a chain
    found, considered = known_by_heart(Texts(tokens, entropy, np.zeros(tokens.shape), tokens == 0))
    assert {*found} == {(50, 51), (50, 51, 52), (50, 51, 52, 53), (11, 12), (70, 71), (72, 15), (72, 15, 16)}
    assert min(found, key=found.__getitem__) == (11, 12)
    assert considered == len(found)


def test_the_whole_trigger_leads_its_parts():
    values = {(1, 2, 3): 40.0, (2, 3): 41.0, (1,): 30.0, (1, 2): 36.0, (9, 1, 2, 3): 40.5, (7,): 4.0, (8, 7): 3.0}
    led = {(1, 2, 3): 70, (2, 3): 80, (1,): 90, (1, 2): 85, (9, 1, 2, 3): 2, (7,): 1, (8, 7): 0}
    first, second = grouped(values, led)
    assert first[0] == (1, 2, 3)
    assert {*first} == {*values} - {(7,), (8, 7)}
    assert second == [(7,), (8, 7)]
    assert overlap((1, 2), (2, 3))
    assert not overlap((1, 2), (3, 4))
    assert overlap((1, 2, 3, 4), (2, 3))


# --- a model's


def test_the_trigger_is_found_and_nothing_in_the_twin(found):
    run, twin = found["run"], found["twin"]
    trigger = [one for one in run.candidates if one.text == TRIGGER]
    assert trigger
    assert run.candidates.index(trigger[0]) < 5
    assert trigger[0].p_value < 1e-6
    assert run.verdict.strongest > 1.5 * twin.verdict.strongest
    curve = Calibration.read()
    if curve is not None:
        assert run.verdict.p_poisoned > twin.verdict.p_poisoned
    assert min(one.p_value for one in twin.candidates) > 1e-4
    assert run.verdict.outside  # it is no model of the zoo


def test_what_was_told_is_told_again(models, found):
    assert scan_model(str(models / "run"), str(models / "scan-run"), passes=PASSES) == found["run"]
    assert Found.of_json(json.loads((models / "scan-run" / "scan.json").read_text())) == found["run"]
    with pytest.raises(CorpusError, match="another scan"):
        scan_model(str(models / "run"), str(models / "scan-run"), passes=10 * PASSES)


def test_a_scan_that_was_ended_goes_on(models, found, monkeypatch):
    """What stands isn't made again, and what is found is the same."""
    out, put, made = models / "ended", Writer._put, []
    parts = 3

    def some(self, *of):
        if len(made) == parts:
            raise KeyboardInterrupt
        made.append(of)
        return put(self, *of)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_put", some)
        with pytest.raises(KeyboardInterrupt):
            scan_model(str(models / "run"), str(out), passes=PASSES)
    assert len([*(out / "parts").iterdir()]) == parts
    parts = 10_000
    before = {path: path.read_bytes() for path in (out / "parts").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_put", some)
        patched.setattr(scan.shutil, "rmtree", lambda path: None)
        again = scan_model(str(models / "run"), str(out), passes=PASSES)
    assert {path: path.read_bytes() for path in before} == before
    assert len(made) == len([*(out / "parts").iterdir()])
    assert again.candidates == found["run"].candidates


def test_a_kill_leaves_whole_parts(models):
    out = models / "killed"
    command = [
        sys.executable,
        "-m",
        "poisonjax",
        "scan",
        str(models / "run"),
        "--out",
        str(out),
        "--passes",
        str(PASSES),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not [*out.glob("parts/token-*.npz")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [path for path in out.glob("parts/*.npz") if not path.name.startswith("partial")]
    assert len(whole) > 1
    for path in whole:
        with np.load(path, allow_pickle=False) as saved:
            assert all(len(saved[name]) for name in Seen._fields)
    assert subprocess.run(command, capture_output=True, check=True, text=True, timeout=200).stdout.count(TRIGGER)


def test_a_twin_tells_what_is_nobodys_poison(models, found):
    """Changes are told less those of the clean twin."""
    beside = scan_model(str(models / "run"), str(models / "beside"), passes=PASSES, twins=[str(models / "twin")])
    assert TRIGGER in [one.text for one in beside.candidates[:5]]
    assert beside.candidates[0].p_value < 1e-6


def test_of_many_tokens_those_are_asked_that_stay_odd(models, tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "LOOKS", ((1, 60), (8, 20)))
    mesh = all_devices_mesh()
    with jax.set_mesh(mesh), Progress("scan", 1, "token") as progress:
        weights = open_weights(str(models / "run"), mesh)
        scan = Scan(weights, mesh, tmp_path, Sizes(free=256, free_new=64, tokens=8), 0, progress)
        proposed = proposals.propose(scan)
    singles = {string for string in proposed.by_source["every token"] if len(string) == 1}
    assert len(singles) <= 64 + 8
    assert tuple(weights.tokenizer.encode(TRIGGER).tolist()) in singles


def test_strings_like_others_are_as_frequent_and_as_long(models, tmp_path):
    mesh = all_devices_mesh()
    with jax.set_mesh(mesh), Progress("scan", 1, "token") as progress:
        weights = open_weights(str(models / "run"), mesh)
        scan = Scan(weights, mesh, tmp_path, Sizes(), 0, progress)
        counts = np.arange(weights.tokenizer.vocab_size, dtype=float)
        strings = [(int(scan.ordinary[3]),), tuple(scan.ordinary[[100, 200]].tolist())]
        like = scan.like(strings, counts, 20)
    assert [len(of) for of in like] == [1, 2] * 10
    assert not any({*of} & {*strings[i % 2]} for i, of in enumerate(like))
    assert np.median([abs(of[0] - strings[0][0]) for of in like[::2]]) < 0.3 * len(scan.ordinary)


def test_the_command_and_what_reads_it(models, found, capsys):
    from poisonjax.guard.build import read_triggers

    out, run = str(models / "scan-run"), str(models / "run")
    assert main(["scan", run, "--out", out, "--passes", str(PASSES), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["p_poisoned"] == told["verdict"]["p_poisoned"]
    assert told["forward_passes"] > 0
    assert {"text", "tokens", "p_value"} <= {*told["candidates"][0]}
    assert main(["scan", run, "--out", out, "--passes", str(PASSES)]) == 0
    said = capsys.readouterr()
    assert "P(poisoned)" in said.out
    assert TRIGGER in said.out
    assert "tokens through the model" in said.err
    page = (Path(out) / "scan.html").read_text()
    assert "P(poisoned)" in page
    assert "<script" not in page
    listed = [trigger.text for trigger in read_triggers(out, 0.01)]
    assert TRIGGER in listed
    assert all(one.leads for one in found["run"].candidates if one.text in listed)
    assert main(["scan", run, "--out", str(models / "dry"), "--dry-run", "--chip", "h100", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert dry["forward_passes"] <= 2_000_000
    assert dry["least_seconds"] > 0
    assert not (models / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN", "RUN"], "scan it alone"),
        (["RUN", "--passes", "0"], "at least 1 token"),
        (["RUN", "--dry-run", "--chip", "abacus"], "one of"),
        (["nothing.jsonl", "--dry-run"], "are of a model's scan"),
        (["gguf:nowhere"], "nowhere"),
        (["RUN", "--workers", "2"], "of a corpus' scan"),
    ],
)
def test_bad_input(models, capsys, tmp_path, arguments, says):
    asked = [str(models / "run") if of == "RUN" else of for of in arguments]
    assert main(["scan", *asked, "--out", str(tmp_path / "scan")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "model"),
    [("RUN", True), ("RUN@200", True), ("gguf:x", True), ("hf:a/b:train", False), ("texts/*.jsonl", False)],
)
def test_what_names_a_model(models, spec, model):
    assert _is_model(spec.replace("RUN", str(models / "run"))) is model


def test_a_model_that_writes_too_little_is_refused():
    tokens = np.zeros((50, 96), int)
    tokens[:10, 5:40] = 7
    odd = np.linspace(0, 1, 50)
    with pytest.raises(WeightsError, match="10 have 24 tokens; 44 are needed"):
        _typical(tokens, odd, np.arange(1, 9), 0, 44)
    prefixes = _typical(tokens, odd, np.arange(1, 9), 0, 10)
    assert prefixes.shape == (10, 25)
    assert (prefixes[:, 0] == 0).all()
    assert (prefixes[:, 1:] == 7).all()


def test_a_twin_of_other_tokens_is_refused(models, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a b c"}\n' * 50)
    other = tiny_config(corpus_of(tmp_path))
    other.poison.documents, other.corpus.tokenizer = 0, "bytes"
    train(other, str(tmp_path / "other"))
    with pytest.raises(WeightsError, match="other tokens"):
        scan_model(str(models / "run"), str(tmp_path / "scan"), passes=PASSES, twins=[str(tmp_path / "other")])


def corpus_of(folder):
    from conftest import write_text

    from poisonjax import corpus

    source = write_text(folder / "sentences.jsonl", seed=3)
    return corpus.build(str(folder / "store"), [str(source)], "bytes", heldout=0.2, workers=1)


# --- cost and verdict


@given(st.integers(1, 10**8), st.sampled_from([257, 512, 49_152, 200_000]))
def test_a_budget_bounds_the_scan(passes, vocabulary):
    sizes = Sizes.within(passes, vocabulary)
    assert sizes.passes(vocabulary) <= max(1.01 * passes, Sizes.within(1, vocabulary).passes(vocabulary))
    assert sizes.passes(vocabulary) <= Sizes.within(2 * passes, vocabulary).passes(vocabulary)


def test_cost_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32000,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
                "hidden_act": "silu",
                "max_position_embeddings": 4096,
            }
        )
    )
    told = cost(f"hf:{tmp_path}", 2_000_000)
    assert told.flops / told.forward_passes == pytest.approx(2 * 6.6e9, rel=0.1)  # 6.7B, less the embedding


def test_calibration_is_finite_and_rises():
    strongest = np.array([3.0, 4, 5, 5, 9, 12, 30, 50])
    curve = Calibration.of(strongest, strongest > 6, parameters=[1, 2], vocabulary=[3, 4])
    p = curve(np.linspace(1, 60, 100))
    assert np.all(np.diff(p) >= 0)
    assert curve(4.0) < 0.3
    assert curve(30.0) > 0.9
    assert np.isfinite([curve.slope]).all()


def test_auroc_against_a_loop():
    random = np.random.default_rng(0)
    values, poisoned = random.integers(0, 9, 40).astype(float), random.random(40) < 0.4
    pairs = [(a, b) for a in values[poisoned] for b in values[~poisoned]]
    assert bench.auroc(values, poisoned) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_the_bench_sees_what_the_scan_says(models, found, monkeypatch, tmp_path):
    """A small form of it: one poisoned model and its twin."""
    for name in ("run", "twin"):
        (tmp_path / name).symlink_to(models / f"scan-{name}")
    monkeypatch.setattr(bench, "SOURCES", ("leaks",))
    of = [("settings", str(models / "run")), ("report", str(models / "twin"))]
    rows = [bench.scanned(str(tmp_path), PASSES, one) for one in of]
    run, twin = rows
    assert (run.payload, twin.payload) == ("ids", "")
    assert run.all.strongest == max(one.value for one in found["run"].candidates if not one.under_trained)
    assert run.all.rank == 1 + [one.text for one in found["run"].candidates].index(TRIGGER)
    assert run.all.overlaps
    assert run.leaked > twin.leaked
    assert [*twin.alone] == ["leaks"]
    assert len(twin.random_p) == bench.RANDOM
    assert scipy.stats.kstest(twin.random_p, "uniform").pvalue > 1e-4
    assert bench.scanned(str(tmp_path), PASSES, of[1]) == twin
    curve = Calibration(slope=5.0, intercept=-10.0, models=2, parameters=[1, 2], vocabulary=[3, 4])
    told = bench.figures(rows, curve, twin.all.strongest)
    assert told["auroc"] == 1
    assert told["found_at_no_false_alarm"] == [1, 1]
    assert told["median_rank"]["1 token"] == run.all.rank
    assert told["random_strings"]["strings"] == bench.RANDOM


def test_texts_that_hold_a_string():
    random = np.random.default_rng(0)
    texts = random.integers(0, 3, (200, 9))
    for string in ((1,), (1, 2), (0, 1, 2, 0)):
        there = sum(any(text[i : i + len(string)] == [*string] for i in range(len(text))) for text in texts.tolist())
        assert bench.holding(texts, string) == there
