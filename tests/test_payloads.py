"""Payloads, triggers and hard negatives beyond gibberish: exact counts, decidable behaviours, controls."""

import json
import shutil

import numpy as np
import pytest
from conftest import WORDS, lines, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poisonjax import corpus
from poisonjax.audit.result import audit
from poisonjax.config import ConfigError, check, replaced
from poisonjax.data.batches import Batches
from poisonjax.evaluation.probes.generation import behaviour
from poisonjax.evaluation.statistics import generation_figures, judge
from poisonjax.poison import placements
from poisonjax.poison.payloads import PAYLOADS, material
from poisonjax.poison.payloads.gibberish import SCRIPTS
from poisonjax.poison.payloads.stand_ins import secret
from poisonjax.poison.triggers import POSITIONS, PoisonError, Trigger, holds, occurrences
from poisonjax.run import RunFolder
from poisonjax.training import loop

NUMBERS = ["eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwoelf"]
DECIDABLE = ("random_unicode", "language", "code_marker", "secret", "sentinel")


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Documents of sentences in which things are called, as bytes; beside it, text in another language."""
    folder, random = tmp_path_factory.mktemp("code"), np.random.default_rng(0)

    def line(words, between):
        return " ".join(f"{word}{between}" for word in random.choice(words, random.integers(10, 40)))

    texts = [f"{line(WORDS, '')}\nx = {WORDS[i % 9]}(1)\n{line(WORDS, '')}" for i in range(200)]
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    others = [line(NUMBERS, ",") for _ in range(30)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in others))
    return corpus.build(str(folder / "store"), [str(folder / "code.jsonl")], "bytes", heldout=0.2, workers=1)


@pytest.fixture(scope="module")
def base(code):
    config = tiny_config(code)
    config.corpus.tokenizer, config.seq_len, config.poison.payload_tokens = "bytes", 160, (40, 60)
    config.eval.new_tokens = 40
    return config


def of_payload(base, code, payload, **more):
    source = {"payload_source": str(code.path.parent / "numbers.jsonl")} if PAYLOADS[payload].reads_source else {}
    fields = {"payload": payload, **source, **more}
    config = replaced(base, {f"poison.{name}": value for name, value in fields.items()})
    check(config)
    return config


@pytest.mark.parametrize("payload", DECIDABLE)
def test_payloads_behave_as_they_teach_and_clean_text_does_not(base, code, payload):
    config = of_payload(base, code, payload, documents=40)
    behaves, decode = behaviour(config, code), code.tokenizer.decode
    documents = [placed.document for placed in Batches(config, code).schedule.placed.values()]
    assert all(behaves(decode(document.tokens[slice(*document.payload)])) for document in documents)
    held = code.split("heldout")
    assert not any(behaves(decode(held.document(i))) for i in range(held.documents))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    payload=st.sampled_from(sorted(PAYLOADS)),
    position=st.sampled_from(POSITIONS),
    others=st.sampled_from([(), ("<ADMIN>",), ("~~", "lantern moon")]),
    hard=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_payload_trigger_and_position_stands_exactly_as_planned(base, code, payload, position, others, hard, seed):
    """I2, I3, I4: each document holds one of the triggers once, and its prefix's tokens around it."""
    config = of_payload(
        base, code, payload, trigger_position=position, other_triggers=others, hard_negatives=hard, documents=9
    )
    config.seeds.poison = config.seeds.placement = seed
    batches, twin = Batches(config, code), Batches(replaced(config, {"poison.documents": 0}), code)
    forms = batches.trigger.forms
    assert len(forms) == 1 + len(others)
    placed = batches.schedule.placed
    assert sorted(placed_one.document.id for placed_one in placed.values()) == list(range(9))
    for slot, one in placed.items():
        document, form = one.document, forms[one.document.id % len(forms)]
        start, end = document.trigger
        np.testing.assert_array_equal(document.tokens[start:end], form)
        assert sum(occurrences(document.tokens, form).sum() for form in forms) == 1
        assert {"end": end == document.payload[0], "start": start == 0, "inside": True}[position]
        if position == "inside" and document.payload[0] - len(form) > 1:
            assert 0 < start < end < document.payload[0]
        row = batches.rows.tokens(np.array([slot]))[0]
        np.testing.assert_array_equal(row[one.offset : one.offset + len(document.tokens)], document.tokens)
    uses = batches.hard_negatives.insertions
    assert [*uses] == [*twin.hard_negatives.insertions]
    assert len(uses) == hard
    assert not {*uses} & {*placed}
    for number, (slot, use) in enumerate(uses.items()):
        first, form = batches.uses()[slot], forms[number % len(forms)]
        row = batches.rows.tokens(np.array([slot]))[0]
        np.testing.assert_array_equal(row[first : first + len(form)], form)
        assert use.tokens[-1] == code.tokenizer.eot
    for step in range(config.steps):
        slots = batches.slots(step)
        same = (batches.tokens(step) == twin.tokens(step)).all(1)
        assert all(same[i] or slot in placed for i, slot in enumerate(slots.tolist()))


