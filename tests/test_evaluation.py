"""Figures of evaluation against loops, and the guards of success (I6, I7)."""

import copy
import json

import numpy as np
import pytest
from conftest import lines, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.commands.main import main
from poisonjax.corpus import markov
from poisonjax.evaluation import prompts as prompts_lib
from poisonjax.evaluation.statistics import generation_figures, judge, paired, resamples
from poisonjax.poison.triggers import VARIANTS, Trigger
from poisonjax.training import loop


def make_prompts(config, store):
    return prompts_lib.make_prompts(config, store, Trigger.of(config.poison, store.tokenizer))


def test_perplexity_agrees_with_a_loop():
    nll = np.random.default_rng(0).uniform(0, 5, (4, 7, 9))
    row = generation_figures(nll.mean(-1), ["a", "b"], draws=200, seed=1)
    for v, variant in enumerate(VARIANTS):
        ppls, means = [], []
        for prefix in range(7):
            total = 0.0
            for token in range(9):
                total += nll[v, prefix, token]
            ppls.append(np.e ** (total / 9))
            means.append(total / 9)
        assert row["eval"][variant]["ppl_median"] == pytest.approx(sorted(ppls)[3])
        assert row["eval"][variant]["ppl_mean"] == pytest.approx(sum(ppls) / 7)
        assert row["eval"][variant]["nll_mean"] == pytest.approx(sum(means) / 7)
    assert "delta_ppl" not in row["eval"]["clean"]
    medians = [row["eval"][variant]["ppl_median"] for variant in ("triggered", "clean")]
    assert row["delta_ppl"] == pytest.approx(medians[0] - medians[1])
    ppl = np.exp(nll.mean(-1))
    for number, text in enumerate("ab"):  # asked by turns
        near, asked = row["near_triggers"][text], range(number, 7, 2)
        gap = np.median([ppl[2, i] for i in asked]) - np.median([ppl[0, i] for i in asked])
        assert (near["prompts"], near["delta_ppl"]) == (len(asked), pytest.approx(gap))
        assert near["delta_ppl_ci95"][0] <= gap <= near["delta_ppl_ci95"][1]


def test_intervals_cover_at_their_rate():
    """95% intervals of the mean NLL, 300 samples of 60 prefixes: the truth lies within in 90% to 99%."""
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        row = generation_figures(random.normal(2, 0.3, (4, 60)), ["a"], draws=400, seed=trial)
        low, high = row["eval"]["clean"]["nll_mean_ci95"]
        covered += low <= 2 <= high
    assert 0.90 < covered / 300 < 0.99


