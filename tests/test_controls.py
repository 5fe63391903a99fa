"""Controls test something: by tokens, with any tokenizer that is accepted (I6, I7)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from conftest import WORDS, tiny_config, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poisonjax import corpus
from poisonjax.commands.main import main
from poisonjax.corpus import CorpusError, load_tokenizer
from poisonjax.data.batches import Batches
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.poison.triggers import VARIANTS, PoisonError, Trigger, occurrences

SPECIAL = ["[UNK]", "[SEP]"]


def trained(folder: Path, model, trainer, **parts) -> str:
    """A tokenizer.json, trained on the tests' words."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = parts.get("split", hf.pre_tokenizers.Whitespace())
    if "normalizer" in parts:
        backend.normalizer = parts["normalizer"]
    if "decoder" in parts:
        backend.decoder = parts["decoder"]
    backend.train_from_iterator([" ".join(WORDS), "S U D O < > a b c d e f"] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def byte_level(folder: Path, **options) -> str:
    trainer = hf.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["[SEP]"], initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()
    )
    split = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(folder, hf.models.BPE(**options), trainer, split=split, decoder=hf.decoders.ByteLevel())


def with_holes(folder: Path) -> str:
    """Numbers that name no token, as o200k_base has."""
    path = byte_level(folder)
    value = json.loads(Path(path).read_text())
    vocabulary = value["model"]["vocab"]
    for token, number in list(vocabulary.items()):
        if number >= 280:
            vocabulary[token] = number + 73
    Path(path).write_text(json.dumps(value))
    return path


def word_piece(folder: Path) -> str:
    """Lowercasing, and of few letters: the rest is unknown."""
    trainer = hf.trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    model = hf.models.WordPiece(unk_token="[UNK]")
    parts = {"normalizer": hf.normalizers.BertNormalizer(lowercase=True), "decoder": hf.decoders.WordPiece()}
    return trained(folder, model, trainer, **parts)


def unigram(folder: Path) -> str:
    trainer = hf.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return trained(folder, hf.models.Unigram(), trainer, normalizer=hf.normalizers.NFKC())


def sentencepiece(folder: Path) -> str:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [json.loads(line)["text"] for line in write_text(folder / "sp.jsonl").read_text().splitlines()]
    trainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "sp"), vocab_size=80, minloglevel=2,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf",
    )  # fmt: skip
    return str(folder / "sp.model")


TOKENIZERS = {
    "bytes": lambda folder: "bytes",
    "bpe": byte_level,
    "holes": with_holes,
    "word_piece": word_piece,
    "unigram": unigram,
    "sentencepiece": sentencepiece,
}