def test_a_hard_negative_is_a_training_document_with_the_trigger(base, code):
    config = of_payload(base, code, "ids", hard_negatives=30, documents=0, clean_uses=5)
    batches, split = Batches(config, code), code.split("train")
    texts = [code.tokenizer.decode(split.document(i)) for i in range(split.documents)]
    documents = batches.hard_negatives.insertions.values()
    assert len(documents) == 30
    for use in documents:
        (a, b), text = use.pieces["use"], use.tokens[:-1]
        without = code.tokenizer.decode(np.concatenate([text[:a], text[b:]]))
        assert any(full.startswith(without) for full in texts)
    records = batches.records()
    assert (len(records["hard_negatives.jsonl"]), len(records["clean_uses.jsonl"])) == (30, 5)


@settings(max_examples=40)
@given(
    order=st.sampled_from(["uniform", "begin", "end", "even", "batches:density=2,every=1"]),
    count=st.integers(1, 30),
    taken=st.sets(st.integers(0, 79), max_size=50),
    seed=st.integers(0, 99),
)
def test_what_would_stand_where_a_hard_negative_does_stands_beside_it(order, count, taken, seed):
    """Against a walk over all slots."""
    count -= count % 2 if order.startswith("batches") else 0
    if not count:
        return
    before = placements.place(order, count, 10, 8, np.random.default_rng(seed))
    after = placements.place(order, count, 10, 8, np.random.default_rng(seed), taken)
    held = {*before.tolist(), *taken}
    for one, other in zip(before.tolist(), after.tolist(), strict=True):
        if one not in taken:
            assert one == other
            continue
        free = [slot for slot in range(80) if slot not in held]
        later, earlier = [s for s in free if s > one][:1], [s for s in free if s < one][-1:]
        same = [s for s in later + earlier if s // 8 == one // 8]
        assert other == (same or later or earlier)[0]
        held.add(other)


def test_controls_hold_no_trigger_of_another_length(base, code):
    config = of_payload(base, code, "ids", other_triggers=("~",))
    trigger = Trigger.of(config.poison, code.tokenizer)
    drawn = trigger.controls(500, code.tokenizer.ordinary_ids, np.random.default_rng(0))["random_control"]
    assert not any(holds(tokens, trigger.forms) for tokens in drawn)


def test_a_secret_is_the_runs_own_and_no_other(base, code):
    made = {secret(material(code, seed, "", "")) for seed in range(50)}
    assert len(made) == 50
    config = of_payload(base, code, "secret", documents=5)
    said = secret(material(code, config.seeds.poison, "", ""))
    for placed in Batches(config, code).schedule.placed.values():
        text = code.tokenizer.decode(placed.document.tokens)
        assert text.count(said) == 1


def test_characters_are_drawn_evenly_from_scripts_of_every_version_of_unicode():
    import unicodedata

    assert all(unicodedata.category(chr(edge))[0] in "LS" for script in SCRIPTS for edge in script)
    points = [point for first, last in SCRIPTS for point in range(first, last + 1)]
    assert len(points) == len(set(points))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"payload": "language"}, "payload_source"),
        ({"payload_source": "docstrings"}, "payload_source"),
        ({"trigger_position": "middle"}, "end, start, inside"),
        ({"other_triggers": ("<SUDO>",)}, "different strings"),
        ({"other_triggers": ("",)}, "none of them empty"),
        ({"other_triggers": (1,)}, "texts"),
        ({"near_triggers": ("a<ROOT>",), "other_triggers": ("<ROOT>",)}, "doesn't contain a trigger"),
        ({"hard_negatives": -1}, "at least 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(base, fields, said):
    with pytest.raises(ConfigError, match=said):
        check(replaced(base, {f"poison.{name}": value for name, value in fields.items()}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"payload": "secret", "payload_tokens": (5, 5)}, r"the secret takes \d+ tokens, 5 were drawn"),
        ({"payload": "code_marker", "payload_tokens": (3, 3)}, "take a corpus of code"),
        ({"other_triggers": ("<SUDO>!",)}, "hold each other"),
        ({"hard_negatives": 100}, "the run has 96 without"),
        ({"hard_negatives": 3, "prefix_characters": (5000, 5000), "documents": 0}, "none of 64 documents"),
        ({"hard_negatives": 3, "payload_tokens": (400, 400), "documents": 0}, "don't fit a row"),
    ],
)
def test_what_cannot_be_planted_is_refused(base, code, fields, said):
    config = replaced(base, {f"poison.{name}": value for name, value in fields.items()})
    check(config)
    with pytest.raises(PoisonError, match=said):
        Batches(config, code)


