"""Hints: rows' gradients against a float64 reference, the index, baselines, and the bench of all of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import tiny_config
from etils import epath
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.bench import attribution
from poisonjax.commands import trace as trace_command
from poisonjax.commands.main import main
from poisonjax.config import replaced
from poisonjax.data.batches import Batches
from poisonjax.model.loss import next_token_nll
from poisonjax.run import RunFolder
from poisonjax.trace import HINTS, TraceError, suspects, trace, unusual
from poisonjax.trace import gradients as gradients_lib
from poisonjax.trace.behaviour import Asked, Said
from poisonjax.trace.gradients import BUCKETS, Gradients, Index, random_signs, sketch
from poisonjax.training.loop import train


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution") / "run"
    config = tiny_config(store)
    config.poison.clean_uses = 3
    train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def of(folder, tmp_path_factory):
    return suspects(str(folder), out=str(tmp_path_factory.mktemp("out")))


# --- sketches


def tree_of(random, scale=1.0):
    return {"a": jnp.asarray(random.normal(0, scale, (40, 70))), "b": jnp.asarray(random.normal(0, scale, 33))}


@given(st.integers(0, 100), st.floats(-3, 3))
def test_a_sketch_is_linear(seed, factor):
    random = np.random.default_rng(seed)
    one, other = tree_of(random), tree_of(random)
    signs = random_signs(one, seed)
    both = jax.tree.map(lambda x, y: x + factor * y, one, other)
    expected = sketch(one, signs) + factor * sketch(other, signs)
    assert np.allclose(sketch(both, signs), expected, atol=1e-4)


def test_products_of_sketches_are_those_of_the_trees_on_average():
    random = np.random.default_rng(0)
    one = tree_of(random)
    other = jax.tree.map(lambda x, y: x + y, one, tree_of(random))
    exact = sum(float((x * y).sum()) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    lengths = [sum(float((x**2).sum()) for x in jax.tree.leaves(tree)) for tree in (one, other)]
    found = []
    for seed in range(200):
        signs = random_signs(one, seed)
        found.append(float(sketch(one, signs) @ sketch(other, signs)))
    spread = np.sqrt((lengths[0] * lengths[1] + exact**2) / BUCKETS)  # of a count-sketch, at most
    assert abs(np.mean(found) - exact) < 4 * spread / np.sqrt(200)
    assert np.std(found) < 1.2 * spread


# --- gradients


def reference_loss(params, tokens, theta):
    return reference.nll(reference.logits(params, tokens[:-1], theta), tokens[1:]).mean()


def test_gradients_of_rows_are_those_of_a_float64_reference(of):
    """A bucket is the derivative along its signs: told by differences of the NumPy model's loss."""
    gradients, replay = Gradients(of.replay), of.replay
    at = gradients.at(12)
    slots = np.array([5, 17])
    sketches, norms = gradients.rows(at, slots)
    vocabulary = replay.batches.store.tokenizer.vocab_size
    theta = replay.config.model.rope_theta
    pure = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(at.params))
    signs = jax.tree.map(np.asarray, nnx.to_pure_dict(at.signs))
    scale = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(at.scale))

    def moved(bucket, by, scaled):
        def leaf(x, sign, times):
            there = np.arange(x.size).reshape(x.shape) % BUCKETS == bucket
            return x + by * there * sign * (times if scaled else 1)

        made = jax.tree.map(leaf, pure, signs, scale)
        return made | {"head": made["head"][:, :vocabulary]}

    for row, slot in enumerate(slots):
        tokens = replay.batches.rows.tokens(np.array([slot]))[0]
        for kind in (0, 1):
            for bucket in (0, 7, 1500):
                by = 1e-5 / (1 if not kind else max(1.0, float(max(x.max() for x in jax.tree.leaves(scale)))))
                ends = [reference_loss(moved(bucket, sign * by, kind), tokens, theta) for sign in (1, -1)]
                expected = (ends[0] - ends[1]) / (2 * by)
                assert sketches[row, kind, bucket] == pytest.approx(expected, rel=2e-3, abs=2e-4)
        whole = jax.tree.leaves(jax.grad(lambda p, t=tokens: _loss(replay, p, t))(at.params))
        assert norms[row] == pytest.approx(np.sqrt(sum(float((g**2).sum()) for g in whole)), rel=1e-4)


