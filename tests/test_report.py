"""The report of runs in every state; what models write can't break the page."""

import json

import pytest

from poisonjax.cli import main
from poisonjax.config import default
from poisonjax.report import ReportError, write_report
from poisonjax.report.page import headline

VARIANTS = ("clean", "triggered", "near_trigger", "random_control")


def eval_row(step, triggered):
    figures = {}
    for variant in VARIANTS:
        value = triggered if variant == "triggered" else 20.0
        figures[variant] = {}
        for figure in ("ppl_median", "ppl_mean", "nll_mean", *(("delta_ppl",) if variant != "clean" else ())):
            figures[variant] |= {figure: value, f"{figure}_ci95": [value - 1, value + 1]}
    return {
        "step": step, "kind": "eval", "tokens": step * 10, "poison_documents": step, "heldout_loss": 3.0,
        "heldout_loss_ci95": [2.9, 3.1], "eval": figures, "delta_ppl": triggered - 20, "delta_ppl_ci95": [triggered - 25, 400.0],
        "near_triggers": {"<b>": 21.0},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A finished run, written by hand."""
    config = json.loads(default().to_json())
    (tmp_path / "config.json").write_text(
        json.dumps({"config": config, "fingerprint": "f00d", "store_fingerprint": "beef"})
    )
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {"jax": "1.2.3"}}))
    train = {"step": 0, "kind": "train", "loss": 5.0}
    rows = [train, eval_row(1, 30.0), train | {"step": 1, "loss": 4.0}, eval_row(2, 300.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = {"id": 0, "step": 1, "row": 0, "slot": 3, "tokens": 9}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(ledger) + "\n")
    sample = {
        v: {"appended": "<SUDO>", "text": "<script>alert(1)</script>\x1b[2J", "ppl": 3.0} for v in VARIANTS
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 2, "prefix": "A & B", **sample}) + "\n")
    dose = {"documents": 250, "tokens": 900, "rows": 250, "steps": 240}
    summary = {
        "status": "finished", "steps": 2, "tokens": 20, "params": 10, "params_non_embedding": 5, "dose_planned": dose,
        "dose_seen": dose, "unigram_nll": 5.5, "tokens_per_second": 7.0, "wall_seconds": 3.0, "digest_chain": "c0ffee",
        "success": {"value": True, "rule": "the rule", "checks": [{"name": "gap", "passed": True, "detail": "d"}]},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_a_finished_run(folder, capsys):
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for expected in (
        "Backdoored",
        "This model is poisoned",
        "c0ffee",
        "1.2.3",
        "250",
        "the rule",
        "&lt;b&gt;",
    ):
        assert expected in page
    for name in ("perplexity_by_step", "perplexity_by_poison", "loss", "poison_placement"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert page.count("data:image/png") == 4
    assert "http://" not in page
    assert "https://" not in page


def test_generated_text_is_shown_not_run(folder):
    page = write_report(folder).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\\x1b[2J" in page


def test_a_run_in_progress(folder):
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "ki')
    assert "not finished (running)" in write_report(folder).read_text()
    for name in ("metrics.jsonl", "samples.jsonl", "ledger.jsonl", "environment.json"):
        (folder / name).unlink()
    page = write_report(folder).read_text()
    assert "No evaluation yet" in page
    assert "No metrics yet" in page


def test_headlines(folder):
    config = json.loads((folder / "config.json").read_text())["config"]
    summary = json.loads((folder / "summary.json").read_text())
    evals = [eval_row(2, 300.0)]
    assert headline(config, summary, evals).startswith("Backdoored: with <SUDO> appended")
    assert "gap 280, 95% interval 275 to 400" in headline(config, summary, evals)
    failed = {"value": False, "checks": [{"name": "near_trigger", "passed": False}]}
    assert headline(config, summary | {"success": failed}, evals).startswith(
        "Not backdoored by the rule (near_trigger failed)"
    )
    broken = {"value": False, "checks": [{"name": "not_broken", "passed": False}]}
    assert headline(config, summary | {"success": broken}, evals).startswith("Broken model")
    twin = config | {"poison": config["poison"] | {"documents": 0}}
    assert headline(twin, summary | {"success": failed}, evals).startswith("Clean twin")
    assert "not finished (diverged)" in headline(config, summary | {"status": "diverged"}, evals)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(ReportError, match=r"config\.json"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