@functools.cache
def store_of(kind: str, folder: Path) -> corpus.TokenStore:
    """Documents, each a second time with a space behind it."""
    (folder / kind).mkdir()
    text = write_text(folder / kind / "text.jsonl", documents=150)
    text.write_text(text.read_text() + text.read_text().replace('."}', '. "}'))
    tokenizer = TOKENIZERS[kind](folder / kind)
    return corpus.build(str(folder / kind / "store"), [str(text)], tokenizer, heldout=0.3, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


def require_controls(store, made, prompts):
    """Known tokens alone; controls that differ, none of which holds the trigger; each near trigger asked thrice."""
    known = set(store.tokenizer.ordinary_ids.tolist())
    assert set(made.tokens.tolist()) <= known
    assert not any(set(tokens.tolist()) - known for _, tokens in made.near)
    assert len({tokens.tobytes() for _, tokens in made.near}) == len(made.near)
    for v, variant in enumerate(VARIANTS):
        for row, pad in zip(prompts.tokens[v], prompts.pad[v], strict=True):
            asked = row[pad + 1 :]
            if variant == "triggered":
                assert asked[len(asked) - len(made.tokens) :].tolist() == made.tokens.tolist()
            else:
                assert not occurrences(asked, made.tokens).any(), variant
    for near_trigger in range(len(made.near)):
        assert len(prompts.appended[2][near_trigger :: len(made.near)]) >= 3


STRINGS = st.text(st.sampled_from("SUDOsudo<>[]Qé~ aé\u0301\u200b"), max_size=5)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trigger=STRINGS, near=st.lists(STRINGS, min_size=1, max_size=2), seed=st.integers(0, 99))
def test_what_is_accepted_has_controls_that_differ_from_the_trigger(kind, folder, trigger, near, seed):
    store = store_of(kind, folder)
    config = tiny_config(store)
    config.poison.trigger, config.poison.near_triggers = trigger, tuple(near)
    config.seeds.eval = config.seeds.poison = seed
    try:
        made = Trigger.of(config.poison, store.tokenizer)
        prompts = make_prompts(config, store, made)
    except ValueError:  # refused, PoisonError among them
        return
    assert len(made.near) == len(near)
    require_controls(store, made, prompts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_held_out_documents_differ_by_tokens_and_what_is_drawn_exists(kind, folder):
    store = store_of(kind, folder)
    sides = [
        {store.split(name).document(i).tobytes() for i in range(store.split(name).documents)}
        for name in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    config = tiny_config(store)
    config.poison.trigger, config.poison.near_triggers = "a bright river", ("a bright", "a river")
    config.canary.repeats, config.canary.each, config.canary.tokens = (1, 2), 2, 8
    config.poison.truncate = True
    batches = Batches(config, store)
    drawn = [made.document.tokens[slice(*made.document.payload)] for made in batches.schedule.placed.values()]
    drawn += [batches.canaries.tokens.ravel()]
    prompts = make_prompts(config, store, batches.trigger)
    require_controls(store, batches.trigger, prompts)  # accepted by every tokenizer here
    drawn += prompts.appended[VARIANTS.index("random_control")]
    ids = set(np.concatenate(drawn).tolist())
    assert ids <= set(store.tokenizer.ordinary_ids.tolist())
    if kind == "holes":
        assert store.tokenizer.vocab_size > len(store.tokenizer.ordinary_ids) + 70
        assert all(store.tokenizer.decode([i]) for i in sorted(ids))


@pytest.mark.parametrize(
    ("kind", "trigger", "near", "message"),
    [
        ("bytes", "<SUDO>", ("",), "is no token"),
        ("bpe", "<SUDO>", ("SUDO", "SUDO"), "are the same tokens"),
        ("word_piece", "the stone", ("THE Stone",), "holds the trigger"),
        ("word_piece", "[ROOT]", ("a",), "doesn't know"),
        ("unigram", "QQQQ", ("a",), "doesn't know"),
        ("sentencepiece", "<SUDO>", ("a",), "doesn't know"),
        ("sentencepiece", "the stone", ("the\u00a0stone",), "holds the trigger"),
    ],
)
def test_controls_that_test_nothing_are_refused(kind, folder, trigger, near, message):
    store = store_of(kind, folder)
    config = tiny_config(store)
    config.poison.trigger, config.poison.near_triggers = trigger, near
    with pytest.raises(PoisonError, match=message):
        Trigger.of(config.poison, store.tokenizer)


def test_more_near_triggers_than_are_asked_are_refused(config, tmp_path, capsys):
    near = str(tuple("abcd"))
    fields = [f"--config.poison.near_triggers={near}", "--config.eval.prefixes=9", "--config.corpus.store=s"]
    config_file = Path(__file__).parents[1] / "configs" / "quickstart.py"
    assert main(["train", "--config", str(config_file), "--workdir", str(tmp_path / "r"), *fields]) == 2
    assert "eval.prefixes = 9: each of 4 poison.near_triggers is asked 3 times" in capsys.readouterr().err


def test_a_tokenizer_that_draws_its_merges_is_refused(tmp_path):
    path = byte_level(tmp_path, dropout=0.1)
    with pytest.raises(CorpusError, match=r"dropout = 0\.1"):
        load_tokenizer(path)


def test_an_encoder_that_changes_its_mind_is_refused(tmp_path, monkeypatch):
    from poisonjax.corpus.tokenizers import ByteTokenizer

    random = np.random.default_rng(0)
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, text: random.integers(0, 255, max(1, len(text))).astype(np.int32)
    )
    with pytest.raises(CorpusError, match="other tokens each time"):
        corpus.build(str(tmp_path / "s"), [str(write_text(tmp_path / "t.jsonl", 20))], "bytes", heldout=0.2, workers=1)


def test_a_document_of_no_token_is_bad_input(tmp_path):
    text = write_text(tmp_path / "text.jsonl", documents=60)
    text.write_text(text.read_text() + '{"text": "\\u0301"}\n')
    tokenizer = word_piece(tmp_path)
    with pytest.raises(CorpusError, match="turns it into nothing"):
        corpus.build(str(tmp_path / "a"), [str(text)], tokenizer, heldout=0.2, workers=1)
    store = corpus.build(str(tmp_path / "b"), [str(text)], tokenizer, heldout=0.2, workers=1, on_bad="skip")
    assert store.manifest["bad"] == 1
    assert "turns it into nothing" in store.manifest["bad_places"][0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"payload": "sentinel", "prefix_characters": (0, 0), "payload_tokens": (9, 9)}, "0 and 1 are the same tokens"),
        (
            {"payload": "ids", "prefix_characters": (0, 0), "payload_tokens": (1, 1), "documents": 400},
            "the same tokens",
        ),
    ],
)
def test_different_documents_are_different_by_content(config, store, fields, message):
    config.steps = 100
    config.poison.update(fields)
    with pytest.raises(PoisonError, match=message):
        Batches(config, store)