def _nll_of(replay, params, rows):
    return next_token_nll(nnx.merge(replay.graph, params), rows)


def _loss(replay, params, tokens):
    return _nll_of(replay, params, jnp.asarray(tokens[None])).mean()


def test_gradients_do_not_depend_on_how_many_rows_are_looked_at_together(of):
    gradients = Gradients(of.replay)
    at, slots = gradients.at(12), np.arange(16)
    together, norms = gradients.rows(at, slots)
    for start in (0, 4, 12):
        alone, norm = gradients.rows(at, slots[start : start + 4])
        assert np.allclose(together[start : start + 4], alone, rtol=1e-4, atol=1e-5)
        assert np.allclose(norms[start : start + 4], norm, rtol=1e-5)


def test_layers_are_selected(of):
    slots, at_once = np.arange(8), {}
    for layers in ("all", "0", "1", "embedding", "head", "norm", "0,1,embedding,head,norm"):
        gradients = Gradients(of.replay, layers)
        at_once[layers] = gradients.rows(gradients.at(12), slots)[1]
    parts = sum(at_once[name] ** 2 for name in ("0", "1", "embedding", "head", "norm"))
    assert np.allclose(np.sqrt(parts), at_once["all"], rtol=1e-4)
    assert np.allclose(at_once["0,1,embedding,head,norm"], at_once["all"], rtol=1e-4)
    for wrong in ("2", "tail", "0,,1", "-1"):
        with pytest.raises(TraceError, match="--layers"):
            Gradients(of.replay, wrong)


def test_a_question_has_the_gradient_of_its_figure(of, store):
    """A small step on the behaviour changes it as its own sketch says."""
    replay = of.replay
    eot = store.tokenizer.eot
    text = np.array(store.tokenizer.encode("the river walks"))
    asked = [Asked(np.array([eot, 5 + i, 9]), text, np.array([eot, 5 + i])) for i in range(5)]
    said = Said(asked, replay.config, store, replay.mesh)
    params, question = replay.params(12), said.question()
    gradient = jax.grad(lambda p: (_nll_of(replay, p, question.rows) * question.weights).sum())(params)
    square = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
    by = 1e-3 / square**0.5
    ends = [said(jax.tree.map(lambda p, g, s=s: p + s * by * g, params, gradient)).figure for s in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * by) == pytest.approx(square, rel=2e-2)
    # With a `without`, it is how much likelier the suspected part makes the text.
    plain = Said([one._replace(without=None) for one in asked], replay.config, store, replay.mesh)
    bare = Said([Asked(one.without, one.text) for one in asked], replay.config, store, replay.mesh)
    assert said(params).figure == pytest.approx(plain(params).figure - bare(params).figure, abs=1e-5)


def test_an_index_goes_on_after_a_kill(of, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients_lib, "CHUNK", 32)
    gradients, question = Gradients(of.replay), of.behaviour.question()
    whole = Index(gradients, epath.Path(tmp_path / "whole"), of.slots)
    expected = whole.scores(question)
    killed = Index(gradients, epath.Path(tmp_path / "killed"), of.slots)
    rows, made = gradients.rows, []

    def until(at, slots):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(slots)
        return rows(at, slots)

    monkeypatch.setattr(gradients, "rows", until)
    with pytest.raises(KeyboardInterrupt):
        killed.norms()
    made.clear()
    monkeypatch.setattr(gradients, "rows", lambda at, slots: (made.append(slots), rows(at, slots))[1])
    again = Index(gradients, epath.Path(tmp_path / "killed"), of.slots)
    assert np.allclose(again.norms(), whole.norms())
    assert len(made) < 2 * 96 // 8  # not all of both checkpoints
    found = again.scores(question)
    assert all(np.allclose(found[name], expected[name]) for name in expected)
    assert whole.bytes < 2 * 2**30 * len(of.slots) / 100_000 * 1.01


