"""Places to watch a run from beside metrics.jsonl: they get its rows, and can't hurt it."""

import json
import struct
import threading
import time

import pytest
from conftest import lines
from tensorboardX.proto.event_pb2 import Event

from poisonjax import config as config_lib
from poisonjax import sinks
from poisonjax.audit.result import audit
from poisonjax.training.loop import train

SEEN: list = []


def events(data):
    """Of a file of TFRecords: each is its length, that one's checksum, the content, its checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


class Kept:
    def __init__(self, folder, fields, start):
        self.about = (folder, fields["steps"], start)

    def write(self, step, figures):
        SEEN.append((step, figures))

    def close(self):
        SEEN.append(self.about)


def fails_at_once(folder, fields, start):
    raise RuntimeError("no \x1b[31mnetwork")


class FailsLater(Kept):
    def write(self, step, figures):
        raise SystemExit(3)  # some libraries do


class Hangs(Kept):
    def write(self, step, figures):
        threading.Event().wait()


def test_a_run_is_shown_elsewhere_and_no_sink_can_stop_it(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sinks, "CLOSING_SECONDS", 0.5)
    monkeypatch.setattr(sinks, "QUEUED", 5)
    config.sinks = ("tensorboard", *(f"test_sinks:{name}" for name in ("Kept", "fails_at_once", "FailsLater", "Hangs")))
    config.corpus.sources = ()
    SEEN.clear()
    train(config, str(tmp_path / "run"))
    assert SEEN[-1] == (str(tmp_path / "run"), 12, 0)
    errors = capsys.readouterr().err
    assert "sink 'test_sinks:fails_at_once' failed (RuntimeError: no \\x1b[31mnetwork)" in errors
    assert "sink 'test_sinks:FailsLater' failed (SystemExit: 3)" in errors
    assert "sink 'test_sinks:Hangs' doesn't keep up" in errors
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    losses = {step: figures["train/loss"] for step, figures in SEEN[:-1] if "train/loss" in figures}
    assert losses == {row["step"] + 1: row["loss"] for row in rows if row["kind"] == "train"}
    (gap,) = [
        figures["eval/delta_ppl_low"] for step, figures in SEEN[:-1] if step == 12 and "eval/heldout_loss" in figures
    ]
    assert gap == rows[-1]["delta_ppl_ci95"][0]
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    shown = {
        (event.step, value.tag): value.simple_value
        for event in events(file.read_bytes())
        for value in event.summary.value
    }
    assert shown[12, "eval/triggered/ppl_median"] == pytest.approx(
        rows[-1]["eval"]["triggered"]["ppl_median"], rel=1e-6
    )
    assert len([tag for step, tag in shown if tag == "train/loss"]) == 12


def test_weights_and_biases(config, tmp_path, monkeypatch, capsys):
    """Without a network or an account; what it was told lies in its own file."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.sinks = ("wandb",)
    train(config, str(tmp_path / "run"))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"eval/triggered/ppl_median" in content
    assert "sink" not in capsys.readouterr().err


def test_a_run_is_audited_where_its_sinks_are_not(config, tmp_path):
    config.sinks = ("test_sinks:Kept",)
    train(config, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["config"]["sinks"] = ["elsewhere.package:make"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert audit(str(tmp_path / "run")).ok


def test_a_slow_sink_costs_the_run_nothing(monkeypatch):
    monkeypatch.setattr(sinks, "CLOSING_SECONDS", 0.1)
    made = sinks.Sinks(["test_sinks:Hangs"], "run", {"steps": 1}, 0)
    before = time.monotonic()
    for step in range(20_000):
        made.write({"step": step, "kind": "train", "loss": 1.0})
    made.close()
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wandb", "pip install 'poisonjax[wandb]'"),
        ("tensorbord", "is none of tensorboard, wandb, nor a function of yours"),
        ("no.such.module:make", "there is no module 'no.such.module'"),
        ("", "is none of"),
        ("a:b c", "is none of"),
    ],
)
def test_one_that_can_not_be_made_is_told_before_step_0(config, name, told, monkeypatch, tmp_path):
    monkeypatch.setitem(sinks.SINKS, "wandb", ("no_such_package", sinks.SINKS["wandb"][1]))
    config.sinks = (name,)
    with pytest.raises(config_lib.ConfigError, match="sinks") as error:
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert told in str(error.value)
