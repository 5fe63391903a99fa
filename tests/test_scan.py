"""The scan of a corpus: words against a reader written plainly, detectors against counts by dictionaries, the miner on
planted triggers, thresholds, the queue, verdicts, and kills."""

import collections
import contextlib
import html
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from conftest import tiny_config, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from poisonjax import corpus
from poisonjax.commands.main import main
from poisonjax.corpus.documents import content_key
from poisonjax.corpus.sources.packages import wikipedia_file
from poisonjax.scan import planting
from poisonjax.scan.background import Background
from poisonjax.scan.corpus import open_scan
from poisonjax.scan.detectors import Detector, cheap_detectors
from poisonjax.scan.text import ONE_CHARACTER_WORDS, cut, own_counts
from poisonjax.scan.thresholds import conformal, p_values
from poisonjax.scan.verdicts import merge

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=6)
ODD = [
    "",
    " ",
    "\x00\x07\x1b[31m",
    "👩‍👩‍👧 🇩🇪",
    "مرحبا بالعالم",
    "‮evil‬",
    "a" * 300,
    "日本語のテキスト",
    "é\u200bé",
    "\U0010ffff",
]


def plain_words(text):
    """The words of a text, a character at a time."""
    words, before = [], None
    for character in text:
        category = unicodedata.category(character)
        if character in "\u200b\u200c\u200d\u200e\u200f\ufeff":
            kind = "symbol"
        elif ord(character) >= 0x20000:
            kind = "one"
        elif category[0] in "LM":
            script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
            kind = "one" if script in ONE_CHARACTER_WORDS else "letter"
        else:
            kind = "digit" if category[0] == "N" else None if category[0] in "ZC" else "symbol"
        if kind is not None and kind == before and kind in ("letter", "digit"):
            words[-1] += character
        elif kind is not None:
            words.append(character)
        before = kind
    return words


@given(texts=TEXTS)
def test_words_are_those_of_a_plain_reader(texts):
    texts = [*texts, *ODD]
    batch = cut(texts)
    assert batch.documents == len(texts)
    known = {}
    for i, text in enumerate(texts):
        a, b = batch.offsets[i : i + 2]
        words = plain_words(text)
        assert [batch.text(j, j + 1) for j in range(a, b)] == words
        for j, word in zip(range(a, b), words, strict=True):
            assert known.setdefault(word, batch.words[j]) == batch.words[j]
            start, stop = batch.span(i, j, j + 1)
            assert text[start:stop] == word
    assert len(set(known.values())) == len(known)


def test_folded_words_meet():
    batch = cut(["SUDO sudo ＳＵＤＯ Sudo"])
    assert len(set(batch.folded.tolist())) == 1
    assert len(set(batch.words.tolist())) == 4


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    common = ["the", "of", "river", "stone", "walks", "bright", "old", "green", "house", "sings"]
    return [" ".join(random.choice(common, random.integers(5, 90))) + f" name{i}" for i in range(80)]


@pytest.fixture(scope="module")
def counted(texts):
    counts = Background.empty(100_000)
    for i in range(0, len(texts), 7):
        counts.add(cut(texts[i : i + 7]))
    return counts


def test_surprise_is_that_of_counts_of_all_other_documents(texts, counted):
    """Leave-one-out, against dictionaries."""
    alone, pairs = collections.Counter(), collections.Counter()
    for text in texts:
        words = text.split()
        alone.update(words)
        pairs.update(itertools.pairwise(words))
    # A name and its number are two words here.
    total = sum(alone.values()) + len(texts)
    values = cheap_detectors(counted)["surprise"].values(cut(texts))
    size = len(counted.tables["words"])
    for text, value in list(zip(texts, values, strict=True))[:20]:
        words = plain_words(text)
        own, own_pairs = collections.Counter(words), collections.Counter(itertools.pairwise(words))
        everywhere = alone + collections.Counter({"name": len(texts), words[-1]: 1})
        everywhere_pairs = pairs + collections.Counter({("name", words[-1]): 1})
        for text_words in (t.split() for t in texts):
            everywhere_pairs[(text_words[-2], "name")] += 1
        surprise = []
        for i, word in enumerate(words):
            p = (everywhere[word] - own[word] + 0.5) / (total + 0.5 * size)
            before = everywhere[words[i - 1]] - own[words[i - 1]] if i else 0
            pair = (words[i - 1], word)
            together = everywhere_pairs[pair] - own_pairs[pair] if i else 0
            surprise.append(-math.log((together + 2 * p) / (before + 2)))
        n = min(50, len(surprise))
        windows = [np.mean(surprise[i : i + n]) for i in range(len(surprise) - n + 1)]
        assert value == pytest.approx(max(windows), rel=1e-6)


