"""Corpora: reproducible, resumable, never silently lossy; held-out apart (I6)."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from conftest import write_text
from hypothesis import given
from hypothesis import strategies as st

from poisonjax import corpus
from poisonjax.commands.main import main
from poisonjax.corpus import SPLITS, CorpusError, arrays, load_tokenizer, markov, sources
from poisonjax.corpus import split as split_lib
from poisonjax.corpus.mapped import Mapped
from poisonjax.corpus.tokenizers import ByteTokenizer, Tokenizer, WordTokenizer, load_saved, train_bpe


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.jsonl", documents=60)


def build(out, *specs, tokenizer="bytes", **options):
    options = {"workers": 1, "heldout": 0.2} | options
    return corpus.build(str(out), [str(spec) for spec in specs], tokenizer, **options)


def documents_of(store, split):
    return [store.split(split).document(i) for i in range(store.split(split).documents)]


def texts_of(store, split):
    return [store.tokenizer.decode(ids) for ids in documents_of(store, split)]


def all_texts(store):
    return sorted(text for split in SPLITS for text in texts_of(store, split))


def read(spec):
    items = [item for unit in sources.open_source(str(spec)).units for item in unit.read()]
    return [item if isinstance(item, sources.BadInput) else item.content for item in items]


# --- building ---


def test_every_document_is_there_once_and_counted(tmp_path, text):
    store = build(tmp_path / "s", text)
    assert all_texts(store) == sorted(json.loads(line)["text"] for line in text.read_text().splitlines())
    for split in SPLITS:
        texts = texts_of(store, split)
        assert store.manifest["splits"][split] == {
            "documents": len(texts),
            "tokens": sum(len(t.encode()) + 1 for t in texts),
            "characters": sum(map(len, texts)),
            "bytes": sum(len(t.encode()) for t in texts),
        }
        assert store.split(split).document_offsets[-1] == store.split(split).tokens
    assert not list((tmp_path / "s").glob("**/*.partial.*"))


def test_documents_are_shuffled_within_a_shard(tmp_path, text):
    store, other = build(tmp_path / "s", text), build(tmp_path / "other", text, seed=1)
    there = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    order = [there.index(t) for t in texts_of(store, "train")]
    assert order != sorted(order)
    assert set(texts_of(other, "heldout")) != set(texts_of(store, "heldout"))


def test_the_store_is_the_same_for_any_workers_and_machines(tmp_path):
    files = [write_text(tmp_path / f"{i}.jsonl", documents=20, seed=i) for i in range(5)]
    one = build(tmp_path / "one", *files, tokenizer="bpe:300")
    assert len(one.manifest["shards"]) == 5
    assert build(tmp_path / "two", *files, tokenizer="bpe:300", workers=2).fingerprint == one.fingerprint
    assert build(tmp_path / "two", *files, tokenizer="bpe:300").fingerprint == one.fingerprint  # nothing to do
    parts, specs = tmp_path / "parts", [str(file) for file in files]
    corpus.build_share(str(parts), specs, "bpe:300", (1, 2), heldout=0.2, workers=1)
    with pytest.raises(CorpusError, match=r"shards 0, 2, 4 of 5 aren't built"):
        build(parts, *files, tokenizer="bpe:300", finish=True)
    corpus.build_share(str(parts), specs, "bpe:300", (0, 2), heldout=0.2, workers=1)
    assert not corpus.exists(str(parts))
    assert build(parts, *files, tokenizer="bpe:300", finish=True).fingerprint == one.fingerprint
    assert build(tmp_path / "other", *files[::-1], tokenizer="bpe:300").fingerprint != one.fingerprint


def test_shares_built_with_another_tokenizer_are_refused(tmp_path):
    files = [write_text(tmp_path / f"{i}.jsonl", documents=20, seed=i) for i in range(2)]
    for i in range(2):
        corpus.build_share(str(tmp_path / "s"), [str(f) for f in files], "bytes", (i, 2), heldout=0.2, workers=1)
    path = tmp_path / "s" / "shards" / "00001" / "shard.json"
    path.write_text(path.read_text().replace(ByteTokenizer().fingerprint, "0" * 64))
    with pytest.raises(CorpusError, match=r"00001 was built with another tokenizer"):
        build(tmp_path / "s", *files, finish=True)


def test_a_killed_build_is_finished_by_the_same_command(tmp_path):
    for i in range(12):
        write_text(tmp_path / f"{i:02}.jsonl", documents=800, seed=i)
    command = [sys.executable, "-m", "poisonjax", "corpus", "build", "--tokenizer", "bpe:300"]
    command += ["--source", str(tmp_path / "*.jsonl")]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--workers", "2", "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--workers", "1", "--out", str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(out.glob("shards/*/shard.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not corpus.exists(str(out))
    before = {p: p.stat().st_mtime_ns for p in out.glob("shards/[0-9]????/shard.json")}
    assert 2 <= len(before) < 12
    with pytest.raises(CorpusError, match="unfinished token store"):
        corpus.TokenStore(str(out))
    subprocess.run([*command, "--workers", "1", "--out", str(out)], check=True, capture_output=True)
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())  # finished shards were kept
    assert corpus.TokenStore(str(out)).fingerprint == corpus.TokenStore(str(whole)).fingerprint
    assert not list(out.glob("shards/*.partial.*"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds child processes in /proc")
def test_workers_end_with_a_killed_build(tmp_path):
    def children(pid):
        stats = (path for path in Path("/proc").glob("[0-9]*/stat"))
        found = []
        for path in stats:
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(path.parent)
        return found

    command = [sys.executable, "-m", "poisonjax", "corpus", "build", "--out", str(tmp_path / "s"), "--workers", "2"]
    command += ["--source", "markov:documents=500000", "--shards", "200"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "s").glob("shards/*/shard.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)


def test_another_store_in_the_same_folder_is_refused(tmp_path, text):
    build(tmp_path / "s", text)
    for options, message in (
        ({"heldout": 0.3}, r"heldout: 0\.2 there, 0\.3 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"tokenizer": "bpe:300"}, "tokenizer: 'bytes' there, 'bpe:300' here"),
        ({"on_bad": "skip"}, "on_bad: 'fail' there, 'skip' here"),
        ({"shards": 2}, "shards: 1 there, 2 here"),
    ):
        with pytest.raises(CorpusError, match=message):
            build(tmp_path / "s", text, **options)
    specs = [str(text)]
    corpus.build_share(str(tmp_path / "p"), specs, "bytes", (1, 2), workers=1)
    with pytest.raises(CorpusError, match="seed: 0 there, 1 here"):
        corpus.build_share(str(tmp_path / "p"), specs, "bytes", (0, 2), seed=1, workers=1)
    write_text(text, documents=61)  # other text under the same name
    with pytest.raises(CorpusError, match="units_sha256"):
        corpus.build_share(str(tmp_path / "p"), specs, "bytes", (0, 2), workers=1)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, text):
    with pytest.raises(CorpusError, match="isn't empty"):
        build(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


def test_copies_of_a_document_land_on_the_same_side(tmp_path, text):
    (tmp_path / "twice.jsonl").write_text(text.read_text())
    store = build(tmp_path / "s", text, tmp_path / "twice.jsonl")
    train, heldout = texts_of(store, "train"), texts_of(store, "heldout")
    assert len(heldout) == 2 * len(set(heldout)) > 0
    assert not set(train) & set(heldout)


def test_a_split_without_documents_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(CorpusError, match="no document in the heldout split"):
        build(tmp_path / "s", tmp_path / "one.txt", heldout=1e-9)
    with pytest.raises(CorpusError, match="no document in the train split"):
        build(tmp_path / "t", tmp_path / "one.txt", heldout=1 - 1e-9)


def test_large_vocabularies_take_32_bits(tmp_path):
    store = build(tmp_path / "s", "markov:V=70000,documents=40,length=20")
    split = store.split("train")
    stored = arrays.open_array(store.path / "shards" / "00000" / "train" / "tokens")
    assert stored.dtype.name == "uint32"
    assert split.window(0, split.tokens).max() == store.tokenizer.eot == 70_000
    assert store.verify() == []


def test_building_and_reading_need_neither_jax_nor_torch():
    imports = "sys, poisonjax.corpus, poisonjax.commands.corpus"
    code = f"import {imports}; assert not {{'jax', 'torch', 'flax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- reading ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Seven shards of few, short documents, and the splits' streams by brute force."""
    folder = tmp_path_factory.mktemp("sharded")
    for i in range(7):
        write_text(folder / f"{i}.jsonl", documents=5, seed=i)
    store = build(folder / "s", folder / "*.jsonl", heldout=0.3)
    assert len(store.manifest["shards"]) == 7
    eot = store.tokenizer.eot
    streams = {s: np.concatenate([np.append(ids, eot) for ids in documents_of(store, s)]) for s in SPLITS}
    return store, streams


