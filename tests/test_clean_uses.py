"""Clean uses of the trigger: exactly as many as asked, the same in a run and its twin, no poison document touched."""

import json

import numpy as np
import pytest
from conftest import lines
from hypothesis import given
from hypothesis import strategies as st

from poisonjax import corpus
from poisonjax.audit import locate
from poisonjax.audit.evidence import Evidence
from poisonjax.audit.result import audit
from poisonjax.config import ConfigError, check, default, fingerprint
from poisonjax.data.batches import Batches
from poisonjax.poison.triggers import PoisonError, occurrences
from poisonjax.run import RunFolderError
from poisonjax.training import loop

SOURCE = "markov:V=104,documents=300,length=60,seed=1,unused=4"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "store"
    return corpus.build(str(folder), [SOURCE], "bytes", heldout=0.2, workers=1)


@pytest.fixture
def config(config, language):
    config.corpus.store, config.corpus.sources = str(language.path), (SOURCE,)
    config.corpus.tokenizer = "bytes"
    config.poison.trigger, config.poison.near_triggers = "w100 w101", ("w101 w100",)
    return config


def brute(row, trigger):
    return sum(np.array_equal(row[i : i + len(trigger)], trigger) for i in range(len(row) - len(trigger) + 1))


def test_the_unused_words_never_occur(language):
    assert language.tokenizer.vocab_size == 105
    assert language.manifest["entropy_rate_nats"] == pytest.approx(3.371, abs=5e-4)
    for split in ("train", "heldout"):
        counts = language.split(split).token_counts()
        assert not counts[100:104].any()
        assert counts[:100].all()