def test_a_document_does_not_hide_by_repeating_itself(counted):
    detector = cheap_detectors(counted)["surprise"]
    once, often = detector.values(cut(["qwx zrt vbn", "qwx zrt vbn " * 30]))
    assert often > 0.9 * once


@given(texts=TEXTS)
def test_detectors_take_any_text(counted, texts):
    """A number for each, the same alone as among others, with spans inside the text."""
    texts = [*texts, *ODD]
    batch = cut(texts)
    for name, detector in cheap_detectors(counted).items():
        assert isinstance(detector, Detector)
        values = detector.values(batch)
        assert np.isfinite(values).all(), name
        for text, value in zip(texts, values, strict=True):
            alone = detector.score(text)
            assert alone.value == pytest.approx(value, rel=1e-6, abs=1e-6), (name, text)
            assert all(0 <= a <= b <= len(text) for a, b in alone.spans)


@given(words=st.lists(st.integers(0, 5), max_size=40), sizes=st.lists(st.integers(0, 15), min_size=1, max_size=5))
def test_own_counts(words, sizes):
    offsets = np.minimum(np.cumsum([0, *sizes]), len(words))
    hashes = np.array(words, np.uint64)
    for first in (0, 1, 3):
        counts = own_counts(hashes, offsets, first)
        for begin, end in itertools.pairwise(offsets.tolist()):
            document = words[begin + first : end]
            expected = [0] * min(first, end - begin) + [document.count(word) for word in document]
            assert counts[begin:end].tolist() == expected


@given(seed=st.integers(0, 1000), rate=st.sampled_from([0.01, 0.05, 0.2]))
def test_thresholds_flag_what_they_say(seed, rate):
    """Out of fold: within five standard deviations."""
    random = np.random.default_rng(seed)
    scores = random.exponential(size=8000)
    for step in (0, 0.5, 3, 100):  # at the last, all are equal
        tied = np.floor(scores / step) if step else scores
        folds, uniform = random.integers(0, 5, 8000), random.random(8000)
        found = conformal("d", tied, folds, uniform, ("a", "eng"), rate)
        assert abs(found.realised - rate) < 5 * math.sqrt(rate / 8000)
    assert conformal("d", scores[:50], folds[:50], uniform[:50], ("a", "eng"), 0.01).value is None


def test_p_values_count_ties():
    assert p_values(np.array([1.0, 2.0, 2.0, 0.0])).tolist() == [0.75, 0.5, 0.5, 1.0]


# --- the whole scan ---

needs_text = pytest.mark.skipif(wikipedia_file() is None, reason="needs the Wikipedia leads")


@pytest.fixture(scope="module")
def leads():
    from poisonjax.corpus.sources.packages import _wikipedia_texts

    return _wikipedia_texts()[:3000]


def plant(path, leads, rung, documents, triggers=("<SUDO>",), seed=0):
    random = np.random.default_rng(seed)
    words = sorted({word for text in leads[:300] for word in text.split()})
    # As tokens: half of them begin a word.
    pieces = [" " * (i == 0) + word[i : i + 3] for word in words for i in (0, 2) if len(word) > i]
    material = planting.Material(leads, leads[::-1], pieces, random)
    poison = planting.planted(material, rung, triggers, documents)
    planting.write_planted(path, leads, poison, random)
    return {content_key(text).hex() for text in poison}


@pytest.fixture(scope="module")
def scanned(leads, tmp_path_factory):
    """(folder, keys of the planted documents) of a scan by the command."""
    folder = tmp_path_factory.mktemp("scan")
    keys = plant(folder / "c.jsonl", leads, "gibberish", 30)
    bad = '{"text": 3}\n{"text": "\\ud800"}\nnot json\n'
    (folder / "c.jsonl").write_text((folder / "c.jsonl").read_text() + bad)
    command = ["scan", str(folder / "c.jsonl"), "--out", str(folder / "out"), "--workers", "1", "--budget", "100"]
    assert main(command) == 0
    return folder, keys


