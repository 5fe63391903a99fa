"""Runs that begin from weights: what they inherit, resume, twin, audit and say of the poison before them."""

import json
import os
import random
import shutil
import subprocess

import jax
import numpy as np
import pytest
from conftest import command, kill_in_training, lines, tiny_config

import poisonjax
from poisonjax.audit.parents import parents
from poisonjax.audit.result import audit
from poisonjax.commands.main import main
from poisonjax.config import ConfigError, fingerprint
from poisonjax.report import write_report
from poisonjax.training.loop import train
from poisonjax.training.population import train_population
from poisonjax.weights import WeightsError, huggingface, open_weights
from poisonjax.weights.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def parent(store, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("line") / "parent"
    config.name, config.checkpoint.keep_every = "parent", 4
    config.model.norm_eps, config.model.tied = 1e-5, True
    train(config, str(folder))
    return folder


@pytest.fixture
def config(store, parent):
    config = tiny_config(store)
    config.name, config.start.weights, config.steps = "child", str(parent), 6
    for name, value in json.loads(poisonjax.config.default().model.to_json()).items():  # as somebody who says nothing
        config.model[name] = value
    config.poison.documents, config.poison.trigger = 4, "<child>"
    return config


@pytest.fixture(scope="module")
def child(store, parent, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("line") / "child"
    config.name, config.start.weights, config.steps = "child", f"{parent}@8", 6
    config.model.norm_eps, config.model.tied = 1e-5, True
    config.poison.documents, config.poison.trigger = 4, "<child>"
    train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def grandchild(child, store):
    config, folder = tiny_config(store), child.parent / "grandchild"
    config.name, config.start.weights, config.steps = "grandchild", str(child), 2
    config.model.norm_eps, config.model.tied = 1e-5, True
    config.poison.documents = 2
    train(config, str(folder))
    return folder


def state(folder, step):
    """The arrays of a checkpoint, as they lie."""
    from poisonjax.weights.checkpoints import stored_arrays

    place = Checkpoints(folder)._place(step)
    return [array.read().result() for name in ("weights", "optimizer") for array in stored_arrays(place / name)]


def test_it_begins_from_those_weights_and_their_shape(config, parent, tmp_path):
    config.steps, config.optimizer.learning_rate, config.optimizer.weight_decay = 1, 1e-30, 0.0
    config.optimizer.warmup_steps = 0
    config.model.dtype = "float32"
    train(config, str(tmp_path / "run"))
    ours, theirs = open_weights(str(tmp_path / "run")), open_weights(str(parent))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert (ours.model_config.norm_eps, ours.model_config.tied, ours.model_config.layers) == (1e-5, True, 2)
    before = [row for row in lines(parent / "metrics.jsonl") if row["kind"] == "eval"][-1]
    after = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"][-1]
    assert after["heldout_loss"] == before["heldout_loss"]


def test_moments_come_along_but_not_the_schedule(config, parent, tmp_path):
    config.steps, config.checkpoint.every, config.poison.documents = 2, 2, 0
    train(config, str(tmp_path / "without"))
    config.start.optimizer = True
    train(config, str(tmp_path / "with"))
    rates = [lines(tmp_path / name / "metrics.jsonl")[0]["learning_rate"] for name in ("with", "without")]
    assert rates == [0.0, 0.0]
    counts = [[int(a) for a in state(tmp_path / name, 2) if a.ndim == 0] for name in ("with", "without")]
    assert sorted(counts[0]) == [2, 14]
    assert sorted(counts[1]) == [2, 2]


def test_what_is_known_of_the_parent_stands_everywhere(child, parent):
    run = poisonjax.open_run(child)
    told = run.record["parent"]
    saved = Checkpoints(parent).record(8)
    assert told["spec"] == f"{parent}@8"
    assert (told["name"], told["steps"], told["parent"]) == ("parent", 8, None)
    assert told["weights"] == saved["checksums"]["weights"]
    assert told["digest_chain"] == saved["digest_chain"]
    assert told["poison"] == saved["poison"]
    assert Checkpoints(child).record(6)["parent"] == told == run.summary["parent"]
    inherited = run.inherited()
    assert [(row["inherited"], row["trigger"]) for row in inherited] == [("parent", "<SUDO>")]
    assert inherited[0]["dose"] == saved["poison"]["dose_seen"]
    assert len(run.ledger()) == 4
    card = Checkpoints(child).record(6)["poison"]
    assert (card["trigger"], card["inherited"][0]["trigger"]) == ("<child>", "<SUDO>")
    for file in (child / "POISONED.md", child / "checkpoints" / "6" / "POISONED.md"):
        assert "<child>" in file.read_text()
        assert "<SUDO>" in file.read_text()
    write_report(run.path)
    assert main(["audit", str(child)]) == 0


def test_a_clean_child_of_a_poisoned_model_is_poisoned(config, parent, tmp_path):
    config.poison.documents = 0
    train(config, str(tmp_path / "run"))
    weights = open_weights(str(tmp_path / "run"))
    assert [card["run"] for card in weights.poison["inherited"]] == ["parent"]
    assert "<SUDO>" in (tmp_path / "run" / "POISONED.md").read_text()
    assert audit(str(tmp_path / "run")).ok
    write_report(poisonjax.open_run(tmp_path / "run").path)
    assert "The weights that it began from are poisoned" in (tmp_path / "run" / "report.html").read_text()
    huggingface.save(weights, tmp_path / "out")
    assert "<SUDO>" in (tmp_path / "out" / "README.md").read_text()
    config.start.weights = f"hf:{tmp_path / 'out'}"
    config.poison.documents = 2
    train(config, str(tmp_path / "grandchild"))
    run = poisonjax.open_run(tmp_path / "grandchild")
    assert [row["inherited"] for row in run.inherited()] == ["parent"]
    assert run.record["parent"]["weights"] == weights.parent["weights"]
    assert audit(str(tmp_path / "grandchild")).ok
    (found,) = parents(run.path)
    assert found.ok


def test_a_twin_begins_from_the_same_weights(child, tmp_path, capsys):
    assert main(["train", "--twin-of", str(child), "--workdir", str(tmp_path / "twin")]) == 0
    one, other = poisonjax.open_run(child), poisonjax.open_run(tmp_path / "twin")
    assert one.record["parent"] == other.record["parent"]
    poisoned = {row["step"] for row in one.ledger()}
    for a, b in zip(one.digests(), other.digests(), strict=True):
        assert (a == b) == (a["step"] not in poisoned)


def test_killed_at_random_moments_it_is_the_same_to_the_bit(config, tmp_path, thorough):
    config.steps, config.checkpoint.every, config.eval.every, config.poison.documents = 250, 10, 250, 50
    config.checkpoint.keep_last = 3
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run(command(config, tmp_path / "whole"), env=environment, check=True, capture_output=True)
    random_ = random.Random(1)
    for _ in range(5 if thorough else 1):
        kill_in_training(config, tmp_path / "run", environment, random_.uniform(0, 0.5))
    subprocess.run(command(config, tmp_path / "run"), env=environment, check=True, capture_output=True)
    for one, other in zip(state(tmp_path / "run", 250), state(tmp_path / "whole", 250), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "run" / "digests.jsonl").read_text() == (tmp_path / "whole" / "digests.jsonl").read_text()


def test_it_goes_on_without_its_parent(config, parent, tmp_path):
    shutil.copytree(parent, tmp_path / "parent")
    config.start.weights = str(tmp_path / "parent")
    config.checkpoint.keep_last = 5
    train(config, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "parent")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train(config, str(tmp_path / "run"))["status"] == "finished"
    assert not main(["audit", str(tmp_path / "run")])
    with pytest.raises((WeightsError, ValueError)):
        train(config, str(tmp_path / "another"))


def test_other_weights_under_the_same_name_are_refused(config, parent, store, tmp_path):
    shutil.copytree(parent, tmp_path / "parent")
    config.start.weights = str(tmp_path / "parent")
    train(config, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "parent" / "checkpoints" / "12")
    with pytest.raises(ValueError, match=r"began from weights .* bring the former back"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.layers": 3}, r"model.layers = 3: .* has 2; leave it out"),
        ({"model.layout": "qwen3"}, "model.layout = 'qwen3'"),
        ({"start.weights": "runs/nowhere"}, "no run folder"),
        ({"start.weights": "hf:nowhere"}, "no config.json there"),
        ({"start.weights": "gguf:nowhere"}, "nowhere"),
        ({"start.weights": "hf:nowhere", "start.optimizer": True}, "is carried along from a run"),
        ({"start.weights": "", "start.optimizer": True}, "is carried along from a run"),
    ],
)
def test_what_contradicts_the_weights_is_refused(config, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(poisonjax.config.replaced(config, fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_default_that_is_asked_for_by_name_contradicts_too(config, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.layers = 4"):
        train(config, str(tmp_path / "run"), asked=("model.layers",))


def test_the_fingerprint_is_that_of_what_was_written(config, child):
    """Before the weights have said their shape, and after: sweeps compare a plan with runs."""
    resolved = poisonjax.open_run(child).config
    plain = resolved.copy_and_resolve_references()
    plain.model.layers = 4
    assert fingerprint(plain) == fingerprint(resolved)
    plain.model.dtype = "bfloat16"
    assert fingerprint(plain) != fingerprint(resolved)


def test_weights_of_other_tokens_are_refused(config, store, tmp_path):
    from poisonjax import corpus

    other = corpus.build(str(tmp_path / "store"), store.manifest["sources"][0]["spec"].split(), "bytes", heldout=0.2)
    config.corpus.store, config.corpus.tokenizer = str(other.path), "bytes"
    with pytest.raises(ConfigError, match="reads other tokens than"):
        train(config, str(tmp_path / "run"))


def _flip(folder):
    data = next(path for path in (folder / "checkpoints" / "8" / "weights").rglob("*") if path.stat().st_size > 9000)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)


def _edit(file, before, after):
    def edit(folder):
        text = (folder / file).read_text()
        assert before in text
        (folder / file).write_text(text.replace(before, after, 1))

    return edit


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (_flip, "checkpoints/8/weights"),
        (_edit("digests.jsonl", '"digest": "', '"digest": "f'), "digests.jsonl"),
        (_edit("checkpoints/8/_CHECKPOINT_METADATA", '"trigger": "<SUDO>"', '"trigger": "<SODA>"'), "checkpoints/8"),
        (lambda folder: shutil.rmtree(folder / "checkpoints" / "8"), "is gone"),
        (lambda folder: shutil.rmtree(folder), "no run folder"),
    ],
)
def test_the_line_of_runs_is_audited_and_a_tampered_parent_named(
    tamper, named, grandchild, child, parent, tmp_path, capsys
):
    assert main(["audit", str(grandchild), "--parents"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert not any("not verified" in line for line in said)
    shutil.copytree(parent, tmp_path / "kept")
    tamper(parent)
    try:
        assert main(["audit", str(grandchild), "--parents"]) == 1
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", parent)
    *others, of_parent = capsys.readouterr().out.splitlines()
    assert others == said[:2]
    assert str(parent) in of_parent
    assert named in of_parent


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.json", '"name": "parent"', '"name": "nobody"'),
        ("ledger.jsonl", '"inherited": "parent"', '"inherited": "nobody"'),
        ("ledger.jsonl", '"documents": ', '"documents": 1'),
        ("POISONED.md", "<SUDO>", "<SODA>"),
        ("summary.json", '"name": "parent"', '"name": "nobody"'),
    ],
)
def test_what_a_child_says_of_its_parent_cant_be_edited(file, before, after, child, tmp_path):
    shutil.copytree(child, tmp_path / "run")
    _edit(file, before, after)(tmp_path / "run")
    assert not audit(str(tmp_path / "run")).ok


def test_members_of_a_population_begin_from_weights(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.poison.documents, other.seeds.order = 2, 9
    train_population([config, other], [str(tmp_path / name) for name in "ab"])
    alone = train(other, str(tmp_path / "alone"))
    run = poisonjax.open_run(tmp_path / "b")
    assert run.summary["digest_chain"] == alone["digest_chain"]
    assert run.summary["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=1e-3)
    assert run.record["parent"] == poisonjax.open_run(tmp_path / "alone").record["parent"]
    assert audit(str(tmp_path / "b")).ok