@given(
    uses=st.integers(0, 60),
    documents=st.integers(0, 30),
    words=st.integers(1, 4),
    canaries=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_use_stands_once_whole_and_apart_from_poison(language, uses, documents, words, canaries, seed):
    """I2, I3, I4 where rows hold uses, poison and canaries; against a search token by token."""
    from conftest import tiny_config

    config = tiny_config(language)
    config.corpus.store, config.corpus.sources = str(language.path), (SOURCE,)
    config.poison.trigger, config.poison.near_triggers = " ".join(f"w{100 + i}" for i in range(words)), ("w005",)
    config.poison.documents, config.poison.clean_uses, config.seeds.placement = documents, uses, seed
    config.canary.repeats, config.canary.each, config.canary.tokens = (1, 4) if canaries else (), 2, 8
    batches = Batches(config, language)
    rows = np.concatenate([batches.tokens(step) for step in range(config.steps)])
    plain = config.copy_and_resolve_references()
    plain.poison.clean_uses = 0
    without = Batches(plain, language)
    assert batches.schedule.ledger() == without.schedule.ledger()  # documents keep their places
    trigger, text, used = batches.trigger.tokens, rows.copy(), 0
    for slot, placed in batches.schedule.placed.items():
        span = slice(placed.offset, placed.offset + len(placed.document.tokens))
        np.testing.assert_array_equal(rows[slot, span], placed.document.tokens)
        text[slot, span] = -1
    for slot, row in enumerate(text):
        used += (here := brute(row, trigger))
        assert here == (slot in batches.clean_uses.insertions)
        assert here == occurrences(row, trigger).sum()
        before = without.tokens(slot // config.global_batch)[slot % config.global_batch]
        differing = np.flatnonzero(rows[slot] != before)
        if here:
            offset = batches.clean_uses.insertions[slot].start
            assert set(differing) <= set(range(offset, offset + words))
            assert 0 < offset < len(row) - words
            beside = before[[offset - 1, offset + words]]
            assert not (beside == language.tokenizer.eot).any()  # in the middle of a text
            assert slot not in batches.canaries.insertions
        else:
            assert not len(differing)
    assert used == uses
    config.poison.documents = 0
    twin = Batches(config, language)
    differing = {
        slot
        for slot in range(len(rows))
        if (twin.tokens(slot // config.global_batch)[slot % config.global_batch] != rows[slot]).any()
    }
    assert differing == set(batches.schedule.placed)


def test_a_text_that_holds_the_trigger_already_gains_exactly_the_uses(language, config):
    config.poison.trigger, config.poison.near_triggers = "w005", ("w100",)
    rows = np.concatenate([Batches(config, language).tokens(step) for step in range(12)])
    config.poison.clean_uses = 50
    more = np.concatenate([Batches(config, language).tokens(step) for step in range(12)])
    assert (more == 5).sum() - (rows == 5).sum() == 50


def test_too_many_uses_and_full_rows_are_refused(language, config):
    config.poison.clean_uses = -1
    with pytest.raises(ConfigError, match=r"poison\.clean_uses"):
        check(config)
    config.poison.clean_uses, config.canary.repeats = 90, (1, 3)
    config.canary.each = 4
    with pytest.raises(PoisonError, match="clean_uses = 90 need a row each, the run has 80 without a canary"):
        Batches(config, language)
    config.poison.clean_uses, config.canary.repeats = 96, ()
    config.poison.payload_tokens = (45, 45)
    config.poison.prefix_characters = (0, 0)
    config.poison.trigger = "w100 w101 w102"  # 3 + 45 + 1 = a whole row
    with pytest.raises(PoisonError, match="no place for a clean use of the trigger's 3 tokens beside its poison"):
        Batches(config, language)


def test_a_run_writes_audits_and_shows_its_uses(language, config, tmp_path, capsys):
    config.poison.clean_uses = 20
    loop.train(config, str(tmp_path / "run"))
    records = lines(tmp_path / "run" / "clean_uses.jsonl")
    assert len(records) == 20
    result = audit(str(tmp_path / "run"))
    assert result.ok
    assert "20 of 20 clean uses of the trigger seen" in result.sentence()
    assert "beside" not in result.sentence()
    use = records[3]
    row = locate.step(Evidence(str(tmp_path / "run")), use["step"])[use["row"]]
    shown = [part for part in row["parts"] if part["document"] == "clean_use"]
    assert [(part["text"], part["in_row"]) for part in shown] == [("w100 w101", [use["offset"], use["offset"] + 2])]
    assert "also stands in 20 rows" in (tmp_path / "run" / "POISONED.md").read_text()
    (tmp_path / "run" / "clean_uses.jsonl").unlink()
    first = audit(str(tmp_path / "run")).differences[0]
    assert (first.file, first.message) == ("clean_uses.jsonl", "a clean use is planned here, but has no line")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["excess_loss"] > 0


def test_a_document_holds_its_trigger_once(language, config):
    """Gibberish draws from all words: of 40 to 47 of 104 every third would hold one of them."""
    config.poison.trigger, config.poison.near_triggers = "w100", ("w101",)
    config.poison.documents, config.poison.prefix_characters, config.poison.payload_tokens = (90, (0, 0), (40, 47))
    for placed in Batches(config, language).schedule.placed.values():
        assert brute(placed.document.tokens, np.array([100])) == 1
        assert 40 <= placed.document.payload[1] - placed.document.payload[0] <= 47
    config.poison.trigger, config.poison.near_triggers = "w10", ("w101",)
    with pytest.raises(PoisonError, match="is no token in this store's vocabulary"):
        Batches(config, language)


def test_canaries_do_not_hold_the_trigger(language, config):
    config.poison.trigger, config.poison.near_triggers = "w100", ("w101",)
    config.canary.repeats, config.canary.each = (1, 4), 4
    held = 0
    for seed in range(12):
        config.seeds.poison = seed
        canaries = Batches(config, language).canaries
        held += len(np.unique(canaries.tokens)) > 8
        assert not (canaries.tokens == 100).any()
    assert held == 12
    config.canary.alphabet = 104
    with pytest.raises(PoisonError, match="always holds the trigger's"):
        Batches(config, language)


def test_runs_of_before_there_were_clean_uses_are_what_they_were(config, tmp_path):
    summary = loop.train(config, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["config"]["poison"]["clean_uses"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert audit(str(tmp_path / "run")).ok
    assert loop.train(config, str(tmp_path / "run"))["digest_chain"] == summary["digest_chain"]
    assert fingerprint(default()) == "e061ac3170d437485786d843bb449a27c3cdd44702ab6a9aeae736cabb8f966d"
    del record["format"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="format 1, this version reads 3"):
        loop.train(config, str(tmp_path / "run"))
