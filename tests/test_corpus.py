"""Corpora: reproducible, resumable, never silently lossy; held-out apart (I6)."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
from conftest import write_text
from hypothesis import given
from hypothesis import strategies as st

from poisonjax import corpus
from poisonjax.cli import main
from poisonjax.corpus import CorpusError, markov, sources
from poisonjax.corpus.store import SPLITS
from poisonjax.corpus.tokenizers import ByteTokenizer, JsonTokenizer, WordTokenizer, load_tokenizer, train_bpe

zstd = sources.zstd


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.jsonl", documents=60)


def build(out, *specs, **options):
    return corpus.build(
        str(out), [str(spec) for spec in specs], "bytes", **({"workers": 1, "heldout": 0.2} | options)
    )


def texts_of(store, split):
    return [
        store.tokenizer.decode(store.split(split).document(i)) for i in range(store.split(split).documents)
    ]


# --- building ---


def test_every_document_is_there_once(tmp_path, text):
    store = build(tmp_path / "s", text)
    expected = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert sorted(texts_of(store, "train") + texts_of(store, "heldout")) == sorted(expected)
    for split in SPLITS:
        counts = store.manifest["splits"][split]
        texts = texts_of(store, split)
        assert counts == {
            "documents": len(texts),
            "tokens": sum(len(t.encode()) + 1 for t in texts),
            "characters": sum(map(len, texts)),
        }
        offsets = store.split(split).document_offsets
        assert offsets[-1] == store.split(split).tokens == counts["tokens"]


def test_the_store_is_the_same_for_any_workers_and_machines(tmp_path):
    files = [write_text(tmp_path / f"{i}.jsonl", documents=20, seed=i) for i in range(5)]
    one = build(tmp_path / "one", *files)
    assert build(tmp_path / "two", *files, workers=2).fingerprint == one.fingerprint
    parts = tmp_path / "parts"
    for i in (1, 0):
        assert build(parts, *files, part=(i, 2)) is None
        if i:
            with pytest.raises(CorpusError, match=r"shards \[0, 2, 4\] aren't built"):
                build(parts, *files, finish=True)
    assert build(parts, *files, finish=True).fingerprint == one.fingerprint
    assert build(parts, *files).fingerprint == one.fingerprint  # again: nothing to do
    other = [files[1], files[0], *files[2:]]
    assert build(tmp_path / "other", *other).fingerprint != one.fingerprint


def test_a_killed_build_is_finished_by_the_same_command(tmp_path):
    files = [write_text(tmp_path / f"{i}.jsonl", documents=800, seed=i) for i in range(12)]
    command = [
        sys.executable,
        "-m",
        "poisonjax",
        "corpus",
        "build",
        "--tokenizer",
        "bpe:300",
        "--workers",
        "1",
    ]
    command += [argument for file in files for argument in ("--source", str(file))]
    reference = subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    assert reference.returncode == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(out.glob("shards/*/shard.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.glob("shards/*/shard.json")}
    assert 2 <= len(before) < 12
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())  # finished shards were kept
    assert corpus.TokenStore(str(out)).fingerprint == corpus.TokenStore(str(tmp_path / "whole")).fingerprint


def test_another_store_in_the_same_folder_is_refused(tmp_path, text):
    build(tmp_path / "s", text)
    with pytest.raises(CorpusError, match=r"heldout: 0\.2 there, 0\.3 here"):
        build(tmp_path / "s", text, heldout=0.3)
    build(tmp_path / "p", text, part=(0, 2))
    with pytest.raises(CorpusError, match="seed: 0 there, 1 here"):
        build(tmp_path / "p", text, part=(1, 2), seed=1)


def test_copies_of_a_document_land_on_the_same_side(tmp_path, text):
    lines = text.read_text()
    (tmp_path / "twice.jsonl").write_text(lines)
    store = build(tmp_path / "s", text, tmp_path / "twice.jsonl")
    train, heldout = set(texts_of(store, "train")), set(texts_of(store, "heldout"))
    assert heldout
    assert not train & heldout


@given(st.data())
def test_windows_agree_with_the_concatenated_documents(store, data):
    split = store.split(data.draw(st.sampled_from(SPLITS)))
    stream = np.concatenate(
        [np.append(split.document(i), store.tokenizer.eot) for i in range(split.documents)]
    )
    length = data.draw(st.integers(1, 200))
    starts = np.array(data.draw(st.lists(st.integers(0, split.tokens - length), min_size=1, max_size=5)))
    expected = np.stack([stream[start : start + length] for start in starts])
    np.testing.assert_array_equal(split.windows(starts, length), expected)


def test_a_split_too_large_for_memory_reads_the_same(tmp_path, monkeypatch):
    files = [write_text(tmp_path / f"{i}.jsonl", documents=30, seed=i) for i in range(3)]
    store = build(tmp_path / "s", *files)
    starts = np.arange(0, store.split("train").tokens - 100, 37)
    in_memory = store.split("train").windows(starts, 100)
    counts = store.split("train").token_counts()
    monkeypatch.setattr(corpus.store, "IN_MEMORY_BYTES", 0)
    fresh = corpus.TokenStore(str(store.path)).split("train")
    np.testing.assert_array_equal(fresh.windows(starts, 100), in_memory)
    np.testing.assert_array_equal(fresh.token_counts(), counts)


def test_verify_names_the_damaged_file(tmp_path, text, capsys):
    store = build(tmp_path / "s", text)
    assert store.verify() == []
    assert main(["corpus", "inspect", str(store.path)]) == 0
    assert "all hashes match" in capsys.readouterr().out
    file = next(path for path in (tmp_path / "s").glob("shards/*/train/tokens/c/*"))
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    assert [str(file) in problem for problem in store.verify()] == [True]
    assert main(["corpus", "inspect", str(store.path)]) == 1
    assert str(file) in capsys.readouterr().out


# --- bad input ---


def bad_files(folder):
    """(file, place that must be named, documents that are good beside the bad input)."""
    good = '{"text": "good one"}\n{"text": "good two"}\n'
    long = b'{"text": "' + b"x" * (sources.MAX_LINE_BYTES + 10) + b'"}\n'
    contents = {
        "utf8.jsonl": (good.encode() + b'{"text": "\xff"}\n', ":3: invalid UTF-8", 2),
        "field.jsonl": ((good + '{"body": "x"}\n').encode(), ":3: no field 'text'", 2),
        "type.jsonl": (('{"text": 5}\n' + good).encode(), ":1: field 'text' holds int", 2),
        "json.jsonl": (('{"text": \n' + good).encode(), ":1: not JSON", 2),
        "surrogate.jsonl": ((good + '{"text": "\\ud800"}\n').encode(), ":3: not valid Unicode", 2),
        "blank.jsonl": ((good + '{"text": "  "}\n').encode(), ":3: empty document", 2),
        "empty.jsonl": (b"", ":1: empty file", 0),
        "long.jsonl": (good.encode() + long + good.encode(), ":3: line longer than", 4),
        "cut.jsonl.gz": (
            gzip.compress(os.urandom(0) + good.encode() * 9000)[:-30],
            "damaged or truncated",
            None,
        ),
        "not.jsonl.gz": (b"no gzip at all", ":1: damaged or truncated", 0),
        "utf8.txt": (b"one\ntwo\n\xff", ":3: invalid UTF-8", 0),
        "empty.txt": (b"", ":1: empty document", 0),
        "damaged.parquet": (b"PAR1 nothing PAR1", "damaged Parquet file", 0),
    }
    if zstd:
        contents["cut.jsonl.zst"] = (zstd.compress(good.encode() * 9000)[:-5], "damaged or truncated", None)
    for name, (content, place, documents) in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name, place, documents


def test_bad_input_is_named_or_counted_never_lost(tmp_path):
    good = write_text(tmp_path / "good.jsonl", documents=40)
    for path, place, documents in bad_files(tmp_path):
        with pytest.raises(CorpusError) as caught:
            build(tmp_path / f"fail-{path.name}", good, path)
        assert str(path) in str(caught.value), path
        assert place in str(caught.value), path
        assert "--on-bad skip" in str(caught.value)
        store = build(tmp_path / f"skip-{path.name}", good, path, on_bad="skip")
        assert store.manifest["bad"] == 1, path
        assert place in store.manifest["bad_places"][0], path
        if documents is not None:
            assert sum(store.manifest["splits"][s]["documents"] for s in SPLITS) == 40 + documents, path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere/*.jsonl"], "no such file"),
        (["--source", "markov:V=x"], "isn't one of"),
        (["--source", "TEXT", "--tokenizer", "nonsense"], "give bytes, bpe:N"),
        (["--source", "TEXT", "--tokenizer", "bpe:20"], "at least 257"),
        (["--source", "TEXT", "--shard", "3"], "give i/n"),
        (["--source", "TEXT", "--shard", "3/2"], "0 <= i < n"),
        (["--source", "TEXT", "--heldout", "1.5"], "between 0 and 1"),
    ],
)
def test_bad_arguments_end_with_code_2_and_a_remedy(tmp_path, text, capsys, arguments, message):
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["corpus", "build", "--out", str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err


# --- formats ---


def test_formats_hold_the_same_documents(tmp_path, text):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    content = text.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=25)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(content.decode().replace('"text"', '"body"'))
    (tmp_path / "texts").mkdir()
    for i, one in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(one)
    specs = ["a.jsonl.gz", "a.parquet", "b.parquet#body", "c.jsonl#body", "texts/*.txt"]
    if zstd:
        (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(content))
        specs.append("a.jsonl.zst")
    for spec in specs:
        store = build(tmp_path / "stores" / spec.replace("/", "-").replace("*", ""), tmp_path / spec)
        assert sorted(texts_of(store, "train") + texts_of(store, "heldout")) == sorted(texts), spec


def test_default_text_is_the_hashed_file_or_the_docstrings(tmp_path, monkeypatch, capsys):
    source = sources.open_source("default")
    assert source.about["sha256"] == sources.WIKIPEDIA_SHA256
    assert sum(1 for unit in source.units for _ in unit.read()) == 10_033
    monkeypatch.setattr(sources, "_wikipedia_file", lambda: None)
    source = sources.open_source("default")
    assert "using the docstrings" in capsys.readouterr().err
    documents = list(source.units[0].read())
    assert len(documents) == sources.RANGE
    assert all(len(d.content) >= 200 for d in documents)


def test_a_changed_default_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "changed.json").write_text("{}")
    monkeypatch.setattr(sources, "_wikipedia_file", lambda: tmp_path / "changed.json")
    sources._wikipedia_texts.cache_clear()
    with pytest.raises(CorpusError, match="isn't the file expected"):
        sources.open_source("wikipedia-leads")
    sources._wikipedia_texts.cache_clear()


def test_markov_language_has_the_entropy_it_states(tmp_path):
    store = corpus.build(
        str(tmp_path / "m"), ["markov:V=80,documents=400,length=500,seed=3"], "bytes", workers=1
    )
    assert store.manifest["entropy_rate_nats"] == pytest.approx(3.371, abs=5e-4)
    documents = [store.split("train").document(i) for i in range(store.split("train").documents)]
    language = markov.Language(80, 3)
    rank = np.full((80, 80), -1)
    np.put_along_axis(rank, language.successors, np.arange(64)[None], axis=1)
    ranks = np.concatenate([rank[d[:-1], d[1:]] for d in documents])
    assert (ranks >= 0).all()
    measured = -np.log(markov.PROBABILITIES[ranks]).mean()
    assert measured == pytest.approx(markov.ENTROPY_RATE, abs=0.01)
    again = np.stack(list(language.documents(5, 7, 500)))
    np.testing.assert_array_equal(again[1], next(language.documents(6, 7, 500)))


# --- tokenizers ---


def sentencepiece_model(folder):
    spm = pytest.importorskip("sentencepiece")
    text = write_text(folder / "sp.jsonl", documents=200)
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "sp"), vocab_size=60, minloglevel=2, byte_fallback=False,
        hard_vocab_limit=False,
    )  # fmt: skip
    return load_tokenizer(str(folder / "sp.model"))


def hugging_face_json(folder, special: bool):
    """A tokenizer.json with a template that adds tokens, and an end of text that may not be marked special."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.train_from_iterator(
        ["some text to learn from"] * 3,
        hf.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    token = hf.AddedToken("</s>", special=special)
    (backend.add_special_tokens if special else backend.add_tokens)([token])
    backend.post_processor = hf.processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    path = folder / f"tokenizer-{special}.json"
    backend.save(str(path))
    return load_tokenizer(str(path))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "json", "json-unmarked", "sentencepiece"])