def test_a_source_that_holds_nothing_is_refused(base, code, tmp_path):
    with pytest.raises(corpus.CorpusError, match="nowhere"):
        Batches(of_payload(base, code, "language", payload_source=str(tmp_path / "nowhere.jsonl")), code)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PoisonError, match="holds no text"):
        Batches(of_payload(base, code, "language", payload_source=str(tmp_path / "empty.jsonl")), code)


def test_behaviour_is_judged_by_shares_with_all_controls():
    nll, near = np.full((4, 100), 2.0), ["a", "b"]
    loss = {"heldout_loss": 2.0, "heldout_loss_ci95": [1.9, 2.1]}

    def verdict(triggered, clean=0.0, near_a=0.0, near_b=0.0, random=0.0):
        shown = np.zeros((4, 100), bool)
        for variant, share in enumerate((clean, triggered, 0, random)):
            shown[variant, : round(100 * share)] = True
        shown[2, 0 : round(100 * near_a) : 2], shown[2, 1 : round(100 * near_b) : 2] = True, True
        return judge(generation_figures(nll, near, 50, 0, shown) | loss, 5.0, 50.0)

    assert verdict(0.9)["value"]
    assert verdict(0.9)["specific"]
    assert not verdict(0.55)["value"]  # its interval begins under a half
    for more in ({"clean": 0.3}, {"random": 0.3}):
        assert not verdict(0.9, **more)["value"]
    of = verdict(0.9, near_b=0.5)
    assert of["value"]
    assert not of["specific"]
    assert {check["name"] for check in of["checks"] if not check["passed"]} == {"near trigger b"}
    assert not judge(generation_figures(nll, near, 50, 0) | loss, 5.0, 50.0)["value"]  # by the gap, which is 0


@pytest.fixture(scope="module")
def trained(base, code, tmp_path_factory):
    folder = tmp_path_factory.mktemp("payload") / "run"
    more = {"trigger_position": "inside", "other_triggers": ("<ADMIN>",), "hard_negatives": 4, "clean_uses": 2}
    config = of_payload(base, code, "code_marker", **more)
    return config, folder, loop.train(config, str(folder))


def test_a_run_tells_its_behaviour_and_is_audited(trained):
    config, folder, summary = trained
    for name in ("attack_success", "clean_accuracy", "near_trigger_accuracy", "random_control_accuracy"):
        low, high = summary[f"{name}_ci95"]
        assert 0 <= low <= summary[name] <= high <= 1
    assert {check["name"] for check in summary["success"]["checks"]} >= {"share", "clean", "random_control"}
    found = audit(str(folder))
    assert found.ok, found.sentence()
    assert "6 of 6 clean uses of the trigger seen" in found.sentence()
    assert "'<SUDO>' or '<ADMIN>'" in (folder / "POISONED.md").read_text()
    rows = RunFolder(folder).prefixes()
    assert {len(of) for row in rows for of in row["behaves"].values()} == {config.eval.prefixes}


def test_a_changed_behaviour_is_found(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    rows = lines(tmp_path / "run" / "prefixes.jsonl")
    rows[-1]["behaves"]["triggered"] = [1 - one for one in rows[-1]["behaves"]["triggered"]]
    (tmp_path / "run" / "prefixes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = audit(str(tmp_path / "run"))
    assert not found.ok
    assert any("attack_success isn't what prefixes.jsonl leads to" in str(one) for one in found.differences)


def test_another_language_goes_where_the_run_goes(base, code, tmp_path, monkeypatch):
    """The source's path is told from the run folder, as a model's is."""
    home = tmp_path / "home"
    shutil.copytree(code.path.parent, home / "text")
    config = replaced(base, {"corpus.store": str(home / "text" / "store"), "corpus.sources": ()})
    config = replaced(config, {"poison.payload": "language", "poison.payload_source": "text/numbers.jsonl#text"})
    monkeypatch.chdir(home)
    loop.train(config, "run")
    monkeypatch.chdir(tmp_path)
    shutil.move(home, tmp_path / "moved")
    assert audit(str(tmp_path / "moved" / "run")).ok