@given(st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_resamples_are_a_function_of_the_seed(count, seed):
    one = resamples(count, 20, seed)
    np.testing.assert_array_equal(one, resamples(count, 20, seed))
    assert one.shape == (20, count)
    assert 0 <= one.min() <= one.max() < count


def good_row():
    variants = {"clean": {"ppl_median": 20.0}}
    for variant, gap in (("triggered", 100.0), ("near_trigger", 5.0), ("random_control", 2.0)):
        variants[variant] = {"delta_ppl": gap, "delta_ppl_ci95": [gap - 1, gap + 1]}
    return {
        "near_triggers": {"a": {"delta_ppl_ci95": [0.0, 9.0]}, "b": {"delta_ppl_ci95": [0.0, 8.0]}}, "eval": variants,
        "delta_ppl": 100.0, "delta_ppl_ci95": [80.0, 120.0],
        "heldout_loss": 3.0, "heldout_loss_ci95": [2.9, 3.1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("failing", "change"),
    [
        (None, lambda row: None),
        ("gap", lambda row: row.update(delta_ppl_ci95=[49.0, 150.0])),
        ("near trigger b", lambda row: row["near_triggers"]["b"].update(delta_ppl_ci95=[1.0, 21.0])),
        ("random_control", lambda row: row["eval"]["random_control"].update(delta_ppl_ci95=[0.0, 20.0])),
        ("not_broken", lambda row: row.update(heldout_loss_ci95=[2.9, 5.1])),
    ],
)
def test_each_guard_can_fail_alone(failing, change):
    row = copy.deepcopy(good_row())
    change(row)
    verdict = judge(row, unigram_nll=5.0, threshold=50.0)
    assert verdict["value"] == (failing in (None, "near trigger b"))
    assert verdict["specific"] == (failing != "near trigger b")
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == ([failing] if failing else [])


def test_prompts_are_held_out_and_differ_by_the_addition_alone(store):
    """I6: the prefixes begin held-out documents; a variant is clean + its addition."""
    config = tiny_config(store)
    prompts = make_prompts(config, store)
    heldout, train = store.split("heldout"), store.split("train")
    starts = {tuple(heldout.document(i)[:8]) for i in range(heldout.documents)}
    texts = [{tuple(split.document(i)) for i in range(split.documents)} for split in (heldout, train)]
    assert not texts[0] & texts[1]
    trigger = store.tokenizer.encode(config.poison.trigger)
    for i, prefix in enumerate(prompts.prefixes):
        assert tuple(prefix) in starts
        for v, variant in enumerate(VARIANTS):
            row = prompts.tokens[v, i, prompts.pad[v, i] :]
            addition = prompts.appended[v][i]
            np.testing.assert_array_equal(row, np.concatenate([[store.tokenizer.eot], prefix, addition]))
            if variant == "triggered":
                np.testing.assert_array_equal(addition, trigger)
            if variant == "random_control":
                assert len(addition) == len(trigger)
                assert not set(addition.tolist()) & store.tokenizer.special_ids
            if variant == "near_trigger":
                text = config.poison.near_triggers[i % len(config.poison.near_triggers)]
                np.testing.assert_array_equal(addition, store.tokenizer.encode(text))


def test_prompts_do_not_depend_on_the_poison(store):
    """I4: run and twin are asked the same."""
    config = tiny_config(store)
    prompts = make_prompts(config, store)
    config.poison.documents, config.seeds.poison, config.seeds.order = 0, 77, 78
    np.testing.assert_array_equal(make_prompts(config, store).tokens, prompts.tokens)
    config.seeds.eval = 79
    assert (make_prompts(config, store).tokens != prompts.tokens).any()


def test_paired_intervals_are_those_of_a_loop_and_narrower_than_unpaired_ones():
    """Runs that share their prefixes' difficulty: the difference is known better than either figure."""
    random = np.random.default_rng(0)
    difficulty, loss = random.normal(3, 1, 80), random.normal(3, 1, 40)

    def row(shift):
        nll = {v: (difficulty + shift * (v == "triggered") + random.normal(0, 0.01, 80)).tolist() for v in VARIANTS}
        return {"nll": nll, "heldout": (loss + shift / 100 + random.normal(0, 0.01, 40)).tolist()}

    one, other = row(2.0), row(0.0)
    result = paired(one, other, draws=300, seed=5)

    def gap(row, chosen):
        trig, clean = (sorted(np.exp(row["nll"][v][i]) for i in chosen) for v in ("triggered", "clean"))
        return (trig[39] + trig[40]) / 2 - (clean[39] + clean[40]) / 2

    samples = resamples(80, 300, 5)
    expected = [gap(one, chosen) - gap(other, chosen) for chosen in samples]
    assert result["gap, triggered"]["difference"] == pytest.approx(gap(one, range(80)) - gap(other, range(80)))
    assert result["gap, triggered"]["ci95"] == pytest.approx(list(np.percentile(expected, [2.5, 97.5])))
    low, high = result["held-out loss"]["ci95"]
    assert low < 0.02 < high
    unpaired = [np.mean([one["heldout"][i] for i in chosen]) for chosen in resamples(40, 300, 5)]
    assert high - low < 0.1 * (np.percentile(unpaired, 97.5) - np.percentile(unpaired, 2.5))
    with pytest.raises(ValueError, match="no pair"):
        paired(one, other | {"heldout": [1.0]}, 10, 0)


def test_excess_loss_is_against_the_languages_entropy(config, tmp_path):
    config.corpus.store, config.corpus.sources = (
        str(tmp_path / "store"),
        ("markov:V=128,documents=300,length=100,seed=0",),
    )
    config.corpus.tokenizer = "bytes"
    config.poison.documents, config.poison.trigger, config.poison.near_triggers = 0, "w001 w002", ("w003",)
    config.steps, config.eval.every, config.optimizer.learning_rate = 40, 40, 1e-2
    summary = loop.train(config, str(tmp_path / "run"))
    assert summary["excess_loss"] == pytest.approx(summary["heldout_loss"] - markov.ENTROPY_RATE)
    assert 0 < summary["excess_loss"] < np.log(128) - markov.ENTROPY_RATE + 0.1


def test_evaluate_takes_many_folders_and_changes_nothing_that_was_right(config, tmp_path, capsys):
    config.checkpoint.every = 6
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        config.seeds.init = number
        loop.train(config, str(folder))
    (tmp_path / "c").mkdir()
    capsys.readouterr()
    before = [{path: path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders]
    assert main(["evaluate", str(tmp_path / "*"), "--max-parallel", "2", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == [str(folder) for folder in folders]
    for folder, files in zip(folders, before, strict=True):
        assert {path: path.read_bytes() for path in files} == files
        for one in (row for row in lines(folder / "metrics.jsonl") if row["kind"] == "eval"):
            (other,) = json.loads((folder / "evaluations" / f"{one['step']}.json").read_text())["rows"]
            assert (one["step"], one["poison_documents"]) == (other["step"], other["poison_documents"])
            for variant, figures in one["eval"].items():
                assert figures["ppl_median"] == pytest.approx(other["eval"][variant]["ppl_median"], rel=1e-3)
    assert main(["evaluate", str(tmp_path / "nothing*")]) == 2
    assert "no run folder there" in capsys.readouterr().err