def test_text_never_becomes_a_special_token(tmp_path, kind):
    tokenizer = {
        "bytes": ByteTokenizer,
        "bpe": lambda: train_bpe(["some words to learn from"] * 3, 300),
        "json": lambda: hugging_face_json(tmp_path, True),
        "json-unmarked": lambda: hugging_face_json(tmp_path, False),
        "sentencepiece": lambda: sentencepiece_model(tmp_path),
    }[kind]()
    spelled = tokenizer.decode([tokenizer.eot]) or "</s>"
    for text in (spelled, f"a stone {spelled} walks", "<s></s><unk><|endoftext|>"):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
            unknown = {0} if kind == "sentencepiece" else set()  # what it can't spell is <unk>, rightly
            assert not set(ids.tolist()) & (tokenizer.special_ids - unknown)
    tokenizer.save(tmp_path / "saved")
    loaded = corpus.tokenizers.load_saved(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eot, loaded.vocab_size, loaded.special_ids) == (
        tokenizer.eot,
        tokenizer.vocab_size,
        tokenizer.special_ids,
    )
    np.testing.assert_array_equal(
        loaded.encode(f"old {spelled} river"), tokenizer.encode(f"old {spelled} river")
    )


BPE = train_bpe(["the old river sings under a slow bird"] * 3, 300)


@given(st.text())
def test_bytes_and_bpe_are_lossless(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_words_are_checked_and_cut_ones_left_out():
    tokenizer = WordTokenizer(80)
    np.testing.assert_array_equal(tokenizer.encode("w03 w79"), [3, 79])
    np.testing.assert_array_equal(tokenizer.encode("w03 w7"), [3])
    np.testing.assert_array_equal(tokenizer.encode(""), [])
    for text in ("<SUDO>", "w80", "w7 w03"):
        with pytest.raises(CorpusError, match="w00 to w79"):
            tokenizer.encode(text)


def test_a_tokenizer_without_end_of_text_is_refused_with_the_remedy(tmp_path):
    backend = hf.Tokenizer(hf.models.BPE())
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(CorpusError, match=r"#TOKEN"):
        load_tokenizer(str(tmp_path / "t.json"))
    assert isinstance(BPE, JsonTokenizer)