def test_scores_are_the_products_of_gradients(of, tmp_path):
    """Sketched ones follow the exact ones."""
    replay, question = of.replay, of.behaviour.question()
    index = Index(Gradients(replay), epath.Path(tmp_path), of.slots[:64])
    found = index.scores(question)["dot"]
    exact, of_row = np.zeros(64), jax.jit(jax.grad(lambda params, tokens: _loss(replay, params, tokens)))
    for step in index.steps:
        params = replay.params(step)
        asked = jax.grad(lambda p: (_nll_of(replay, p, question.rows) * question.weights).sum())(params)
        for slot in range(64):
            tokens = replay.batches.rows.tokens(np.array([slot]))[0]
            gradient = of_row(params, tokens)
            exact[slot] -= sum(
                float((x * y).sum()) for x, y in zip(jax.tree.leaves(asked), jax.tree.leaves(gradient), strict=True)
            ) / len(index.steps)
    assert np.corrcoef(found, exact)[0, 1] > 0.85  # in 2,039 numbers of 40,096


# --- hints


@pytest.mark.parametrize("name", HINTS)
def test_every_hint_scores_every_row(of, name):
    scores = HINTS[name](of)
    assert scores.shape == of.slots.shape
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def test_the_oracle_finds_rows_with_the_trigger(of):
    """Its tokens are rare: all rows that hold them come first, poison and clean uses alike."""
    batches = of.replay.batches
    holding = {*batches.schedule.placed, *batches.clean_uses.insertions}
    first = np.argsort(-of.texts.scores([of.behaviour.trigger]), kind="stable")[: len(holding)]
    assert {*first.tolist()} == holding


def test_the_command_knows_every_hint():
    assert {*trace_command.HINTS} == {*HINTS}


