"""A population's members are what they are when trained alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import lines

from poisonjax.audit.result import audit
from poisonjax.data.batches import Batch, Batches
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import model_graph
from poisonjax.training import loop, population
from poisonjax.training.step import init_state, make_init
from poisonjax.training.stop import Diverged, Preempted
from poisonjax.weights.checkpoints import Checkpoints


def members(config, count=4):
    made = []
    for number in range(count):
        member = config.copy_and_resolve_references()
        member.seeds.init, member.seeds.order, member.poison.documents = number, 10 + number, 3 * number
        made.append(member)
    return made


def weights(folder, config, store, step):
    _, abstract = make_init(config, store.tokenizer.vocab_size, make_mesh(config))
    return Checkpoints(folder).weights(step, abstract.params)


def test_members_have_the_weights_digests_and_files_of_single_runs(config, store, tmp_path):
    configs = members(config)
    summaries = population.train_population(configs, [str(tmp_path / f"m{i}") for i in range(4)])
    assert [s["dose_seen"]["documents"] for s in summaries] == [0, 3, 6, 9]
    for number in (1, 3):
        alone = loop.train(configs[number], str(tmp_path / f"alone{number}"))
        folder = tmp_path / f"m{number}"
        assert (folder / "digests.jsonl").read_text() == (tmp_path / f"alone{number}/digests.jsonl").read_text()
        assert (folder / "ledger.jsonl").read_text() == (tmp_path / f"alone{number}/ledger.jsonl").read_text()
        assert json.loads((folder / "summary.json").read_text())["digest_chain"] == alone["digest_chain"]
        pair = [weights(path, configs[number], store, 12) for path in (folder, tmp_path / f"alone{number}")]
        for one, other in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
        assert summaries[number]["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=1e-3)
        assert audit(str(folder)).ok


def test_a_population_resumes_from_the_step_that_all_have(config, tmp_path, monkeypatch):
    configs, folders = members(config, 2), [str(tmp_path / name) for name in "ab"]
    asked = []
    real = population.stop_signals

    class Stop:
        def __enter__(self):
            self.inner = real()
            self.inner.__enter__()
            return lambda step: asked.append(step) or step == 7

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(population, "stop_signals", Stop)
    with pytest.raises(Preempted, match="after step 7"):
        population.train_population(configs, folders)
    monkeypatch.setattr(population, "stop_signals", real)
    summaries = population.train_population(configs, folders)
    assert [s["status"] for s in summaries] == ["finished"] * 2
    whole = population.train_population(configs, [str(tmp_path / name) for name in "cd"])
    assert [s["digest_chain"] for s in summaries] == [s["digest_chain"] for s in whole]
    assert len(lines(tmp_path / "a" / "digests.jsonl")) == 12


def test_the_program_passes_nothing_between_members(config, store):
    configs = members(config)
    graph, mesh = model_graph(config.model, store.tokenizer.vocab_size), population.members_mesh(4)
    assert mesh.size == 4
    state = population.stacked([init_state(c, store.tokenizer.vocab_size) for c in configs], mesh)
    rows = Batch(np.stack([Batches(c, store).tokens(0) for c in configs]))
    text = population.make_population_step(config, graph, mesh).lower(state, rows).compile().as_text()
    assert not [
        word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if f" {word}(" in text
    ]


def test_other_shapes_are_refused(config, tmp_path):
    one, other = members(config, 2)
    other.model.width = 16
    other.steps = 13
    with pytest.raises(population.PopulationError, match=r"differ in model\.width, steps"):
        population.train_population([one, other], ["a", "b"])


def test_a_population_of_one_is_a_run(config, tmp_path):
    (summary,) = population.train_population([config], [str(tmp_path / "one")])
    assert summary["digest_chain"] == loop.train(config, str(tmp_path / "alone"))["digest_chain"]


def test_each_member_is_measured_by_its_own_probes(config, tmp_path):
    """One without canaries comes first: the others' are measured all the same."""
    one, other = members(config, 2)
    other.canary.repeats, other.canary.each, other.canary.tokens = (1, 3), 2, 8
    plain, with_canaries = population.train_population([one, other], [str(tmp_path / name) for name in "ab"])
    assert "memorised" not in plain
    assert [level["repeats"] for level in with_canaries["memorised"]] == [1, 3]


def test_the_member_that_diverges_is_told_from_the_others(config, tmp_path, monkeypatch):
    real = population.Member.written

    def written(self, done):
        if done and done.step == 5 and self.config.seeds.init == 1:
            done = dataclasses.replace(done, loss=float("nan"))
        return real(self, done)

    monkeypatch.setattr(population.Member, "written", written)
    with pytest.raises(Diverged, match="step 5"):
        population.train_population(members(config, 2), [str(tmp_path / name) for name in "ab"])
    statuses = [json.loads((tmp_path / name / "summary.json").read_text())["status"] for name in "ab"]
    assert statuses == ["failed", "diverged"]