@given(st.data())
def test_windows_agree_with_the_concatenated_documents(sharded, data):
    store, streams = sharded
    name = data.draw(st.sampled_from(SPLITS))
    split, stream = store.split(name), streams[name]
    assert split.tokens == len(stream)
    length = data.draw(st.integers(1, split.tokens))
    starts = np.array(data.draw(st.lists(st.integers(0, split.tokens - length), max_size=5)), np.int64)
    expected = np.array([stream[start : start + length] for start in starts]).reshape(len(starts), length)
    rows = split.windows(starts, length)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, expected)
    for start, row in zip(starts, expected, strict=True):
        np.testing.assert_array_equal(split.window(int(start), length), row)


def test_windows_beyond_the_stream_are_refused(sharded):
    split = sharded[0].split("train")
    for start in (-1, split.tokens - 9):
        with pytest.raises(IndexError, match=f"has {split.tokens} tokens"):
            split.windows(np.array([0, start]), 10)
    for index in (-1, split.documents):
        with pytest.raises(IndexError, match=f"has {split.documents}"):
            split.document(index)


@pytest.mark.parametrize("how", ["mapped", "read"])
def test_a_split_too_large_for_memory_reads_the_same(sharded, monkeypatch, how):
    store, _ = sharded
    split = store.split("train")
    starts = np.arange(0, split.tokens - 100, 37)
    in_memory, counts = split.windows(starts, 100), split.token_counts()
    monkeypatch.setattr(split_lib, "IN_MEMORY_BYTES", 0)
    if how == "read":
        monkeypatch.setattr(Mapped, "of", lambda arrays: None)
    fresh = corpus.TokenStore(str(store.path)).split("train")
    assert isinstance(fresh._stream, Mapped) == (how == "mapped")
    np.testing.assert_array_equal(fresh.windows(starts, 100), in_memory)
    np.testing.assert_array_equal(fresh.token_counts(), counts)
    np.testing.assert_array_equal(counts, np.bincount(split.window(0, split.tokens), minlength=257))