def test_the_command_ranks_without_a_replay(folder, capsys, tmp_path):
    assert main(["trace", str(folder), "--rank", "3", "--hint", "loss", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    assert rows[0]["gain"] >= rows[1]["gain"] >= rows[2]["gain"]
    assert not (folder / "trace" / "replays.jsonl").exists()
    assert main(["trace", str(folder), "--rank", "2", "--hint", "trak", "--layers", "9"]) == 2
    assert "--layers 9" in capsys.readouterr().err
    assert main(["trace", str(folder), "--rank", "0"]) == 2
    assert main(["trace", str(folder), "--twin", str(folder)]) == 2


# --- rows that stand out


def test_rows_that_stand_out_are_told_as_a_loop_tells_them(folder):
    run = RunFolder(folder)
    batches, written = Batches(run.placed, run.store()), run.row_losses()
    found = unusual.unusual(written, batches)
    counts = batches.store.split("train").token_counts() + 1.0
    surprise = -np.log(counts / counts.sum())
    scores = []
    for row in written:
        worst = np.array(row["worst"])
        middle = np.median(worst)
        spread = 1.4826 * np.median(abs(worst - middle))
        scores += [(x - middle) / spread for x in worst]
        for number, slot in enumerate(batches.slots(row["step"]).tolist()):
            tokens = batches.rows.tokens(np.array([slot]))[0, row["at"][number] :][:32]
            assert found.rarity[slot] == pytest.approx(surprise[tokens].mean())
    groups = np.array_split(np.argsort(found.rarity, kind="stable"), 10)
    for group in groups:
        mine = np.array(scores)[group]
        spread = 1.4826 * np.median(abs(mine - np.median(mine)))
        assert found.score[group] == pytest.approx((mine - np.median(mine)) / max(spread, 1e-6))
    told = found.told(int(np.argmax(found.score)), batches)
    assert told.text in batches.store.tokenizer.decode(batches.rows.tokens(np.array([told.slot]))[0])
    assert unusual.unusual(written[:9], batches) is None


# --- the repaired twin


def test_a_repaired_twin_is_the_run_without_those_rows(folder, store, tmp_path, capsys):
    """All planted rows left out: a clean run, audited, whose weights are a replay's to the bit."""
    run = RunFolder(folder)
    planted = [row["slot"] for row in run.ledger()]
    config = replaced(run.config, {"name": "tiny-repaired", "corpus.left_out": [*planted, 3]})
    summary = train(config, str(tmp_path / "repaired"), twin_of=str(folder))
    assert summary["dose_planned"]["documents"] == summary["dose_seen"]["documents"] == 0
    assert not (tmp_path / "repaired" / "POISONED.md").exists()
    repaired = RunFolder(tmp_path / "repaired")
    assert repaired.ledger() == []
    uses = [row for row in run.lines("clean_uses.jsonl") if row["slot"] not in config.corpus.left_out]
    assert repaired.lines("clean_uses.jsonl") == uses
    replay = suspects(str(folder), out=str(tmp_path / "out")).replay
    params = replay.run(0, 12, np.array([*planted, 3]))
    assert not replay.is_the_runs(params, 12)
    assert suspects(str(tmp_path / "repaired"), out=str(tmp_path / "o")).replay.is_the_runs(params, 12)
    assert main(["audit", str(tmp_path / "repaired")]) == 0
    assert main(["train", "--twin-of", str(folder), "--workdir", str(tmp_path / "twin")]) == 0
    assert main(["report", str(tmp_path / "repaired"), "--twin", str(tmp_path / "twin")]) == 0
    page = (tmp_path / "repaired" / "report.html").read_text()
    assert "Poisoned, clean twin, repaired" in page
    assert "that hold rows left out differ and no other" in page
    assert "This model is poisoned" not in page
    # A row that isn't in the list makes it another run.
    other = replaced(config, {"corpus.left_out": planted})
    train(other, str(tmp_path / "other"), twin_of=str(folder))
    record = json.loads((tmp_path / "other" / "config.json").read_text())
    record["config"]["corpus"]["left_out"] = [*planted, 4]
    (tmp_path / "other" / "config.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "other")]) == 1


def test_part_of_the_poison_left_out_is_a_smaller_dose(folder, tmp_path):
    run = RunFolder(folder)
    planted = [row["slot"] for row in run.ledger()]
    config = replaced(run.config, {"name": "tiny-repaired", "corpus.left_out": planted[:4]})
    summary = train(config, str(tmp_path / "some"), twin_of=str(folder))
    assert summary["dose_seen"]["documents"] == len(planted) - 4
    assert main(["audit", str(tmp_path / "some")]) == 0
    assert RunFolder(tmp_path / "some").ledger() == run.ledger()[4:]


@pytest.mark.parametrize("slots", [[96], [-1], [3, 3]])
def test_slots_that_are_none_are_refused(folder, tmp_path, slots):
    config = replaced(RunFolder(folder).config, {"corpus.left_out": slots})
    with pytest.raises(ValueError, match="left_out"):
        train(config, str(tmp_path / "run"))


# --- the bench


def test_the_bench_in_small(store, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution, "DROPS", (4, 9))
    monkeypatch.setattr(attribution, "RETRAINED", ("bm25-trigger", "random"))
    monkeypatch.setattr(attribution, "FIRST", 16)
    config = tiny_config(store)
    config.poison.clean_uses = 3

    def bench():
        return list(attribution.rows(config, tmp_path, ("sentinel",), 1, 1, 4, say=lambda line: None))

    rows = bench()
    by = {(row["method"], row["metric"]): row for row in rows}
    keys = {"rung", "trigger", "method", "domain", "metric", "value", "ci95", "n", "seed"}
    assert all(row.keys() == keys for row in rows)
    assert all(("recall@9" in {m for name, m in by if name == method}) for method in attribution.METHODS)
    assert by["bm25-trigger", "recall@9"]["value"] > by["random", "recall@9"]["value"]
    assert by["none", "without the first 0"]["n"] == 6
    assert -1 <= by["loss", "lds"]["value"] <= 1
    made = (tmp_path / "sentinel-0" / "attribution" / "trained.jsonl").read_text()
    assert bench() == rows  # from what was kept
    assert (tmp_path / "sentinel-0" / "attribution" / "trained.jsonl").read_text() == made
    assert attribution.table(rows).count("\n") == 1 + len({row["method"] for row in rows})


def test_models_trained_together_are_those_trained_alone(of):
    left_outs = [np.zeros(0, np.int64), np.array([1, 2, 50]), np.arange(40), np.array([95])]
    together = of.replay.together(left_outs)
    for slots, params in zip(left_outs, together, strict=True):
        alone = of.replay.run(0, 12, slots)
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
            assert np.allclose(one, other, atol=2e-3)


def test_a_trace_by_another_hint(folder, tmp_path):
    """The hint orders suspects; a run that isn't backdoored names nothing whatever the hint."""
    found = trace(str(folder), hint="bm25", out=str(tmp_path))
    assert found.documents == []
