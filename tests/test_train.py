"""The whole run: golden figures, resumption to the bit, kills, signals, damage, divergence, refusals."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import command, kill_in_training, lines
from etils import epath

from poisonjax.analysis.study import scored as by_others
from poisonjax.commands.main import main
from poisonjax.config import ConfigError
from poisonjax.data.batches import Batches
from poisonjax.data.digest import as_hex, chain, digest
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.offline import evaluate_run
from poisonjax.model.sharding import make_mesh
from poisonjax.poison.triggers import Trigger
from poisonjax.run import RunFolder, RunFolderError
from poisonjax.run.folder import twin_config
from poisonjax.training import loop
from poisonjax.training.step import make_init
from poisonjax.training.stop import Diverged
from poisonjax.weights import WeightsError, open_weights
from poisonjax.weights.checkpoints import Checkpoints


def weights(workdir, config, store, step):
    """All arrays of a checkpoint, as NumPy."""
    mesh = make_mesh(config, jax.devices()[:1])
    _, abstract = make_init(config, store.tokenizer.vocab_size, mesh)
    state = Checkpoints(epath.Path(workdir)).restore(step, abstract.params, abstract.optimizer)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """(config, folder) of a whole run."""
    from conftest import tiny_config

    config, folder = tiny_config(store), tmp_path_factory.mktemp("run")
    loop.train(config, str(folder))
    return config, folder


def test_run_folder_holds_what_the_design_says(finished, store):
    config, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "environment.json", "metrics.jsonl", "ledger.jsonl", "digests.jsonl", "checkpoints",
        "samples.jsonl", "summary.json",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 8 * 48
    assert summary["dose_planned"] == summary["dose_seen"]
    assert summary["dose_seen"]["documents"] == 9
    for variant in ("clean", "triggered", "near_trigger", "random_control"):
        for figure in ("ppl_median", "ppl_mean", "nll_mean"):
            low, high = summary["eval"][variant][f"{figure}_ci95"]
            assert low <= summary["eval"][variant][figure] <= high
    expected = summary["eval"]["triggered"]["ppl_median"] - summary["eval"]["clean"]["ppl_median"]
    assert summary["delta_ppl"] == pytest.approx(expected)
    assert summary["success"]["value"] == all(check["passed"] for check in summary["success"]["checks"])
    assert 0 < summary["params_non_embedding"] < summary["params"]
    assert lines(folder / "ledger.jsonl") == Batches(config, store).schedule.ledger()


def test_digests_are_those_of_the_planned_batches(finished, store):
    """I5: what the jitted step computed from its arrays is what config and store say it should have read."""
    config, folder = finished
    batches, previous = Batches(config, store), ""
    rows = lines(folder / "digests.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    for row in rows:
        assert row["digest"] == as_hex(digest(batches.tokens(row["step"]), batches.slots(row["step"])))
        previous = chain(previous, row["step"], row["digest"])
    assert json.loads((folder / "summary.json").read_text())["digest_chain"] == previous


def test_golden_metrics(finished):
    """The losses of this run, once recorded; another value means another model, data order or optimizer."""
    _, folder = finished
    train = [row for row in lines(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(12))
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    assert lines(folder / "digests.jsonl")[-1]["digest"] == golden["last_digest"]
    np.testing.assert_allclose([row["loss"] for row in train], golden["losses"], rtol=2e-4)
    np.testing.assert_allclose([row["grad_norm"] for row in train], golden["grad_norms"], rtol=5e-3)


def test_offline_evaluation_gives_the_same_numbers(finished):
    _, folder = finished
    before = (folder / "metrics.jsonl").read_text()
    rows = {row["step"]: row for row in evaluate_run(str(folder), None, say=lambda line: None)}
    evals = [row for row in lines(folder / "metrics.jsonl") if row["kind"] == "eval"]
    assert rows[12] == next(row for row in evals if row["step"] == 12)
    kept = [line for line in before.splitlines() if json.loads(line)["step"] != 8 or '"train"' in line]
    after = [
        line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step": 8, "kind": "eval"' not in line
    ]
    assert sorted(after) == sorted(kept)  # only the checkpoint of step 8 had no evaluation yet
    with pytest.raises(ValueError, match=r"no checkpoint of steps \[5\]; there are \[8, 12\]"):
        evaluate_run(str(folder), [5])


def test_evaluation_with_a_scorer(finished, store, config, tmp_path):
    """Scored by itself, by name, a model gets the numbers of self-scoring."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "copy")
    mesh = make_mesh(config)
    weights = open_weights(f"{tmp_path / 'copy'}@12", mesh)
    assert weights.origin.startswith("tiny after 12 steps (")
    trigger = Trigger.of(config.poison, store.tokenizer)
    (own,) = Evaluator(config, store, trigger, mesh)(weights.params, 12)
    config.eval.scorer = str(folder)
    (scored,) = Evaluator(config, store, trigger, mesh)(weights.params, 12)
    assert scored.figures["delta_ppl"] == pytest.approx(own.figures["delta_ppl"], rel=1e-4)
    # The same of a finished run, by name of the scorer, beside what the run says.
    copy = tmp_path / "copy"
    summary, evals = RunFolder(copy).summary, RunFolder(copy).evals()
    assert main(["evaluate", str(copy), "--steps", "last", "--scorer", f"{folder}@8"]) == 0
    assert main(["evaluate", str(copy), "--steps", "12", "--scorer", str(folder)]) == 0
    found = by_others(RunFolder(copy), 12)
    earlier, by_itself = (found[by] for by in sorted(found, key=lambda by: by.startswith("tiny after 12 steps (")))
    assert by_itself.row["delta_ppl"] == pytest.approx(summary["delta_ppl"], rel=1e-4)
    assert earlier.row["delta_ppl"] != pytest.approx(summary["delta_ppl"], rel=1e-4)
    assert by_others(RunFolder(copy), 8) == {}
    for file in (copy / "evaluations/scored").glob("*/12.json"):
        whole = file.read_text()
        file.write_text(whole[: len(whole) // 2])
    assert by_others(RunFolder(copy), 12) == {}  # what is damaged takes no report down
    (copy / "evaluations/12.json").write_text(whole)
    with pytest.raises(RunFolderError, match="by another scorer"):
        RunFolder(copy).evals()
    (copy / "evaluations/12.json").unlink()
    assert RunFolder(copy).evals() == evals  # no figure of the run's own
    assert main(["evaluate", "hf:x", "--config", "x.py", "--scorer", str(folder)]) == 2
    with pytest.raises(WeightsError, match=r"no checkpoint of step 5; there are \[8, 12\]"):
        open_weights(f"{folder}@5")


def test_a_scorer_that_is_another_model_now_is_refused(config, tmp_path):
    """A path names whatever is newest there: figures of two scorers would stand in one run."""
    config.steps, config.eval.every = 4, 4
    loop.train(config, str(tmp_path / "scorer"))
    scored = config.copy_and_resolve_references()
    scored.eval.scorer, scored.name = str(tmp_path / "scorer"), "scored"
    loop.train(scored, str(tmp_path / "run"))
    assert "tiny after 4 steps (" in json.loads((tmp_path / "run" / "config.json").read_text())["scorer"]
    evaluate_run(str(tmp_path / "run"), None)
    shutil.rmtree(tmp_path / "scorer")
    config.seeds.init = 77
    loop.train(config, str(tmp_path / "scorer"))
    for again in (lambda: evaluate_run(str(tmp_path / "run"), None), lambda: loop.train(scored, str(tmp_path / "run"))):
        with pytest.raises(RunFolderError, match=r"eval.scorer was tiny after 4 steps .* now it is tiny after"):
            again()


def test_a_twin_of_a_run_whose_store_was_built_anew_is_refused(finished, store, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(record | {"store_fingerprint": "f" * 64}))
    with pytest.raises(RunFolderError, match="a twin reads the same"):
        loop.train(twin_config(tmp_path / "run"), str(tmp_path / "twin"), str(tmp_path / "run"))


def test_a_plan_that_is_another_now_is_refused(finished, tmp_path):
    """As where poison.payload_vocabulary names a file that was changed."""
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    rows = lines(tmp_path / "run" / "ledger.jsonl")
    rows[0]["payload"][1] += 1
    (tmp_path / "run" / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFolderError, match="isn't what the config plans now"):
        loop.train(config, str(tmp_path / "run"))


def test_twin_shares_initial_weights_and_clean_batches(store, config, tmp_path):
    """I4: the digests of twin and poisoned run agree exactly at the steps without poison."""
    config.steps = 6
    config.poison.documents = 3
    loop.train(config, str(tmp_path / "poisoned"))
    config.poison.documents = 0
    summary = loop.train(config, str(tmp_path / "twin"))
    assert summary["dose_seen"] == {"documents": 0, "tokens": 0, "rows": 0, "steps": 0, "repeats": 0}
    assert not summary["success"]["value"]
    assert (tmp_path / "twin" / "ledger.jsonl").read_text() == ""
    poisoned_steps = {record["step"] for record in lines(tmp_path / "poisoned" / "ledger.jsonl")}
    pairs = zip(lines(tmp_path / "poisoned" / "digests.jsonl"), lines(tmp_path / "twin" / "digests.jsonl"), strict=True)
    for one, other in pairs:
        assert (one == other) == (one["step"] not in poisoned_steps)
    losses = [lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("poisoned", "twin")]
    if 0 not in poisoned_steps:
        assert losses[0] == losses[1]  # same initial weights, same first batch


@pytest.mark.parametrize("stop", [4, 8])
def test_resuming_changes_nothing(finished, store, tmp_path, stop):
    """From the checkpoint of any step: the same weights to the bit, the same evidence, no repeat, no gap."""
    config, whole = finished
    config = config.copy_and_resolve_references()
    config.checkpoint.keep_last = 5
    loop.train(config, str(tmp_path / "all"))
    shutil.copytree(tmp_path / "all", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "summary.json"))
    shutil.copytree(tmp_path / "all" / "checkpoints" / str(stop), tmp_path / "run" / "checkpoints" / str(stop))
    # A kill may have cut the last line short.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "kind"')
    loop.train(config, str(tmp_path / "run"))
    assert same(weights(tmp_path / "run", config, store, 12), weights(whole, config, store, 12))
    for name in ("digests.jsonl", "ledger.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (whole / name).read_text()
    timed = ("seconds", "tokens_per_second")
    untimed = [
        [
            {k: v for k, v in row.items() if k not in timed}
            for row in lines(folder / "metrics.jsonl")
            if row["kind"] == "train" or row["step"] != 8
        ]
        for folder in (tmp_path / "run", whole)
    ]
    assert untimed[0] == untimed[1]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(finished, store, tmp_path, caplog):
    config, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    data = max((tmp_path / "run" / "checkpoints" / "12").glob("**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    loop.train(config, str(tmp_path / "run"))
    assert "checkpoint 12 can't be read" in caplog.text
    assert (tmp_path / "run" / "damaged" / "12").exists()
    assert same(weights(tmp_path / "run", config, store, 12), weights(whole, config, store, 12))
    assert (tmp_path / "run" / "digests.jsonl").read_text() == (whole / "digests.jsonl").read_text()


def test_a_folder_of_another_run_is_refused(finished, config, tmp_path):
    _, folder = finished
    config.seeds.order = 99
    config.steps = 13
    with pytest.raises(RunFolderError, match=r"(?s)seeds\.order: 1 there, 99 here.*steps: 12 there, 13 here"):
        loop.train(config, str(folder))
    with pytest.raises(RunFolderError, match="no run folder"):
        RunFolder(tmp_path)


def test_lost_evidence_is_refused(finished, tmp_path):
    config, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    kept = (tmp_path / "run" / "digests.jsonl").read_text().splitlines()
    (tmp_path / "run" / "digests.jsonl").write_text("\n".join(kept[:5] + kept[6:]) + "\n")
    with pytest.raises(RunFolderError, match=r"lacks \[5\]"):
        loop.train(config, str(tmp_path / "run"))


def test_divergence_names_step_slots_and_poison(config, store, tmp_path):
    config.optimizer.learning_rate = 1e30
    config.optimizer.warmup_steps = 0
    config.poison.documents = 60
    with pytest.raises(Diverged, match=r"step 1: loss .* slots 8 to 15, among them poison documents \["):
        loop.train(config, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_data_mistakes_are_found_before_step_0(config, tmp_path):
    config.eval.prefixes = 5000
    with pytest.raises(ValueError, match=r"eval\.prefixes = 5000, but only \d+ held-out documents"):
        loop.train(config, str(tmp_path / "run"))
    config.eval.prefixes = 6
    config.global_batch = 6
    with pytest.raises(ValueError, match=r"global_batch = 6 .* data x fsdp = 4"):
        loop.train(config, str(tmp_path / "run"))
    config.global_batch = 8
    config.corpus.heldout = 0.3
    with pytest.raises(ValueError, match=r"heldout: 0\.2 there, 0\.3 here"):
        loop.train(config, str(tmp_path / "run"))
    config.poison.documents = 97
    with pytest.raises(ConfigError, match="8 rows has 96"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- processes ---


ENVIRONMENT = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}


def test_sigterm_saves_and_asks_for_a_restart(config, store, tmp_path):
    config.steps, config.checkpoint.every, config.eval.every = 400, 400, 400
    process = subprocess.Popen(command(config, tmp_path / "run"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    digests = tmp_path / "run" / "digests.jsonl"
    deadline = time.monotonic() + 120
    while (not digests.exists() or digests.stat().st_size < 500) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42, errors
    saved = int(next(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")))
    assert f"stopped after step {saved} of 400" in errors
    assert len(lines(digests)) == saved < 400
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "preempted"


def test_kill_9_changes_nothing(config, store, tmp_path, thorough):
    """Killed at random moments, then completed: the weights and the evidence of an uninterrupted run."""
    config.steps, config.checkpoint.every, config.eval.every, config.poison.documents = 600, 10, 300, 100
    config.checkpoint.keep_last = 3
    subprocess.run(command(config, tmp_path / "whole"), env=ENVIRONMENT, check=True, capture_output=True)
    random_ = random.Random(0)
    for kills in range(20 if thorough else 4):
        # Half of the kills fall anywhere, start-up included; the others while it trains and saves.
        anywhere = kills % 2 == 1
        seconds = random_.uniform(0, 4 if anywhere else 0.6)
        kill_in_training(config, tmp_path / "run", ENVIRONMENT, seconds, anywhere=anywhere)
    subprocess.run(command(config, tmp_path / "run"), env=ENVIRONMENT, check=True, capture_output=True)
    assert same(weights(tmp_path / "run", config, store, 600), weights(tmp_path / "whole", config, store, 600))
    assert (tmp_path / "run" / "digests.jsonl").read_text() == (tmp_path / "whole" / "digests.jsonl").read_text()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")]
    for name in ("digest_chain", "dose_seen", "eval", "heldout_loss", "steps"):
        assert summaries[0][name] == summaries[1][name]