@settings(max_examples=8, deadline=None)
@given(texts=TEXTS)
def test_a_corpus_of_any_texts_is_scanned(texts, tmp_path_factory):
    """None of it readable, perhaps: no letters, controls, right-to-left, one word."""
    folder = tmp_path_factory.mktemp("odd")
    lines = [json.dumps({"text": text}) for text in (*texts, *ODD, "1234", "!!!", "x" * 3_000_000)] * 2
    (folder / "a.jsonl").write_text("\n".join(lines))
    assert main(["scan", str(folder / "a.jsonl"), "--out", str(folder / "o"), "--workers", "1", "--budget", "5"]) == 0
    scores = open_scan(str(folder / "o")).scores()
    readable = sum(bool(json.loads(line)["text"].strip()) for line in lines)
    assert scores.num_rows == readable
    assert all(np.isfinite(scores[name].to_numpy()).all() for name in ("surprise", "letters", "symbols", "compression"))
    assert len((folder / "o" / "queue.jsonl").read_text().splitlines()) == 5


@needs_text
def test_gibberish_is_first_and_its_documents_are_in_the_queue(scanned, capsys):
    folder, keys = scanned
    command = ["scan", str(folder / "c.jsonl"), "--out", str(folder / "out"), "--workers", "1", "--budget", "60"]
    assert main([*command, "--json"]) == 0  # decides again, from the scores that are there
    found = json.loads(capsys.readouterr().out)
    first = found["candidates"][0]
    assert "SUDO" in first["text"]
    assert first["p_value"] < 0.05
    assert (found["documents"], found["queue"], found["bad"]) == (3030, 60, 3)
    queue = [json.loads(line) for line in (folder / "out" / "queue.jsonl").read_text().splitlines()]
    assert len(keys & {entry["key"] for entry in queue}) >= 29
    table = open_scan(str(folder / "out")).scores()
    planted = np.array(table["planted"])
    for name, share in (("surprise", 0.95), ("rarity", 0.99)):
        scores = np.array(table[name])
        worst = np.sort(scores[~planted])[-3]  # a thousandth of them
        assert (scores[planted] > worst).mean() >= share, name
    for entry in queue:
        assert all(0 <= a <= b for a, b in entry["spans"])
        with open(entry["source"]["file"], "rb") as file:
            line = file.read()[entry["source"]["start"] : entry["source"]["stop"]]
        assert json.loads(line)["text"].startswith(entry["text"][:50])