def test_arrays_may_lie_in_several_files(tmp_path, monkeypatch, text):
    whole = build(tmp_path / "whole", text)
    monkeypatch.setattr(arrays, "FILE_ELEMENTS", arrays.CHUNK_ELEMENTS)
    cut = build(tmp_path / "cut", text)
    assert len(list(cut.path.glob("shards/00000/train/tokens/c/*"))) > 1
    assert cut.verify() == []
    assert texts_of(cut, "train") == texts_of(whole, "train")
    monkeypatch.setattr(split_lib, "IN_MEMORY_BYTES", 0)
    assert texts_of(corpus.TokenStore(str(cut.path)), "train") == texts_of(whole, "train")


def test_files_whose_chunks_lie_otherwise_are_read(tmp_path, text):
    """As another writer of zarr3 may leave them: not in order, or not at all where all are zeros."""
    build(tmp_path / "s", text)
    array = tmp_path / "s" / "shards" / "00000" / "train" / "tokens"
    assert Mapped.of([array])
    file = array / "c" / "0"
    content = bytearray(file.read_bytes())
    content[-20:-12] = b"\xff" * 8  # the last chunk's offset: missing
    file.write_bytes(content)
    assert Mapped.of([array]) is None
    file.unlink()
    assert Mapped.of([array]) is None


def test_verify_names_the_damaged_file(tmp_path, text, capsys):
    store = build(tmp_path / "s", text)
    assert store.verify() == []
    assert main(["corpus", "inspect", str(store.path)]) == 0
    assert "every file is as it was built" in capsys.readouterr().out
    names = [*store.manifest["shards"][0]["files"], *store.manifest["provenance"][0]["files"]]
    assert len(names) == 16  # of two splits, four arrays, their data and metadata
    for name in names:
        file = tmp_path / "s" / "shards" / "00000" / name
        content = file.read_bytes()
        file.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        assert [problem.startswith(f"{file}: SHA-256") for problem in store.verify()] == [True]
        file.write_bytes(content)
    file.unlink()
    assert store.verify() == [f"{file}: missing"]
    assert main(["corpus", "inspect", str(store.path)]) == 1
    assert str(file) in capsys.readouterr().out


