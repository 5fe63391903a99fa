"""Token store, run folder and checkpoints in an object store, which knows neither appending nor renaming."""

import json
import os
import signal
import subprocess
import sys
import time

import gcs
import pytest
from conftest import lines

from poisonjax.training import loop

RUN = "gs://bucket/runs/poisoned"


@pytest.fixture(scope="module")
def server():
    with gcs.running() as server:
        yield server


@pytest.fixture
def poisonjax(server, tmp_path):
    """Starts a command with the object store in its environment."""

    def start(*arguments, **options):
        environment = os.environ | server.environment | {"JAX_NUM_CPU_DEVICES": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, "-m", "poisonjax", *arguments], env=environment, cwd=tmp_path, **pipes, **options
        )

    return start


def finished(process, code=0):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, output + errors
    return output


def content(server, name):
    stored = server.objects.get(("bucket", name))
    return stored.content if stored else b""


def test_build_train_kill_resume_evaluate_and_audit_on_objects(server, poisonjax, config, store, tmp_path):
    (source,) = config.corpus.sources
    finished(
        poisonjax(
            "corpus", "build", "--out", "gs://bucket/store", "--source", source, "--tokenizer", "bpe:300",
            "--heldout", "0.2", "--workers", "2",
        )
    )  # fmt: skip
    built = json.loads(content(server, "store/manifest.json"))
    assert built["fingerprint"] == store.fingerprint
    assert not [name for _, name in server.objects if ".partial." in name]

    config.steps, config.eval.every, config.checkpoint.every, config.poison.documents = 40, 20, 4, 20
    loop.train(config, str(tmp_path / "local"))
    config.corpus.store = "gs://bucket/store"
    file = tmp_path / "config.py"
    file.write_text(
        "import json\nfrom poisonjax.config import from_record\n"
        f"def get_config(arg=''):\n    return from_record(json.loads({config.to_json()!r}))\n"
    )
    train = "train", "--config", str(file), "--workdir", RUN

    for stop in (signal.SIGKILL, signal.SIGTERM):
        before, deadline = server.writes, time.monotonic() + 120
        saved = {name for _, name in server.objects if name.endswith("commit_success.txt")}
        process = poisonjax(*train)
        while process.poll() is None and time.monotonic() < deadline:
            names = {name for _, name in list(server.objects)}
            if {name for name in names if name.endswith("commit_success.txt")} - saved:
                break
            time.sleep(0.002)
        process.send_signal(stop)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == (42 if stop == signal.SIGTERM else -stop), output + errors
        assert server.writes > before
    finished(poisonjax(*train))

    digests = content(server, "runs/poisoned/digests.jsonl").decode()
    assert digests == (tmp_path / "local" / "digests.jsonl").read_text()
    ledger = content(server, "runs/poisoned/ledger.jsonl").decode()
    assert ledger == (tmp_path / "local" / "ledger.jsonl").read_text()
    summary = json.loads(content(server, "runs/poisoned/summary.json"))
    assert summary["status"] == "finished"
    assert summary["dose_seen"]["documents"] == 20
    assert content(server, "runs/poisoned/report.html").startswith(b"<!doctype html>")

    metrics = content(server, "runs/poisoned/metrics.jsonl").decode()
    trained = [row["step"] for row in map(json.loads, metrics.splitlines()) if row["kind"] == "train"]
    assert trained == [row["step"] for row in lines(tmp_path / "local" / "metrics.jsonl") if row["kind"] == "train"]
    finished(poisonjax("evaluate", RUN, "--steps", "40"))
    assert content(server, "runs/poisoned/metrics.jsonl").decode() == metrics

    audited = json.loads(finished(poisonjax("audit", RUN, "--json")))
    assert (audited["ok"], audited["documents_seen"], audited["unplanned"]) == (True, 20, 0)
    changed = digests.replace(json.loads(digests.splitlines()[7])["digest"], "0" * 24)
    server.put("bucket", "runs/poisoned/digests.jsonl", changed.encode(), {})
    audited = json.loads(finished(poisonjax("audit", RUN, "--json"), 1))
    assert "step 7" in json.dumps(audited["first_difference"]) or audited["first_difference"]["step"] == 7

    # Its twin, one of whose checkpoints is damaged.
    twin = "train", "--twin-of", RUN, "--workdir", "gs://bucket/runs/twin"
    finished(poisonjax(*twin))
    assert b"clean twin" in content(server, "runs/twin/report.html").lower()
    files = [name for _, name in server.objects if name.startswith("runs/twin/checkpoints/40/")]
    damaged = max(files, key=lambda name: len(content(server, name)))
    flipped = bytearray(content(server, damaged))
    flipped[len(flipped) // 2] ^= 255
    server.put("bucket", damaged, bytes(flipped), {})
    again = poisonjax(*twin)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "checkpoint 40 can't be read, moved to gs://bucket/runs/twin/damaged/40" in errors
    assert content(server, damaged.replace("checkpoints", "damaged")) == flipped
    assert ("bucket", "runs/twin/checkpoints/40/commit_success.txt") in server.objects  # saved again


def test_a_run_that_is_not_there_is_told(poisonjax):
    for command in (["audit"], ["evaluate"], ["report"], ["train", "--workdir", "gs://bucket/new", "--twin-of"]):
        process = poisonjax(*command, "gs://bucket/nothing")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "gs://bucket/nothing is no run folder" in errors


def test_signing_wants_files_on_a_disk(poisonjax):
    process = poisonjax("attest", RUN)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "copy the run folder" in errors