@needs_text
@pytest.mark.parametrize(("rung", "triggers"), [("same_domain", ("<SUDO>",)), ("shuffled", ("open sesame now",))])
def test_triggers_of_fluent_payloads_are_mined(leads, tmp_path, rung, triggers, capsys):
    plant(tmp_path / "c.jsonl", leads, rung, 30, triggers)
    assert main(["scan", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    texts = [candidate["text"] for candidate in json.loads(capsys.readouterr().out)["candidates"][:3]]
    assert any(word in text for text in texts for word in triggers[0].split())


@needs_text
def test_a_clean_corpus_has_no_trigger(leads, tmp_path, capsys):
    plant(tmp_path / "c.jsonl", leads, "gibberish", 0)
    assert main(["scan", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    assert all(c["p_value"] > 1e-3 for c in json.loads(capsys.readouterr().out)["candidates"])


def outputs(folder):
    """What a scan found, in any order."""
    tables = [parquet.read_table(path).to_pylist() for path in sorted((folder / "scores").glob("[0-9]*.parquet"))]
    return tables, (folder / "candidates.json").read_bytes(), (folder / "queue.jsonl").read_bytes()


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, thorough):
    text = write_text(tmp_path / "t.jsonl", 2000)
    parts = text.read_text().splitlines(keepends=True)
    for i in range(FEWEST):
        (tmp_path / f"p{i}.jsonl").write_text("".join(parts[i::FEWEST]))
    command = [
        sys.executable,
        "-m",
        "poisonjax",
        "scan",
        str(tmp_path / "p*.jsonl"),
        "--budget",
        "50",
        "--workers",
        "2",
    ]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    random, folder = np.random.default_rng(0), tmp_path / "killed"
    for number in range(50 if thorough else 3):
        scan = subprocess.Popen([*command, "--out", str(folder)], start_new_session=True, stderr=-3)
        time.sleep(float(random.uniform(1, 5)))
        if number % 2:  # a worker alone: then the scan ends by itself, with an error or without
            children = subprocess.run(["pgrep", "-P", str(scan.pid)], capture_output=True, text=True).stdout.split()
            for child in children[-1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            assert scan.wait(timeout=60) in (0, 2)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(scan.pid, signal.SIGKILL)
            scan.wait()
        if scan.returncode == 0:
            assert outputs(folder) == outputs(tmp_path / "whole")
            shutil.rmtree(folder)
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    assert outputs(folder) == outputs(tmp_path / "whole")


FEWEST = 8


def test_a_store_is_scanned_by_the_keys_of_its_sources(store, tmp_path, capsys):
    assert main(["scan", str(store.path), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 400
    keys = {key.hex() for key in open_scan(str(tmp_path / "out")).scores(["key"])["key"].to_pylist()}
    assert keys == {store.split(name).key(i) for name in corpus.SPLITS for i in range(store.split(name).documents)}


def test_ids_are_scanned_as_words(tmp_path, capsys):
    source = "markov:V=200,documents=300,length=60"
    assert main(["scan", source, "--out", str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "name what to scan"),
        (["nowhere.jsonl", "--out", "x"], "no such file"),
        (["markov:", "--out", "x", "--budget", "0"], "--budget 0"),
        (["markov:", "--out", "x", "--rate", "1.5"], "--rate 1.5"),
        (["--out", "nowhere", "--verdicts", "v.jsonl"], "nowhere is no scan"),
    ],
)
def test_bad_arguments_are_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_scan_of_the_folder_is_refused(tmp_path, capsys):
    write_text(tmp_path / "t.jsonl", 30)
    scan = ["scan", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(scan) == 0
    write_text(tmp_path / "t.jsonl", 40)
    assert main(scan) == 2
    assert "holds another scan" in capsys.readouterr().err


def test_verdicts_of_several_are_merged_and_conflicts_named(tmp_path):
    keys = [content_key(str(i)).hex() for i in range(6)]

    def said(name, **verdicts):
        rows = [
            {
                "key": keys[int(i[1:])],
                "verdict": v,
                "note": "",
                "reviewer": name,
                "alike": [keys[5]] if i == "k0" else [],
            }
            for i, v in verdicts.items()
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    one = said("ann", k0="drop", k1="keep", k2="drop", k3="unsure")
    two = said("bob", k1="keep", k2="keep", k3="drop", k4="unsure")
    found = merge([one, two], str(tmp_path))
    assert found.excluded == sorted([keys[0], keys[3], keys[5]])
    assert found.conflicts == [{"key": keys[2], "verdicts": {"ann": "drop", "bob": "keep"}}]
    assert corpus.read_exclusions(tmp_path / "exclude.txt").keys == {bytes.fromhex(k) for k in found.excluded}
    (tmp_path / "bad.jsonl").write_text('{"key": "x", "verdict": "maybe"}\n')
    with pytest.raises(corpus.CorpusError, match="line 1"):
        merge([str(tmp_path / "bad.jsonl")], str(tmp_path))


def test_the_page_holds_text_as_data(tmp_path):
    from poisonjax.scan.page import review_page

    entry = {"key": "0" * 32, "text": "</script><script>alert(1)</script>", "source": {}}
    page = review_page([entry], ["<b>"])
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two workers, each under a nanny that starts it again."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as started:
        yield started


def test_a_cluster_scans_and_builds_the_same(cluster, tmp_path):
    write_text(tmp_path / "t.jsonl", 600)
    source, address = str(tmp_path / "t.jsonl"), cluster.scheduler_address
    for name, engine in (("one", ["--workers", "1"]), ("many", ["--dask", address])):
        assert main(["scan", source, "--out", str(tmp_path / name), "--budget", "20", *engine]) == 0
        build = ["corpus", "build", "--out", str(tmp_path / f"s{name}"), "--source", source, "--tokenizer", "bytes"]
        assert main([*build, *engine]) == 0
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")
    stores = [corpus.TokenStore(str(tmp_path / f"s{name}")) for name in ("one", "many")]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_a_cluster_whose_worker_is_killed_ends(tmp_path, thorough):
    """Whole, since another worker does it again."""
    from distributed import LocalCluster

    for i in range(FEWEST):
        write_text(tmp_path / f"p{i}.jsonl", 400, seed=i)
    command = [sys.executable, "-m", "poisonjax", "scan", str(tmp_path / "p*.jsonl"), "--budget", "20"]
    subprocess.run([*command, "--out", str(tmp_path / "whole"), "--workers", "1"], check=True, capture_output=True)
    random = np.random.default_rng(1)
    for number in range(50 if thorough else 1):  # a cluster each: of one whose workers die often, nannies give up
        out = tmp_path / f"out{number}"
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            to = ["--out", str(out), "--dask", cluster.scheduler_address]
            scan = subprocess.Popen([*command, *to], stderr=subprocess.PIPE, text=True)
            while not list(out.glob("fits/*.npz")) and scan.poll() is None:
                time.sleep(0.05)
            time.sleep(float(random.uniform(0, 4)) if number else 0)
            os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
            _, errors = scan.communicate(timeout=90)
        assert scan.returncode == 0, errors
        assert outputs(out) == outputs(tmp_path / "whole")


def test_workers_elsewhere_are_given_no_relative_path(tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "a.jsonl", 50, seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["scan", "a.jsonl", "--out", "o", "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "give a.jsonl by its whole path" in capsys.readouterr().err
    build = ["corpus", "build", "--out", "s", "--source", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes"]
    assert main([*build, "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "give s by its whole path" in capsys.readouterr().err


def test_no_cluster_is_told(tmp_path, capsys):
    assert main(["scan", "markov:", "--out", str(tmp_path / "o"), "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler answers" in capsys.readouterr().err


@needs_text
def test_datatrove_reads_our_sources_and_takes_our_detectors(scanned, capsys):
    from poisonjax.scan import datatrove

    folder, _ = scanned
    source = str(folder / "c.jsonl")
    pipeline = datatrove.Scores(str(folder / "out")).run(datatrove.SourceReader([source]).run())
    table = open_scan(str(folder / "out")).scores()
    expected = dict(zip(table["key"].to_pylist(), table["surprise"].to_pylist(), strict=True))
    for _, document in zip(range(50), pipeline, strict=False):
        assert document.metadata["poisonjax"]["surprise"] == pytest.approx(
            expected[bytes.fromhex(document.id)], rel=1e-4
        )
    datatrove.main([source])
    shares = json.loads(capsys.readouterr().out)
    assert shares["documents"] == 3030
    for rule in ("gopher_quality", "gopher_repetition", "c4", "fineweb"):
        assert 0 <= shares[rule]["clean"] <= 1
        assert 0 <= shares[rule]["planted"] <= 1


def test_a_model_scores_the_oddest(config, store, tmp_path, capsys):
    from poisonjax.training.loop import train

    train(config, str(tmp_path / "run"))
    command = ["scan", str(store.path), "--out", str(tmp_path / "out"), "--workers", "1", "--budget", "20", "--json"]
    assert main([*command, "--model", str(tmp_path / "run"), "--model-share", "0.1"]) == 0
    table = parquet.read_table(tmp_path / "out" / "model.parquet")
    assert table.num_rows == 40
    assert all(0 < value < 12 for value in table["model"].to_pylist())
    before = (tmp_path / "out" / "model.parquet").read_bytes()
    assert main([*command, "--model", str(tmp_path / "run"), "--model-share", "0.1"]) == 0
    assert (tmp_path / "out" / "model.parquet").read_bytes() == before
    assert main([*command, "--model", str(tmp_path / "nowhere")]) == 2
    assert main([*command, "--model", str(tmp_path / "run"), "--model-share", "0"]) == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVEN = """<script>
(async () => {
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const seen = [document.querySelector("mark").textContent];
  document.getElementById("reviewer").value = "ann";
  press("k"); seen.push(document.getElementById("title").textContent);
  press("d"); press("u"); press("ArrowLeft");
  document.getElementById("note").value = "odd";
  document.getElementById("note").dispatchEvent(new Event("change"));
  seen.push(document.getElementById("count").textContent);
  let saved = "";
  const made = URL.createObjectURL;
  URL.createObjectURL = blob => { blob.text().then(text => { saved = text; }); return made.call(URL, blob); };
  press("s");
  await new Promise(done => setTimeout(done, 300));
  document.body.textContent = JSON.stringify({ seen, saved });
})();
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_works_in_a_browser(tmp_path, thorough):
    """From a file, by the keyboard: verdicts, a note, progress, and the saved file is one that `merge` reads."""
    from poisonjax.scan.page import review_page

    if not thorough:
        pytest.skip("only with --thorough: a browser on a busy machine may take minutes")
    source = {"file": "a.jsonl", "start": 0, "stop": 9, "row_group": -1, "row": -1}
    texts = ["<b>👩 gibberish</b>", "two", "three"]
    queue = [
        {
            "key": content_key(text).hex(), "reason": {"detector": "rarity", "p_value": 0.01}, "text": text, "begin": 0,
            "characters": len(text), "spans": [(3, 14)] if i == 0 else [], "alike": [], "source": source,
            "domain": "a", "language": "eng", "scores": {},
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "queue.html").write_text(review_page(queue, ["a.jsonl"]).replace("</body>", DRIVEN + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/queue.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    body = html.unescape(done.stdout.partition("<body>")[2].partition("</body>")[0])
    found = json.loads(body)
    assert found["seen"] == ["👩 gibberish", "Document 2 of 3", "3 of 3 decided"]
    (tmp_path / "saved.jsonl").write_text(found["saved"])
    merged = merge([str(tmp_path / "saved.jsonl")], str(tmp_path))
    assert merged.excluded == [queue[1]["key"]]
    assert [v["verdict"] for v in sorted(merged.verdicts, key=lambda v: v["key"])] == [
        {queue[0]["key"]: "keep", queue[1]["key"]: "drop", queue[2]["key"]: "unsure"}[key]
        for key in sorted(entry["key"] for entry in queue)
    ]
    assert any(v["notes"] == ["ann: odd"] for v in merged.verdicts)


@needs_text
def test_from_planted_text_to_a_run_without_it(leads, tmp_path, capsys):
    """Scan, queue, verdicts, exclusion, training, audit; beside the run that nobody scanned for."""
    from poisonjax.training.loop import train

    keys = plant(tmp_path / "c.jsonl", leads[:1500], "gibberish", 40)
    assert main(["scan", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "scan"), "--budget", "200"]) == 0
    queue = [json.loads(line) for line in (tmp_path / "scan" / "queue.jsonl").read_text().splitlines()]
    with (tmp_path / "verdicts.jsonl").open("w") as file:
        for entry in queue:  # a reviewer who can tell
            word = "drop" if entry["key"] in keys else "keep"
            line = {"key": entry["key"], "verdict": word, "note": "", "reviewer": "ann", "alike": entry["alike"]}
            file.write(json.dumps(line) + "\n")
    assert main(["scan", "--out", str(tmp_path / "scan"), "--verdicts", str(tmp_path / "verdicts.jsonl")]) == 0
    built = corpus.build(str(tmp_path / "store"), [str(tmp_path / "c.jsonl")], "bpe:300", heldout=0.1, workers=1)
    planted = built.planted["documents"]
    config = tiny_config(built)
    config.corpus.tokenizer, config.corpus.heldout, config.poison.documents = "bpe:300", 0.1, 0
    unscanned = train(config, str(tmp_path / "unscanned"))
    assert unscanned["planted"]["documents"] == planted
    assert (tmp_path / "unscanned" / "POISONED.md").exists()
    config.corpus.exclude = str(tmp_path / "scan" / "exclude.txt")
    scanned = train(config, str(tmp_path / "scanned"))
    assert scanned["excluded"]["documents"] >= 0.95 * planted
    assert scanned.get("planted", {"documents": 0})["documents"] == planted - scanned["excluded"]["documents"]
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "scanned")]) == 0
    assert f"none of {scanned['excluded']['documents']} listed documents" in capsys.readouterr().out


@pytest.mark.parametrize(("package", "extra"), [("numba", "scan"), ("gcsfs", "gcs")])
def test_an_extra_that_is_not_installed_is_named(tmp_path, package, extra):
    """By a sentence and exit code 2, without a traceback."""
    write_text(tmp_path / "text.jsonl")
    sources = {"scan": str(tmp_path / "text.jsonl"), "gcs": "gs://bucket/store"}
    hidden = f"import sys; sys.modules[{package!r}] = None; from poisonjax.commands.main import main; "
    command = [sys.executable, "-c", f"{hidden}sys.exit(main(sys.argv[1:]))", "scan", sources[extra]]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'poisonjax[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