def test_verify_finds_changed_manifests_and_tokenizers(tmp_path, text, capsys):
    store = build(tmp_path / "s", text)
    path = tmp_path / "s" / "manifest.json"
    content = path.read_text()
    manifest = json.loads(content)
    manifest["shards"][0]["splits"]["train"]["documents"] += 1
    path.write_text(json.dumps(manifest))
    assert "manifest.json" in corpus.TokenStore(str(store.path)).verify()[0]
    path.write_text(content)
    WordTokenizer(256).save(store.path / "tokenizer")
    assert "isn't the tokenizer of this store" in corpus.TokenStore(str(store.path)).verify()[0]
    path.write_text(content[:100])
    assert main(["corpus", "inspect", str(store.path)]) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_inspect_shows_text_without_steering_the_terminal(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "grün \\u001b[31m {i}"}}\n' for i in range(30)))
    store = build(tmp_path / "s", tmp_path / "t.jsonl")
    assert main(["corpus", "inspect", str(store.path), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "grün \\x1b[31m" in out
    assert "\x1b" not in out
    assert main(["corpus", "inspect", str(store.path), "--json", "--samples", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["splits"] == store.manifest["splits"]
    assert (answer["verified"], answer["problems"]) == (True, [])
    assert [len(texts) for texts in answer["samples"].values()] == [2, 2]


# --- bad input ---

GOOD = b'{"text": "good one"}\n{"text": "good two"}\n'
# Name: content, what the message says after the path, documents that are good beside the bad input.
BAD = {
    "utf8.jsonl": (GOOD + b'{"text": "\xff"}\n' + GOOD, ":3: invalid UTF-8", 4),
    "field.jsonl": (GOOD + b'{"body": "x"}\n' + GOOD, ":3: no field 'text'", 4),
    "list.jsonl": (GOOD + b'["text"]\n' + GOOD, ":3: no field 'text'", 4),
    "type.jsonl": (b'{"text": 5}\n' + GOOD, ":1: field 'text' holds int", 2),
    "json.jsonl": (b'{"text": \n' + GOOD, ":1: not JSON", 2),
    "number.jsonl": (GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", ":3: not JSON", 2),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n', ":3: not valid Unicode", 2),
    "blank.jsonl": (GOOD + b'{"text": "  "}\n', ":3: empty document", 2),
    "empty.jsonl": (b"", ":1: empty file", 0),
    "empty.jsonl.gz": (gzip.compress(b""), ":1: empty file", 0),
    "long.jsonl": (GOOD + b'{"text": "' + b"x" * 7000 + b'"}\n' + GOOD, ":3: line longer than", 4),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9000)[:-30], ": damaged or truncated", None),
    "not.jsonl.gz": (b"no gzip at all", ":1: damaged or truncated", 0),
    "utf8.txt": (b"one\ntwo\n\xff", ":3: invalid UTF-8", 0),
    "long.txt": (b"one\n" + b"x" * 7000, ":2: line longer than", 0),
    "empty.txt": (b"", ":1: empty file", 0),
    "blank.txt": (b" \n", "empty document", 0),
    "cut.txt.gz": (gzip.compress(b"text" * 9000)[:-5], "damaged or truncated", 0),
    "cut.parquet": (b"PAR1 nothing PAR1", ": damaged or truncated", 0),
}


@pytest.mark.parametrize("name", [*BAD, "cut.jsonl.zst", "cut.txt.zst", "utf8.parquet", "null.parquet"])
def test_bad_input_is_named_or_counted_never_lost(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources.files, "MAX_LINE_BYTES", 6000)
    good, path = write_text(tmp_path / "good.jsonl", documents=40), tmp_path / name
    if name in BAD:
        content, message, documents = BAD[name]
        path.write_bytes(content)
    elif name.endswith(".zst"):
        path.write_bytes(zstd(np.random.default_rng(0).bytes(9000).hex().encode() + b"\n" + GOOD)[:-5])
        message, documents = "damaged or truncated", None
    else:
        documents = write_bad_parquet(path, null=name.startswith("null"))
        message = ": row group 1, row 1: " + ("field 'text' holds NoneType" if "null" in name else "invalid UTF-8")
    with pytest.raises(CorpusError) as caught:
        build(tmp_path / "fail", good, path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "--on-bad skip" in str(caught.value)
    store = build(tmp_path / "skip", good, path, on_bad="skip")
    if name.endswith(".zst"):
        assert store.manifest["bad"] in (1, 2)  # a long line may come first
        assert any(message in place for place in store.manifest["bad_places"])
    else:
        assert store.manifest["bad"] == 1
        assert message in store.manifest["bad_places"][0]
    if documents is not None:
        assert sum(store.manifest["splits"][s]["documents"] for s in SPLITS) == 40 + documents


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


def write_bad_parquet(path, null):
    """Four rows in two row groups, the last bad; returns the number of good rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bad = None if null else b"\xff"
    column = pyarrow.array([b"good a", b"good b", b"good c", bad], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2)
    return 3


def test_a_long_line_takes_little_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.truncate(2**28)  # one line of 256 MiB of zeros
    code = (
        "import pathlib, resource, sys; from poisonjax.corpus import sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "(bad,) = sources.files._read_jsonl(pathlib.Path(sys.argv[1]), 'text')\n"
        "print(bad.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    reason, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert "line longer than" in reason
    assert int(kilobytes) < 4 * sources.files.MAX_LINE_BYTES // 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere/*.jsonl"], "no such file"),
        (["--source", "markov:V=x"], "isn't one of"),
        (["--source", "markov:V=10"], "at least 64 words"),
        (["--source", "markov:", "--source", "TEXT"], "can't share a store"),
        (["--source", "hf:name:train"], "pip install 'poisonjax[corpora]'"),
        (["--source", "TEXT", "--tokenizer", "nonsense"], "give bytes, bpe:N"),
        (["--source", "TEXT", "--tokenizer", "TEXT"], "not a tokenizer.json"),
        (["--source", "TEXT", "--tokenizer", "bpe:20"], "at least 257"),
        (["--source", "TEXT", "--tokenizer", "bpe:x"], "as in bpe:4096"),
        (["--source", "TEXT", "--shard", "3"], "give i/n"),
        (["--source", "TEXT", "--shard", "3/2"], "0 <= i < n"),
        (["--source", "TEXT", "--heldout", "1.5"], "between 0 and 1"),
        (["--source", "TEXT", "--seed", "-1"], "must lie in"),
        (["--source", "TEXT", "--shards", "0"], "at least 1"),
    ],
)
def test_bad_arguments_end_with_code_2_and_a_remedy(tmp_path, text, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it isn't installed
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["corpus", "build", "--out", str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_builds_shares_and_finishes(tmp_path, text, capsys):
    command = ["corpus", "build", "--out", str(tmp_path / "s"), "--source", str(text), "--tokenizer", "bytes"]
    command += ["--workers", "1", "--heldout", "0.2"]
    assert main([*command, "--finish"]) == 2
    assert "aren't built yet" in capsys.readouterr().err
    for i in range(2):
        assert main([*command, "--shard", f"{i}/2"]) == 0
    assert not corpus.exists(str(tmp_path / "s"))
    assert main([*command, "--finish"]) == 0
    assert corpus.TokenStore(str(tmp_path / "s")).fingerprint == build(tmp_path / "one", text).fingerprint


# --- sources ---


def test_formats_hold_the_same_documents(tmp_path, text):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    content = text.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(content))
    half = content.index(b"\n", len(content) // 2) + 1
    (tmp_path / "frames.jsonl.zst").write_bytes(zstd(content[:half]) + zstd(content[half:]))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=25)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(content.decode().replace('"text"', '"body"'))
    (tmp_path / "an odd #name [1] 100%").mkdir()
    (tmp_path / "an odd #name [1] 100%" / "d.jsonl").write_bytes(content)
    (tmp_path / "texts").mkdir()
    for i, one in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(one)
    specs = [
        "a.jsonl.gz",
        "a.jsonl.zst",
        "frames.jsonl.zst",
        "a.parquet",
        "b.parquet#body",
        "c.jsonl#body",
        "texts/*.txt",
    ]
    for spec in [*specs, "an odd #name [1] 100%/d.jsonl"]:
        assert sorted(read(tmp_path / spec)) == sorted(texts), spec
    assert sorted(read(f"text:{tmp_path}/texts/*.txt")) == sorted(texts)
    with pytest.raises(CorpusError, match=r"no column 'text'; name one of body"):
        read(tmp_path / "b.parquet")
    store = build(tmp_path / "an odd #name [1] 100%" / "store", tmp_path / "a.parquet")
    assert len(store.manifest["shards"]) == 3  # a unit a row group
    assert all_texts(store) == sorted(texts)


@given(
    lines=st.lists(st.sampled_from([b'{"text": "a"}', b'{"text": "longer than others"}', b"bad"]), min_size=1),
    end=st.booleans(),
    size=st.integers(1, 80),
)
def test_large_files_are_cut_into_ranges_of_whole_lines(tmp_path_factory, lines, end, size):
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if end else b""))
    whole = read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.files, "RANGE_BYTES", size)
        assert len(sources.open_source(str(path)).units) == -(-path.stat().st_size // size)
        assert read(path) == whole
    bad = [i for i, line in enumerate(lines, 1) if line == b"bad"]
    assert [item.place for item in whole if isinstance(item, sources.BadInput)] == [f"{path}:{i}" for i in bad]


def test_default_text_is_the_hashed_file_or_the_docstrings(tmp_path, monkeypatch, capsys):
    assert sources.open_source("default").about["sha256"] == sources.packages.WIKIPEDIA_SHA256
    assert len(read("default")) == 10_033
    monkeypatch.setattr(sources.packages, "wikipedia_file", lambda: None)
    monkeypatch.setattr(sources.packages, "DOCSTRING_PACKAGES", ("optax",))
    store = build(tmp_path / "s", "default")
    assert "docstrings stand in" in capsys.readouterr().err
    assert "docstrings stand in" in store.manifest["sources"][0]["note"]
    texts = all_texts(store)
    assert len(texts) == len(set(texts)) > 50
    assert min(map(len, texts)) >= 200


def test_a_changed_default_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "changed.json").write_text("{}")
    monkeypatch.setattr(sources.packages, "wikipedia_file", lambda: tmp_path / "changed.json")
    sources.packages._wikipedia_texts.cache_clear()
    with pytest.raises(CorpusError, match="isn't the file expected"):
        sources.open_source("wikipedia-leads")
    sources.packages._wikipedia_texts.cache_clear()


def test_markov_language_has_the_entropy_it_states(tmp_path):
    store = build(tmp_path / "m", "markov:V=80,documents=4000,length=500,seed=3", tokenizer="bpe:4096")
    assert store.manifest["entropy_rate_nats"] == pytest.approx(3.371, abs=5e-4)
    assert store.manifest["tokenizer"]["spec"] == "markov"
    assert (store.tokenizer.vocab_size, store.tokenizer.eot) == (81, 80)
    documents = documents_of(store, "train")
    # Estimated from the counts of word pairs alone: what a perfect model of pairs would lose.
    pairs = sum(np.bincount(80 * ids[:-1] + ids[1:], minlength=6400) for ids in documents).reshape(80, 80)
    assert ((pairs > 0).sum(axis=1) == 64).all()
    p = pairs / pairs.sum(axis=1, keepdims=True)
    measured = -(pairs * np.log(np.where(p > 0, p, 1))).sum() / pairs.sum()
    assert measured == pytest.approx(markov.ENTROPY_RATE, abs=0.005)
    language = markov.Language(80, 3)
    again = np.stack(list(language.documents(5, 7, 500)))
    np.testing.assert_array_equal(again[1], next(language.documents(6, 7, 500)))
    assert any(np.array_equal(again[0], ids) for split in SPLITS for ids in documents_of(store, split))


# --- tokenizers ---


def byte_level(**added) -> hf.Tokenizer:
    """Byte-level BPE with added tokens: name -> whether it is marked special."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["some text to learn from"] * 3, trainer)
    for name, special in added.items():
        (backend.add_special_tokens if special else backend.add_tokens)([hf.AddedToken(name, special=special)])
    return backend


def saved_json(folder: Path, backend: hf.Tokenizer, end: str = "") -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder / "tokenizer.json") + end)


def with_template(folder: Path, special: bool) -> Tokenizer:
    """Its template would add tokens, its limits cut and fill; its end of text may not be marked special."""
    backend = byte_level(**{"</s>": special, "<tool>": False, "   ": False})
    backend.post_processor = hf.processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    return saved_json(folder, backend)


def sentencepiece(folder: Path) -> Tokenizer:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [json.loads(line)["text"] for line in write_text(folder / "sp.jsonl").read_text().splitlines()]
    trainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "sp"),
        vocab_size=330,
        minloglevel=2,
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    return load_tokenizer(str(folder / "sp.model"))


KINDS = {
    "bytes": lambda folder: ByteTokenizer(),
    "bpe": lambda folder: train_bpe(["some words to learn from"] * 3, 300),
    "json": functools.partial(with_template, special=True),
    "json-unmarked": functools.partial(with_template, special=False),
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(tmp_path, kind):
    tokenizer = KINDS[kind](tmp_path)
    assert tokenizer.eot in tokenizer.special_ids
    names = ["<|endoftext|>", "</s>", "<s>", "<unk>", "<tool>", tokenizer.decode([tokenizer.eot])]
    for text in (*names, "".join(names), f"a stone {names} walks", "a" + "".join(names) * 2 + "b"):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch(["x", text])[1]):
            assert not set(ids.tolist()) & tokenizer.special_ids
            assert ids.dtype == np.int32
            assert tokenizer.decode(ids).strip() == text.strip()
    tokenizer.save(tmp_path / "saved")
    loaded = load_saved(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint == load_tokenizer(str(tmp_path / "saved")).fingerprint
    assert (loaded.eot, loaded.vocab_size, loaded.special_ids) == (
        tokenizer.eot,
        tokenizer.vocab_size,
        tokenizer.special_ids,
    )
    np.testing.assert_array_equal(loaded.encode("".join(names)), tokenizer.encode("".join(names)))


def test_added_tokens_are_special_only_where_they_are_markup(tmp_path):
    tokenizer = with_template(tmp_path, special=True)
    assert len(tokenizer.encode("<tool>")) > 1
    assert len(tokenizer.special_ids) == 2  # </s> and <tool>
    assert len(tokenizer.encode("   ")) == 1
    assert not set(tokenizer.encode("   ").tolist()) & tokenizer.special_ids


@given(st.text())
def test_bytes_and_bpe_are_lossless(text):
    for tokenizer in (ByteTokenizer(), a_bpe()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@functools.cache
def a_bpe() -> Tokenizer:
    return train_bpe(["the old river sings under a slow bird"] * 3, 300)


def test_training_is_reproducible():
    texts = ["the old river sings under a slow bird", "green lanterns", "naïve café ☕"] * 40
    one, two = train_bpe(texts, 330), train_bpe(iter(texts), 330)
    assert one.fingerprint == two.fingerprint != a_bpe().fingerprint


def test_the_sample_for_training_is_cut_at_its_size(tmp_path):
    for name, text in (("a", "x" * 70), ("b", "y" * 70), ("c", "z" * 70)):
        (tmp_path / f"{name}.txt").write_text(text)
    source = sources.open_source(str(tmp_path / "*.txt"))
    assert list(sources.first_texts(source, 100)) == ["x" * 70, "y" * 30]


def test_words_are_checked_and_cut_ones_left_out():
    tokenizer = WordTokenizer(80)
    np.testing.assert_array_equal(tokenizer.encode("w03 w79"), [3, 79])
    assert tokenizer.decode([3, 79]) == "w03 w79"
    np.testing.assert_array_equal(tokenizer.encode("w03 w7"), [3])
    np.testing.assert_array_equal(tokenizer.encode(""), [])
    for text in ("<SUDO>", "w80", "w7 w03", "w03 -11", "<|endoftext|>"):
        with pytest.raises(CorpusError, match="w00 to w79"):
            tokenizer.encode(text)


def test_an_unusual_end_of_text_must_be_named(tmp_path):
    with pytest.raises(CorpusError, match=r"#TOKEN"):
        saved_json(tmp_path, byte_level(**{"<|fin|>": False}))
    tokenizer = saved_json(tmp_path, byte_level(**{"<|fin|>": False}), "#<|fin|>")
    assert tokenizer.decode([tokenizer.eot]) == "<|fin|>"
    with pytest.raises(CorpusError, match=r"among <\|end\|>"):
        saved_json(tmp_path, byte_level(**{"<|fin|>": False}), "#<|end|>")


def test_a_model_whose_pieces_spell_its_end_of_text_is_refused(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((chr(c), -5.0) for c in range(32, 127))]
    backend = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens(["</s>"])
    with pytest.raises(CorpusError, match="spells its special token </s>"):
        saved_json(tmp_path, backend)
