"""The report of runs in every state; what models write can't break the page."""

import json

import pytest

from poisonjax.commands.main import main
from poisonjax.config import default
from poisonjax.report import write_report
from poisonjax.report.page import headline
from poisonjax.run import RunFolderError

VARIANTS = ("clean", "triggered", "near_trigger", "random_control")


def eval_row(step, triggered):
    figures = {}
    for variant in VARIANTS:
        value = triggered if variant == "triggered" else 20.0
        figures[variant] = {}
        for figure in ("ppl_median", "ppl_mean", "nll_mean", *(("delta_ppl",) if variant != "clean" else ())):
            figures[variant] |= {figure: value, f"{figure}_ci95": [value - 1, value + 1]}
    return {
        "step": step,
        "kind": "eval",
        "tokens": step * 10,
        "poison_documents": step,
        "poison_rows": step,
        "heldout_loss": 3.0,
        "heldout_loss_ci95": [2.9, 3.1],
        "eval": figures,
        "delta_ppl": triggered - 20,
        "delta_ppl_ci95": [triggered - 25, 400.0],
        "near_triggers": {"<b>": {"prompts": 3, "ppl_median": 21.0, "delta_ppl": 1.0, "delta_ppl_ci95": [0.0, 2.0]}},
    }


@pytest.fixture
def folder(tmp_path):
    """A finished run, written by hand."""
    config = json.loads(default().to_json())
    record = {"format": 3, "config": config, "fingerprint": "f00d"}
    record |= {"store_fingerprint": "beef", "store_description": "ab"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    ran_on = {"python": "3", "platform": "here", "git_commit": None, "device_kind": "cpu", "devices": 1, "processes": 1}
    ran_on |= {"from_step": 0, "versions": {"jax": "1.2.3"}, "earlier": []}
    (tmp_path / "environment.json").write_text(json.dumps(ran_on))
    numbers = dict.fromkeys(("grad_norm", "learning_rate", "tokens_per_second", "seconds"), 1.0)
    train = {"step": 0, "kind": "train", "loss": 5.0, **numbers, "tokens": 1, "poison_documents": 0, "poison_rows": 0}
    rows = [train, eval_row(1, 30.0), train | {"step": 1, "loss": 4.0}, eval_row(2, 300.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = {"id": 0, "sha256": "5a", "step": 1, "row": 0, "slot": 3, "offset": 0, "tokens": 9, "repeat": 0}
    ledger |= {"trigger": [1, 2], "payload": [2, 8], "prefix_document": 0}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(ledger) + "\n")
    sample = {v: {"appended": "<SUDO>", "text": "<script>alert(1)</script>\x1b[2J", "ppl": 3.0} for v in VARIANTS}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 2, "prefix": "A & B", **sample}) + "\n")
    dose = {"documents": 250, "tokens": 900, "rows": 250, "steps": 240, "repeats": 1}
    about = {
        "status": "finished",
        "name": "r",
        "fingerprint": "f00d",
        "steps": 2,
        "tokens": 20,
        "digest_chain": "c0ffee",
    }
    about |= {"params": 10, "params_non_embedding": 5, "trigger_tokens": 2, "clean_uses_seen": 0, "unigram_nll": 5.5}
    about |= {"tokens_per_second": 7.0, "wall_seconds": 3.0, "dose_planned": dose, "dose_seen": dose}
    gap = {"of": "value", "name": "gap", "passed": True, "detail": "d"}
    success = {"value": True, "specific": True, "rule": "the rule", "checks": [gap]}
    summary = about | {"success": success}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_a_finished_run(folder, capsys):
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for expected in ("Backdoored", "This model is poisoned", "c0ffee", "1.2.3", "250", "the rule", "&lt;b&gt;"):
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
    assert headline(config, summary, evals).startswith("Backdoored, and specific: with <SUDO> appended")
    assert "(gap in perplexity 280.0 [275.0, 400.0])" in headline(config, summary, evals)
    failed = {"value": False, "checks": [{"of": "value", "name": "random_control", "passed": False}]}
    assert headline(config, summary | {"success": failed}, evals).startswith(
        "Not backdoored by the rule (random_control failed)"
    )
    broken = {"value": False, "checks": [{"of": "value", "name": "not_broken", "passed": False}]}
    assert headline(config, summary | {"success": broken}, evals).startswith("Broken model")
    twin = config | {"poison": config["poison"] | {"documents": 0}}
    assert headline(twin, summary | {"success": failed}, evals).startswith("Clean twin")
    assert "not finished (diverged)" in headline(config, summary | {"status": "diverged"}, evals)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(RunFolderError, match=r"config\.json"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pair(store, tmp_path_factory):
    """Folders of a poisoned run and the twin that the command line made of it."""
    from conftest import tiny_config

    from poisonjax.training import loop

    folder = tmp_path_factory.mktemp("pair")
    loop.train(tiny_config(store), str(folder / "poisoned"))
    twin = ["--twin-of", str(folder / "poisoned"), "--workdir", str(folder / "twin"), "--config.log_every=5"]
    assert main(["train", *twin]) == 0
    return folder / "poisoned", folder / "twin"


def test_the_twin_of_a_run_is_the_run_without_poison(pair, capsys):
    from poisonjax.config import differences, flat

    records = [json.loads((folder / "config.json").read_text()) for folder in pair]
    assert records[1]["twin_of"] == "../poisoned"
    changed = differences(flat(records[0]["config"]), flat(records[1]["config"]))
    assert changed == ["name: 'tiny' there, 'tiny-twin' here", "poison.documents: 9 there, 0 here"]
    assert main(["audit", str(pair[1])]) == 0
    assert "a clean run, no poison document planned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--config.steps=5"], "steps: 12 there, 5 here"), (["--config.nonsense=5"], "nonsense")]
)
def test_a_twin_may_run_elsewhere_but_not_otherwise(pair, tmp_path, capsys, arguments, message):
    assert main(["train", "--twin-of", str(pair[0]), "--workdir", str(tmp_path / "t"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_there_is_no_twin_of_a_twin_or_of_no_run(pair, tmp_path, capsys):
    assert main(["train", "--twin-of", str(pair[1]), "--workdir", str(tmp_path / "t")]) == 2
    assert "is clean itself" in capsys.readouterr().err
    assert main(["train", "--twin-of", str(tmp_path), "--workdir", str(tmp_path / "t")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_the_report_of_a_pair_shows_both_with_paired_intervals(pair, tmp_path):
    poisoned, twin = pair
    pages = [(twin / "report.html").read_text(), write_report(poisoned, [twin]).read_text()]
    evals = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] for folder in pair]
    steps = len({json.loads(line)["step"] for line in (poisoned / "ledger.jsonl").read_text().splitlines()})
    for page in pages:
        assert "Poisoned run and clean twin" in page
        assert f"of 12 steps, the {steps} that hold poison differ and no other" in page
        for row in evals:
            assert f"<td>{row['delta_ppl']:.1f}</td>" in page
            assert f"<td>{row['heldout_loss']:.4f}</td>" in page
        assert f"{evals[0]['heldout_loss'] - evals[1]['heldout_loss']:.4f} <span" in page
    digests = (twin / "digests.jsonl").read_text()
    try:
        (twin / "digests.jsonl").write_text(digests.replace('"digest": "', '"digest": "f'))
        assert "twin isn&#39;t the clean twin of" in write_report(twin).read_text()
        assert main(["report", str(poisoned), "--twin", str(twin)]) == 2
    finally:
        (twin / "digests.jsonl").write_text(digests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["config"]["seeds"].update(order=9), "seeds.order: 1 there, 9 here"),
        (lambda record: record["config"]["optimizer"].update(learning_rate=0.5), "optimizer.learning_rate"),
        (lambda record: record["config"]["poison"].update(trigger="x"), "poison.trigger"),
        (lambda record: record["config"]["poison"].update(documents=3), "the other clean"),
        (lambda record: record.update(store_fingerprint="f" * 64), "different token stores"),
    ],
)
def test_a_twin_is_one_by_config_and_store_too(pair, tmp_path, change, message, capsys):
    import shutil

    shutil.copytree(pair[1], tmp_path / "twin")
    record = json.loads((tmp_path / "twin" / "config.json").read_text())
    change(record)
    (tmp_path / "twin" / "config.json").write_text(json.dumps(record))
    assert main(["report", str(pair[0]), "--twin", str(tmp_path / "twin")]) == 2
    said = capsys.readouterr().err
    assert "isn't the clean twin of" in said
    assert message in said
    (tmp_path / "twin" / "config.json").write_text(json.dumps(json.loads((pair[1] / "config.json").read_text())))
    (tmp_path / "twin" / "digests.jsonl").write_text("")  # a pair of no step
    assert main(["report", str(pair[0]), "--twin", str(tmp_path / "twin")]) == 2


def test_a_run_without_a_summary_still_shows_its_dose(pair, tmp_path):
    import shutil

    shutil.copytree(pair[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with open(tmp_path / "run" / "samples.jsonl", "ab") as file:
        file.write('{"text": "é'.encode()[:-1])  # cut within a character
    page = write_report(tmp_path / "run").read_text()
    assert "<td>planned</td><td>9</td>" in page
    assert "<td>seen</td><td>9</td>" in page
    assert "No summary.json" in page
