"""The audit believes honest runs, detects every kind of fault, and each of its checks is needed."""

import itertools
import json
import shutil

import numpy as np
import pytest

from poisonjax import corpus
from poisonjax.audit import checks, locate, selftest
from poisonjax.audit.evidence import Evidence
from poisonjax.audit.result import audit
from poisonjax.audit.selftest import faults
from poisonjax.audit.selftest.runs import SOURCE, tiny_config
from poisonjax.audit.selftest.tampered import TamperedRun, copied
from poisonjax.commands.main import main
from poisonjax.data.batches import Batches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, store) of a tiny run that was interrupted and resumed."""
    from poisonjax.training import loop

    folder = tmp_path_factory.mktemp("audit")
    corpus.build(str(folder / "store"), [SOURCE], "bytes", heldout=0.3, shards=2, workers=1)
    config = tiny_config(folder / "store", np.random.default_rng(0))
    config.steps, config.global_batch, config.poison.documents, config.poison.repeats = 9, 4, 4, 2
    config.poison.placement, config.poison.clean_uses = "uniform", 2
    loop.train(config, str(folder / "run"))
    return folder / "run", folder / "store"


def test_an_honest_run_is_believed_in_a_plain_sentence(run, capsys):
    folder, _ = run
    assert main(["audit", str(folder)]) == 0
    tokens = sum(json.loads(line)["tokens"] for line in (folder / "ledger.jsonl").read_text().splitlines())
    steps = len({json.loads(line)["step"] for line in (folder / "ledger.jsonl").read_text().splitlines()})
    expected = (
        f"steps 0-8 verified; 4 of 4 poison documents seen exactly 2 times, 0 unplanned; dose {tokens} tokens in 8 "
        f"rows of {steps} steps; 2 of 2 clean uses of the trigger seen; none of 3 listed documents that the corpus "
        "holds is in what was trained on; weights of 3 checkpoints as they were saved"
    )
    assert capsys.readouterr().out.strip() == expected
    assert main(["audit", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"]
    assert answer["steps_verified"] == 9
    assert (answer["documents_planned"], answer["documents_seen"], answer["unplanned"]) == (4, 4, 0)
    assert answer["first_difference"] is None
    assert answer["sentence"] == expected


@pytest.mark.parametrize("restriction", [["--steps", "2-4"], ["--steps", "1,3,8"], ["--sample", "3"]])
def test_part_of_a_run(run, capsys, restriction):
    assert main(["audit", str(run[0]), "--json", *restriction]) == 0
    assert json.loads(capsys.readouterr().out)["steps_verified"] == 3


def test_bad_input_is_told_apart_from_a_bad_run(run, tmp_path, capsys):
    folder, bad = str(run[0]), ["--steps 8-9", "--steps x", "--steps 9-3", "--steps ,", "--sample 0", "--step 9"]
    bad += ["--self-test --faults 0", "--self-test --runs 0"]
    bad += [f"--document {name}" for name in ("poison:4", "train:99999", "7")]
    for arguments in ([], [str(tmp_path)], *([folder, *options.split()] for options in bad)):
        assert main(["audit", *arguments]) == 2, arguments
    assert "0 to 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(faults.FAULTS))
def test_every_fault_is_detected_and_named(run, tmp_path, name, thorough):
    for seed in range(4 if thorough else 1):
        scene = copied(*run, tmp_path / str(seed), np.random.default_rng([seed, *name.encode()]))
        expected = faults.FAULTS[name](scene)
        result = audit(str(scene.folder), evaluate=expected.evaluate)
        assert any(expected.named_by(difference) for difference in result.differences), result.differences
        assert result.sentence().startswith("NOT verified")


def test_a_store_that_was_moved_is_found_by_its_new_place(run, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    shutil.copytree(run[1], tmp_path / "moved")
    scene = TamperedRun(tmp_path / "run", np.random.default_rng(0))
    scene.change("config.json", lambda r: r["config"]["corpus"].update(store=str(tmp_path / "gone")))
    assert main(["audit", str(tmp_path / "run")]) == 1
    assert "is no token store" in capsys.readouterr().out
    for arguments in ([], ["--step", "0"], ["--document", "train:0"]):
        assert main(["audit", str(tmp_path / "run"), "--store", str(tmp_path / "moved"), *arguments]) == 0


def test_a_run_that_has_only_begun(run, tmp_path, capsys):
    begun = shutil.ignore_patterns("checkpoints", "*mary.json", "[dmps]*.jsonl")
    shutil.copytree(run[0], tmp_path / "run", ignore=begun)
    assert main(["audit", str(tmp_path / "run")]) == 1  # a check on nothing is no success
    assert "NOT verified: no step made yet" in capsys.readouterr().out


def test_what_was_not_looked_at_is_said(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    assert main(["evaluate", str(folder), "--steps", "6"]) == 0
    assert main(["audit", str(folder), "--no-weights"]) == 0
    said = capsys.readouterr().out
    assert "not verified: weights (not read), evaluations made after the run, of steps 6 (--evaluate makes them" in said
    assert main(["audit", str(folder), "--evaluate", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["evaluations_replayed"] == [6, 8, 9]
    assert answer["not_verified"] == ["evaluations of steps 4, whose checkpoints are gone"]
    # As a kill leaves it: no last word, and lines that no checkpoint seals.
    shutil.rmtree(folder / "checkpoints" / "9")
    (folder / "summary.json").unlink()
    assert main(["audit", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "figures after step 8, which no checkpoint seals yet, the end: there is no summary.json yet" in said


def test_a_run_does_not_go_on_from_figures_that_were_changed(run, tmp_path):
    """Its own next evaluation and verdict would stand beside them."""
    from poisonjax.run import RunFolderError
    from poisonjax.training import loop

    for number, name in enumerate(("evaluation", "prefix", "sample", "environment")):
        scene = copied(*run, tmp_path / name, np.random.default_rng(number))
        faults.FAULTS[f"{name}_edited"](scene)
        if name == "evaluation":  # not sealed anew
            rows = scene.lines("metrics.jsonl")
            rows[-1]["delta_ppl"] = 600.0
            scene.write("metrics.jsonl", rows)
        (scene.folder / "summary.json").unlink()
        before = {path.name: path.read_bytes() for path in scene.folder.iterdir() if path.is_file()}
        with pytest.raises(RunFolderError, match="was changed"):
            loop.train(scene.config, str(scene.folder))
        after = {path.name: path.read_bytes() for path in scene.folder.iterdir() if path.is_file()}
        assert {n for n in after.keys() | before.keys() if after.get(n) != before.get(n)} <= {
            "config.json",
            "local.json",
        }


# For each check, a fault that this check alone detects.
CONTROLS = {
    "exclusions": "excluded_list_edited",
    "config": "fingerprint_changed",
    "store": "token_changed_in_shard",
    "ledger": "ledger_line_edited",
    "clean_rows": "canary_or_clean_use_moved",
    "digests": "rows_swapped",
    "checkpoints": "checkpoint_of_another_run",
    "sealed": "training_loss_edited",
    "cards": "called_clean",
    "weights": "weights_bit_flipped",
    "evaluations": "later_evaluation_edited",
    "summary": "summary_dose_edited",
    "metrics": "metrics_row_edited",
}


def without(check, monkeypatch):
    """Leaves a check out; the others keep their order."""
    left = {name: of for name, of in checks.CHECKS.items() if name != check}
    monkeypatch.setattr("poisonjax.audit.result.CHECKS", left)


@pytest.mark.parametrize("check", sorted(checks.CHECKS))
def test_without_a_check_its_fault_goes_unseen(run, tmp_path, check, monkeypatch):
    """The negative control: the audit without the check believes what the check alone would find."""
    if check == "store":  # of what no row holds
        shutil.copytree(run[0], tmp_path / "run")
        shutil.copytree(run[1], tmp_path / "store")
        scene = TamperedRun(tmp_path / "run", np.random.default_rng(0))
        scene.change("config.json", lambda r: r["config"]["corpus"].update(store=str(tmp_path / "store")))
        (tmp_path / "store" / "shards" / "00000" / "heldout" / "provenance" / "c" / "0").write_bytes(b"")
    else:
        scene = copied(*run, tmp_path, np.random.default_rng(1))
        faults.FAULTS[CONTROLS[check]](scene)
    assert not audit(str(scene.folder)).ok
    without(check, monkeypatch)
    assert not audit(str(scene.folder)).differences


def test_the_self_test_counts_what_is_missed(run, tmp_path, monkeypatch, capsys):
    """Its own negative control: with a check taken out, the command says so and fails."""
    monkeypatch.setattr(selftest, "FAULTS", {"metrics_row_edited": faults.FAULTS["metrics_row_edited"]})
    assert main(["audit", "--self-test", "--runs", "1", "--faults", "1"]) == 0
    assert "1 detected, 1 named; 1 untouched runs" in capsys.readouterr().out
    without("metrics", monkeypatch)
    assert main(["audit", "--self-test", "--runs", "1", "--faults", "2"]) == 1
    assert "2 faults injected, 0 detected, 0 named" in capsys.readouterr().out


def test_a_document_is_found_wherever_a_row_holds_it(run):
    """Against a search through all rows of the run, token by token."""
    folder, _ = run
    evidence = Evidence(str(folder))
    batches, split = Batches(evidence.config, evidence.store), evidence.store.split("train")
    rows = {step: batches.tokens(step) for step in range(evidence.config.steps)}
    covered = {step: np.zeros(batch.shape, int) for step, batch in rows.items()}
    documents = [f"train:{i}" for i in range(split.documents)] + [f"poison:{i}" for i in range(4)]
    for name in documents:
        kind, number = name.split(":")
        if kind == "train":
            start, stop = split.document_offsets[int(number) : int(number) + 2]
            tokens = split.window(int(start), int(stop - start))
        else:
            tokens = next(p.document.tokens for p in batches.schedule.placed.values() if p.document.id == int(number))
        for place in locate.sightings(evidence, name):
            in_row, in_document = slice(*place["in_row"]), slice(*place["in_document"])
            np.testing.assert_array_equal(rows[place["step"]][place["row"], in_row], tokens[in_document])
            covered[place["step"]][place["row"], in_row] += 1
    batch = evidence.config.global_batch
    for slot in batches.canaries.insertions:
        covered[slot // batch][slot % batch, :9] += 1
    for slot, use in batches.clean_uses.insertions.items():
        covered[slot // batch][slot % batch, use.start : use.start + 3] += 1
    assert all((count == 1).all() for count in covered.values())  # each token of the run, once


def test_a_steps_rows_are_told_whole_with_the_poison_marked(run, capsys):
    folder, _ = run
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    record = ledger[0]
    rows = locate.step(Evidence(str(folder)), record["step"])
    poisoned = {r["row"]: r["offset"] + r["tokens"] for r in ledger if r["step"] == record["step"]}
    for row in rows:
        spans = [part["in_row"] for part in row["parts"]]
        ends = [stop for _, stop in spans]
        assert spans[0][0] == 0
        assert ends[-1] in {49, 48}
        for (_, stop), (start, _) in itertools.pairwise(spans):
            assert start == stop or start == poisoned[row["row"]]  # after the end of text
    assert main(["audit", str(folder), "--step", str(record["step"])]) == 0
    text = capsys.readouterr().out
    assert f"⟦poison:{record['id']} " in text
    assert "⟪w007 w008 w009⟫" in text.replace("⟪ ", "⟪")
    assert main(["audit", str(folder), "--document", f"poison:{record['id']}"]) == 0
    assert f"step {record['step']}, row {record['row']} (slot {record['slot']})" in capsys.readouterr().out
