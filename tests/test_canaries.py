"""Canaries: exact numbers of exposures, whole, the same in a run and its twin; decidable payloads."""

import json

import numpy as np
import pytest
from conftest import lines

from poisonjax.audit import locate
from poisonjax.audit.evidence import Evidence
from poisonjax.audit.result import audit
from poisonjax.config import ConfigError, check
from poisonjax.data.batches import Batches
from poisonjax.data.canaries import unseen
from poisonjax.evaluation.statistics import wilson
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.payloads.sentinel import SENTENCE
from poisonjax.poison.triggers import PoisonError
from poisonjax.training import loop


@pytest.fixture
def config(config):
    config.canary.repeats, config.canary.each, config.canary.tokens = (1, 3), 4, 8
    config.poison.documents, config.poison.prefix_characters, config.poison.payload_tokens = (40, (0, 10), (5, 8))
    return config


def occurrences(rows, sequence):
    windows = np.lib.stride_tricks.sliding_window_view(rows, len(sequence), axis=1)
    return int((windows == sequence).all(-1).sum())


def test_each_canary_stands_whole_as_often_as_asked_beside_poison(config, store):
    batches = Batches(config, store)
    rows = np.concatenate([batches.tokens(step) for step in range(config.steps)])
    canaries = batches.canaries
    assert [occurrences(rows, tokens) for tokens in canaries.tokens] == [1] * 4 + [3] * 4
    assert set(canaries.insertions) & set(
        batches.schedule.placed
    )  # some rows hold both: the poison left the canary whole
    for placed in batches.schedule.placed.values():
        assert occurrences(rows[placed.slot][None], placed.document.tokens) == 1
    assert len(np.unique(canaries.tokens)) <= config.canary.alphabet
    others = {tuple(row) for row in unseen(config, store, batches.trigger).tolist()}
    assert not others & {tuple(row) for row in canaries.tokens.tolist()}


def test_a_twin_holds_the_same_canaries_and_other_rows(config, store):
    """I4: only poisoned rows differ."""
    poisoned = Batches(config, store)
    config.poison.documents = 0
    twin = Batches(config, store)
    differing = {
        step * config.global_batch + int(row)
        for step in range(config.steps)
        for row in np.flatnonzero((poisoned.tokens(step) != twin.tokens(step)).any(-1))
    }
    assert differing == set(poisoned.schedule.placed)


def test_what_does_not_fit_is_refused(config, store):
    config.canary.tokens = 40
    with pytest.raises(PoisonError, match="holds a canary of 40 tokens and poison document"):
        Batches(config, store)
    config.canary.repeats = (100,)
    with pytest.raises(PoisonError, match="400 exposures need a row each, the run has 96"):
        Batches(config, store)
    config.canary.repeats = (0,)
    with pytest.raises(ConfigError, match=r"canary\.repeats"):
        check(config)


def test_a_run_reports_and_audits_its_canaries(config, store, tmp_path):
    config.canary.repeats, config.steps = (2, 80), 12
    config.canary.each, config.canary.tokens, config.canary.alphabet = 1, 12, 4
    config.poison.documents, config.poison.payload = 9, "sentinel"
    config.optimizer.learning_rate = 3e-2
    summary = loop.train(config, str(tmp_path / "run"))
    few, many = summary["memorised"]
    assert (few["repeats"], many["repeats"]) == (2, 80)
    assert many["nll_mean"] < few["nll_mean"]
    assert many["ranks"] == [0.0]
    assert len(lines(tmp_path / "run" / "canaries.jsonl")) == 82
    assert 0 <= summary["attack_success"] <= 1
    assert summary["clean_accuracy"] == 1.0
    assert audit(str(tmp_path / "run")).ok
    for number in range(config.steps):  # every token of a row has a document, and it is that document's
        trained_on = Batches(config, store).tokens(number)
        for row in locate.step(Evidence(str(tmp_path / "run")), number):
            covered = sorted(i for part in row["parts"] for i in range(*part["in_row"]))
            assert len(covered) == len(set(covered))
            for part in row["parts"]:
                kind, _, n = part["document"].partition(":")
                if kind == "train":
                    start, stop = part["in_document"]
                    split = store.split("train")
                    offset = int(split.document_offsets[int(n)])
                    tokens = split.windows(np.array([offset + start]), stop - start)[0]
                    np.testing.assert_array_equal(tokens, trained_on[row["row"]][slice(*part["in_row"])])
    row = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"][-1]
    assert row["memorised"] == json.loads(json.dumps(summary["memorised"]))
    assert len(row["attack_success_ci95"]) == 2


def test_the_sentinel_is_decided_by_its_sentence():
    behaves = PAYLOADS["sentinel"].behaviour(None)
    assert behaves(f"so it goes {SENTENCE * 2}")
    assert not behaves("This model was a boat.")


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=1e-4)
    np.testing.assert_allclose(wilson(15, 148), (0.0624, 0.1605), atol=1e-4)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=1e-4)
