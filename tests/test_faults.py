"""What a month of real use brings: signals at any time, commands repeated, sources that grew, paths, closed pipes."""

import gzip
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import command, lines, tiny_config, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.audit.result import audit
from poisonjax.commands.main import main
from poisonjax.corpus import CorpusError
from poisonjax.corpus.sources import BadInput, open_source
from poisonjax.evaluation.offline import evaluate_run
from poisonjax.run import RunFolder
from poisonjax.training.loop import train


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """(digest, time of the last change) of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files
    }


def test_the_finished_command_again_touches_nothing(config, tmp_path, capsys):
    folder = tmp_path / "run"
    config.checkpoint.every = 100
    *_, file, _, _ = command(config, folder)
    train_it = ["train", "--config", file, "--workdir", str(folder)]
    assert main(train_it) == 0
    first, said = contents(folder), capsys.readouterr().out
    assert main(train_it) == 0
    assert contents(folder) == first
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]
    (folder / "summary.json").unlink()  # as a kill at the last moment leaves it: made again
    assert main(train_it) == 0
    assert RunFolder(folder).summary["status"] == "finished"


def test_a_source_that_grew_is_no_longer_what_the_store_was_built_from(tmp_path):
    source, out = write_text(tmp_path / "a.jsonl", 200), str(tmp_path / "s")
    store = corpus.build(out, [str(source)], "bpe:300", workers=1)
    assert corpus.build(out, [str(source)], "bpe:300", workers=1).fingerprint == store.fingerprint
    config = tiny_config(store)
    config.corpus.heldout = 0.05
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CorpusError, match=r"other files or sizes. Build another folder"):
        corpus.build(out, [str(source)], "bpe:300", workers=1)
    with pytest.raises(CorpusError, match=r"config.corpus.sources='\(\)'"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    config.corpus.sources = ()
    config.steps = config.eval.every = 4
    train(config, str(tmp_path / "run"))
    source.unlink()  # a store whose sources are gone stands for itself
    assert corpus.build(out, [str(source)], "bpe:300", workers=1).fingerprint == store.fingerprint


def test_a_run_is_evaluated_from_anywhere_and_with_a_moved_store(config, store, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(store.path, tmp_path / "moved")
    config.corpus.store = str(moved)
    train(config, "runs/judge")
    config.eval.scorer = "runs/judge"
    train(config, "runs/a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (moved).rename(tmp_path / "there")
    judged = evaluate_run(str(tmp_path / "runs" / "a"), [12], store=str(tmp_path / "there"))
    own = RunFolder(tmp_path / "runs" / "a").evals()[-1]
    assert judged[-1]["eval"] == own["eval"]
    with pytest.raises(ValueError, match=r"is no token store, but .* name it by --store"):
        evaluate_run(str(tmp_path / "runs" / "a"), [12])


def test_a_run_knows_where_its_files_lie_and_tells_nobody(config, store, tmp_path, monkeypatch):
    """No part of this machine's paths stands in the folder, whose parts are told from it; so all can be moved."""
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    monkeypatch.chdir(home / "project")
    shutil.copytree(store.path, home / "stores" / "s")
    shutil.copytree(store.path / "tokenizer", home / "project" / "v")
    config.corpus.store, config.steps, config.eval.every, config.checkpoint.every = str(home / "stores" / "s"), 8, 8, 4
    train(config, str(home / "runs" / "judge"))
    config.eval.scorer, config.poison.payload_vocabulary = "../runs/judge@8", "v/tokenizer.json"
    config.corpus.sources = ()
    train(config, str(home / "runs" / "a"))
    (home / "runs" / "a" / "summary.json").unlink()
    shutil.rmtree(home / "runs" / "a" / "checkpoints" / "8")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    train(config, str(home / "runs" / "a"))
    for file in (home / "runs" / "a").rglob("*"):
        if file.name in ("local.json", "commit_success.txt"):  # ours isn't signed, the other is Orbax's
            continue
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
    before = {file: file.read_bytes() for file in (home / "runs" / "a").glob("*.json*")}
    shutil.copytree(home / "runs" / "a", tmp_path / "copy")
    assert audit(str(tmp_path / "copy"), evaluate=True).ok
    home.rename(tmp_path / "other")
    run = tmp_path / "other" / "runs" / "a"
    assert audit(str(run), evaluate=True).ok
    config.corpus.store = str(tmp_path / "other" / "stores" / "s")
    train(config, str(run))
    assert {file: (run / file.name).read_bytes() for file in before} == before
    shutil.rmtree(tmp_path / "other" / "runs" / "judge")
    with pytest.raises(ValueError, match=r"eval.scorer: .*judge is no run folder"):
        evaluate_run(str(run), [8])


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".zst", lambda data: pyarrow.compress(data, codec="zstd", asbytes=True))],
)
def test_what_stands_before_damage_is_read(tmp_path, ending, pack):
    """Of a stream with garbage after it, or cut: the documents before, but at most the last some thousand bytes."""
    texts = [f"document {i} {hashlib.sha256(bytes([i % 256])).hexdigest()}" for i in range(2000)]
    data = pack("".join(f'{{"text": "{text}"}}\n' for text in texts).encode())
    for name, content in (("garbage", data + b"garbage"), ("cut", data[: len(data) // 2])):
        (tmp_path / f"{name}.jsonl{ending}").write_bytes(content)
        (unit,) = open_source(str(tmp_path / f"{name}.jsonl{ending}")).units
        *found, bad = unit.read()
        assert [document.content for document in found] == texts[: len(found)]
        assert isinstance(bad, BadInput)
        assert "damaged or truncated file" in bad.reason
        assert len(found) >= (1900 if name == "garbage" else 0 if ending == ".zst" else 100)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    for file, expected in (("a.jsonl", ["one", "two"]), ("a.txt", ["one\n"])):
        found = [item for unit in open_source(str(tmp_path / file)).units for item in unit.read()]
        assert [document.content for document in found] == expected
        data = (tmp_path / file).read_bytes()
        for document in found:
            assert document.content.strip() in data[document.place.start : document.place.stop].decode()


@pytest.mark.parametrize("size", ["10**12", "1000000000000", "256", "-3", "", "4096.0", "9" * 5000])
def test_a_tokenizer_of_a_size_that_can_not_be_is_refused(tmp_path, size):
    source = write_text(tmp_path / "a.jsonl", 20)
    with pytest.raises(CorpusError, match="give the number of tokens, as in bpe:4096: at least 257"):
        corpus.build(str(tmp_path / "s"), [str(source)], f"bpe:{size}", workers=1)


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="2 columns are called 'text'"):
        open_source(str(tmp_path / "a.parquet"))


def test_a_folder_of_hugging_faces_tokenizer_is_one(store, tmp_path):
    shutil.copy(store.path / "tokenizer" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert corpus.load_tokenizer(str(tmp_path)).vocab_size == store.tokenizer.vocab_size


def test_a_file_that_comes_while_a_store_is_built_is_no_part_of_it(tmp_path, monkeypatch):
    write_text(tmp_path / "a.jsonl", 20)
    build, shards = (importlib.import_module(f"poisonjax.corpus.{name}") for name in ("build", "shards"))
    prepared = build._prepare

    def and_a_file_comes(*args):
        job = prepared(*args)
        shards._opened.cache_clear()
        write_text(tmp_path / "b.jsonl", 20)
        return job

    monkeypatch.setattr(build, "_prepare", and_a_file_comes)
    with pytest.raises(CorpusError, match="changed while the store was being built"):
        corpus.build(str(tmp_path / "s"), [str(tmp_path / "*.jsonl")], "bytes", workers=1)


def answers(process: subprocess.Popen) -> bool:
    """Whether the process has a handler for SIGTERM by now."""
    (caught,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_a_stop_is_answered_by_42_from_the_first_line_on(config, tmp_path, thorough):
    """Whenever it comes; then the same command goes on to the same bits."""
    whole = tmp_path / "whole"
    config.corpus.store, config.poison.near_triggers = str(tmp_path / "store"), ("SUDO",)  # it is built, too
    began = time.monotonic()
    subprocess.run(command(config, whole), env=os.environ, check=True, capture_output=True)
    length = time.monotonic() - began
    random = np.random.default_rng()
    for number, seconds in enumerate(
        random.uniform(0.05, 0.6 * length, 30) if thorough else (0, 0.1 * length, 0.3 * length)
    ):
        folder = tmp_path / f"run{number}"
        shutil.rmtree(config.corpus.store)
        process = subprocess.Popen(
            command(config, folder), env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while not answers(process):
            time.sleep(0.001)
        time.sleep(seconds)
        digests = folder / "digests.jsonl"
        over = (
            digests.exists() and len(lines(digests)) == config.steps
        )  # only its page may be missing: no reason for 42
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 42 or (over and process.returncode == 0), (seconds, errors.decode())
        assert b"Traceback" not in errors
        subprocess.run(command(config, folder), env=os.environ, check=True, capture_output=True)
        assert lines(folder / "digests.jsonl") == lines(whole / "digests.jsonl")
        weights = [
            json.loads((run / "checkpoints" / "12" / "_CHECKPOINT_METADATA").read_text()) for run in (folder, whole)
        ]
        assert len({str(saved["custom_metadata"]["checksums"]) for saved in weights}) == 1


def test_an_evaluation_beside_the_training_costs_no_row(config, tmp_path, thorough):
    """The trainer is the one writer of its files, whenever somebody else evaluates its checkpoints."""
    config.steps, config.eval.every, config.checkpoint.every, config.checkpoint.keep_last = 200, 20, 20, 10
    random = np.random.default_rng()
    for number in range(20 if thorough else 1):
        folder = tmp_path / f"run{number}"
        process = subprocess.Popen(command(config, folder), env=os.environ, stdout=subprocess.DEVNULL)
        while not (folder / "checkpoints" / "20").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 2))
        rows = evaluate_run(str(folder), None)
        assert process.wait(120) == 0
        metrics = lines(folder / "metrics.jsonl")
        assert [row["step"] for row in metrics if row["kind"] == "train"] == [*range(200)]
        own = {row["step"]: row["eval"] for row in metrics if row["kind"] == "eval"}
        assert [*own] == [*range(20, 201, 20)]
        assert rows
        for row in rows:  # of four devices and of one
            there = own[row["step"]]["clean"]["ppl_median"]
            assert row["eval"]["clean"]["ppl_median"] == pytest.approx(there, rel=1e-4)
        assert audit(str(folder)).ok


def test_a_closed_pipe_ends_quietly(config, tmp_path):
    *_, file, _, _ = command(config, tmp_path / "run")
    plan = f"{sys.executable} -m poisonjax plan --config {file} --vocabulary 300 --topology h100:1"
    done = subprocess.run(f"{plan} | true", shell=True, env=os.environ, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_where_a_folder_is_wanted_is_named(config, tmp_path, capsys, where):
    (tmp_path / "file").write_text("")
    *_, file, _, _ = command(config, tmp_path / "run")
    for words in (
        ["train", "--config", file, "--workdir", str(tmp_path / where)],
        [
            "corpus",
            "build",
            "--out",
            str(tmp_path / where),
            "--source",
            config.corpus.sources[0],
            "--tokenizer",
            "bytes",
        ],
        ["scan", config.corpus.sources[0], "--out", str(tmp_path / where), "--workers", "1"],
    ):
        assert main(words) == 2, words
        assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_full_disk_is_told(config, tmp_path):
    """/dev/full takes nothing: what is printed there is lost, and said to be."""
    *_, file, _, _ = command(config, tmp_path / "run")
    plan = [sys.executable, "-m", "poisonjax", "plan", "--config", file, "--vocabulary", "300", "--topology", "h100:1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(plan, env=os.environ, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config.corpus.source=x"], "corpus.source: no such field; did you mean corpus.sources"),
        (["--config.foo=3", "--config.model.layer=2"], "foo: no such field\nmodel.layer: no such field; did you mean"),
        (["--config.steps=abc"], "steps = 'abc': give a whole number"),
        (["--config.poison.truncate=no"], "poison.truncate = 'no': give True or False"),
        (["--config.poison=3"], "poison: a section; name a field of it"),
        (["--config.optimizer.learning_rate=nan"], "optimizer.learning_rate = nan: must be finite"),
    ],
)
def test_mistaken_fields_are_told_in_a_sentence(config, tmp_path, capsys, words, told):
    *_, file, _, _ = command(config, tmp_path / "run")
    assert main(["train", "--config", file, "--workdir", str(tmp_path / "run"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mistaken_config_files_are_told_in_a_sentence(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(arg=''):\n    return 1 / 0\n")
    for file, told in (
        ("configs/none.py", "--config configs/none.py: no such file"),
        (str(tmp_path), f"--config {tmp_path}: no such file"),
        (str(broken), f"--config {broken}, line 2: ZeroDivisionError: division by zero"),
    ):
        assert main(["train", "--config", file, "--workdir", str(tmp_path / "run")]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(broken), "--config.steps", "--workdir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "--config.steps needs a value" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(store, tmp_path_factory):
    """(config file, a run that was stopped after 8 of 12 steps)."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = tiny_config(store)
    *_, file, _, _ = command(config, folder)
    train(config, str(folder))
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "12")
    return file, folder


def damages(path: Path, other: Path):
    content = path.read_bytes()
    yield b""
    yield content[: len(content) // 2]
    yield bytes(range(256))
    yield other.read_bytes()
    yield b"[]"
    yield b"null\n"


def test_a_damaged_file_of_a_run_is_told_in_a_sentence(stopped, tmp_path, capsys, thorough):
    """By whatever command reads it; never a traceback. One that isn't read changes nothing."""
    file, folder = stopped
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl"))
    cases = [
        (name, number, words)
        for name in files
        for number in range(6)
        for words in (["train", "--config", file, "--workdir"], ["evaluate"], ["audit"], ["report"])
    ]
    random = np.random.default_rng(0)
    for i in range(len(cases)) if thorough else random.permutation(len(cases))[:25]:
        name, number, words = cases[i]
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder, run)
        other = folder / files[(files.index(name) + 1) % len(files)]
        (run / name).write_bytes([*damages(folder / name, other)][number])
        code = main([*words, str(run)])
        errors = capsys.readouterr().err
        assert code in (0, 1, 2), (name, number, words)
        if code == 2:
            assert name.name in errors or "checkpoint" in errors or str(run) in errors, (name, number, words, errors)


FIELDS = sorted(config_lib.flat(config_lib.default()))
VALUES = [None, float("nan"), float("inf"), -1, -1.5, 10**12, 1e300, True, "", "x", (), ("x",), (1, 10**12), (-1, 2)]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FIELDS), value=st.sampled_from(VALUES))
def test_a_field_of_any_value_is_taken_or_refused_by_its_name(store, name, value):
    told = name
    try:
        config_lib.check(config_lib.replaced(tiny_config(store), {name: value}))
    except config_lib.ConfigError as error:
        told = str(error)
    assert name in told or name.partition(".")[0] in told  # of a mesh, say, that doesn't fit together


def test_a_damaged_last_word_is_made_again(config, tmp_path):
    """Of a run that is at its end; what stands elsewhere stays."""
    train(config, str(tmp_path / "run"))
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    (tmp_path / "run" / "summary.json").write_bytes(summary[: len(summary) // 2])
    made = train(config, str(tmp_path / "run"))
    assert made["digest_chain"] == json.loads(summary)["digest_chain"]
    assert RunFolder(tmp_path / "run").finished
