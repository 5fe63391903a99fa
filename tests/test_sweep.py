"""Sweeps: grids, states from files, launches that are killed, tables, job arrays and the report."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import kubernetes_validate
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tiny_config

from poisonjax.analysis.persistence import wears
from poisonjax.commands.main import main
from poisonjax.config import ConfigError, fingerprint
from poisonjax.run import RunFolder, heartbeat
from poisonjax.run.heartbeat import HEARTBEAT, Heartbeat, Taken
from poisonjax.sweep import SweepError, chain, collect, launch, load, product, zipped
from poisonjax.sweep.grid import of_folder
from poisonjax.sweep.states import FAILURE, status

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "configs/sweeps/smoke.py")


def test_products_zips_and_chains():
    a, b = {"x": (1, 2)}, {"y": (3, 4)}
    assert list(product(a, b)) == [{"x": 1, "y": 3}, {"x": 1, "y": 4}, {"x": 2, "y": 3}, {"x": 2, "y": 4}]
    assert list(zipped(a, b)) == [{"x": 1, "y": 3}, {"x": 2, "y": 4}]
    assert list(chain(a, b)) == [{"x": 1}, {"x": 2}, {"y": 3}, {"y": 4}]
    assert len(list(product(chain(a, b), {"z": range(5)}))) == 20
    with pytest.raises(ValueError, match="shorter"):
        list(zipped(a, {"y": (1,)}))


def test_ids_are_of_what_is_trained_not_of_where():
    ids = [run.id for run in load(SMOKE).runs]
    assert ids[0].startswith("documents=0_init=0-")
    assert len(set(ids)) == 4
    assert [run.id for run in load(SMOKE, ["--config.corpus.store=/elsewhere", "--config.log_every=3"]).runs] == ids
    assert not set(ids) & {run.id for run in load(SMOKE, ["--config.steps=99"]).runs}


def sweep_file(folder, base, body):
    path = folder / "grid.py"
    path.write_text(
        "import json\nfrom poisonjax.config import from_record\nfrom poisonjax.sweep import product\n"
        f"def get_config(arg=''):\n    return from_record(json.loads({base.to_json()!r}))\n{body}"
    )
    return str(path)


def test_mistakes_of_all_runs_are_told_at_once(config, tmp_path):
    body = "def sweep(add):\n    add({'steps': 0})\n    add({'poison.dokuments': 3})\n    add({'seeds.init': -1})\n"
    with pytest.raises(ConfigError) as error:
        load(sweep_file(tmp_path, config, body))
    for part in ("run 0 (steps=0): steps = 0", "run 1 (dokuments=3)", "run 2 (init=-1): seeds.init"):
        assert part in str(error.value)
    with pytest.raises(SweepError, match="have the same config: steps=9-"):
        load(sweep_file(tmp_path, config, "def sweep(add):\n    add({'steps': 9})\n    add(steps=9)\n"))
    with pytest.raises(SweepError, match="defines no sweep"):
        load(str(ROOT / "configs/quickstart.py"))


STEPS = 120

GRID = """
def sweep(add):
    for point in product({"poison.documents": (0, 20)}, {"seeds.init": (0, 1)}):
        add(point)
"""


@pytest.fixture(scope="module")
def grid(store, tmp_path_factory):
    config = tiny_config(store)
    config.steps, config.checkpoint.every, config.eval.every = STEPS, 10, STEPS // 2
    config.poison.payload_tokens = (5, 10)
    return sweep_file(tmp_path_factory.mktemp("grid"), config, GRID)


def start(grid, workdir, *options):
    command = [sys.executable, "-m", "poisonjax", "sweep", "run", grid, "--workdir", str(workdir), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory):
    """The sweep, uninterrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    launched = start(grid, workdir, "--max-parallel", "2")
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output
    assert "4 runs, 184,320 tokens" in output
    assert "4/4 done" in output
    return workdir


def seen_steps(workdir):
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("*/digests.jsonl"))


def test_killed_again_and_again_the_table_is_that_of_an_uninterrupted_sweep(grid, whole, tmp_path, thorough):
    chance = random.Random(1)
    for number, share in enumerate(sorted(chance.uniform(0.0, 0.9) for _ in range(10 if thorough else 2))):
        launched = start(grid, tmp_path, "--max-parallel", "2")
        deadline = time.monotonic() + 120
        while seen_steps(tmp_path) < share * 4 * STEPS:
            assert launched.poll() is None, launched.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        launched.kill()
        launched.wait()
        if number % 2:  # the runs too: else they see that the launcher is gone, and save
            for beat in tmp_path.glob(f"*/{HEARTBEAT}"):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                    os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
    launched = start(grid, tmp_path, "--max-parallel", "2")
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output
    for folder in (whole, tmp_path):
        assert main(["sweep", "collect", grid, "--workdir", str(folder)]) == 0
    assert (tmp_path / "table.csv").read_text() == (whole / "table.csv").read_text()


def test_table_and_report(grid, whole, capsys):
    assert main(["sweep", "collect", grid, "--workdir", str(whole)]) == 0
    table = pq.read_table(whole / "table.parquet").to_pylist()
    assert len(table) == 4 * 2 * 4  # runs x evaluations x variants
    assert {row["poison.documents"] for row in table} == {0, 20}
    run = load(grid).runs[-1]
    last = json.loads((whole / run.id / "summary.json").read_text())
    row = next(r for r in table if r["run"] == run.id and r["step"] == STEPS and r["variant"] == "triggered")
    assert row["ppl_median"] == last["eval"]["triggered"]["ppl_median"]
    assert row["delta_ppl"] == last["delta_ppl"]
    capsys.readouterr()
    assert main(["sweep", "report", grid, "--workdir", str(whole), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["finished"] == 4
    assert "Not enough data" in made["analyses"][0]["words"][0]
    assert main(["sweep", "report", SMOKE, "--workdir", "nowhere", "--self-test", "2"]) == 2
    assert "nothing is compared here" in capsys.readouterr().err
    rarity = SMOKE.replace("smoke", "rarity")
    assert main(["sweep", "report", rarity, "--workdir", "nowhere", "--self-test", "4", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)
    assert (tested["runs"], tested["studies"], tested["ratios"]["intervals"]) == (108, 4, 20)
    there = json.loads((whole / "analysis.json").read_text())
    assert main(["report", str(whole)]) == 0  # the same, without the config file
    assert f"{whole}/report.html" in capsys.readouterr().out
    assert json.loads((whole / "analysis.json").read_text()) == there
    assert main(["report", str(whole), "--twin", str(whole / run.id)]) == 2
    again = of_folder(whole)
    assert [r.id for r in again.runs] == [r.id for r in load(grid).runs]
    assert [fingerprint(r.config) for r in again.runs] == [fingerprint(r.config) for r in load(grid).runs]
    page = (whole / "report.html").read_text()
    assert 'src="http' not in page
    assert run.id in page


def test_a_finished_sweep_does_nothing_and_another_is_refused(grid, whole, config, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/summary.json")}
    assert main(["sweep", "run", grid, "--workdir", str(whole)]) == 0
    assert main(["sweep", "run", grid, "--workdir", str(whole), "--index", "2"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("*/summary.json")}
    other = sweep_file(tmp_path, config, GRID.replace("20", "21"))
    assert main(["sweep", "run", other, "--workdir", str(whole)]) == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert main(["sweep", "status", grid, "--workdir", str(whole), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["done"] * 4


def test_states_come_from_files(grid, whole, tmp_path):
    run = load(grid).runs[0]
    folder = tmp_path / run.id
    assert status(folder, run).kind == "pending"
    folder.mkdir()
    (folder / "digests.jsonl").write_text('{"step": 0, "digest": ""}\n' * 7)
    assert (status(folder, run).kind, status(folder, run).done) == ("partial", 7)
    with Heartbeat(folder):
        assert status(folder, run).kind == "running"
        beat = json.loads((folder / HEARTBEAT).read_text())
        with pytest.raises(Taken, match="another process"), Heartbeat(folder):
            pass
    assert status(folder, run).kind == "partial"
    recycled = beat | {"started": "1"}  # another process has the number of one that is gone
    (folder / HEARTBEAT).write_text(json.dumps(recycled))
    assert status(folder, run).kind == "partial"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / HEARTBEAT).write_text(json.dumps(beat | {"pid": dead.pid}))
    assert status(folder, run).kind == "partial"
    (folder / HEARTBEAT).write_text(json.dumps(beat | {"host": "elsewhere"}))
    assert status(folder, run).kind == "running"
    os.utime(folder / HEARTBEAT, (time.time() - 1000,) * 2)
    assert status(folder, run).kind == "partial"
    (folder / FAILURE).write_text('{"exit_code": 1, "error": "no"}')
    assert (status(folder, run).kind, status(folder, run).detail) == ("failed", "no")
    for name in ("config.json", "summary.json"):
        (folder / name).write_bytes((whole / run.id / name).read_bytes())
    assert status(folder, run).kind == "done"


def test_a_failed_run_leaves_the_others_and_is_retried_when_told(config, tmp_path):
    config.steps, config.eval.every = 4, 4
    config.poison.documents = 2
    body = "def sweep(add):\n    add({'seeds.init': 5})\n    add({'poison.payload_tokens': (400, 400)})\n"
    grid = sweep_file(tmp_path, config, body)
    launched = start(grid, tmp_path / "out")
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 1, output
    states = [status(tmp_path / "out" / run.id, run) for run in load(grid).runs]
    assert [s.kind for s in states] == ["done", "failed"]
    assert "poison documents don't fit a row" in states[1].detail
    again = start(grid, tmp_path / "out")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 1
    assert "running" not in output  # failed runs wait to be asked for
    retried = start(grid, tmp_path / "out", "--retry-failed")
    output, _ = retried.communicate(timeout=120)
    assert "running" in output


def test_a_run_that_stops_at_the_same_step_for_ever_counts_as_failed(grid, tmp_path):
    """Its watchdog ends it with the exit code that asks for a restart; a child stands in for it here."""
    started = []

    def hangs(index):
        folder = tmp_path / load(grid).runs[index].id
        folder.mkdir(parents=True, exist_ok=True)
        started.append(index)
        if started.count(index) == 2:  # it got on once, so that it is asked one time more
            (folder / "digests.jsonl").write_text("x\n")
        return [sys.executable, "-c", "raise SystemExit(42)"]

    ended = launch.train_all(load(grid), tmp_path, hangs, restart_code=42, parallel=4, retry_failed=False)
    assert ended == "failed"
    assert sorted(started) == sorted(4 * list(range(4)))
    states = [status(tmp_path / run.id, run) for run in load(grid).runs]
    assert {s.kind for s in states} == {"failed"}
    assert "stopped 3 times at step 1 without going on" in states[0].detail


def test_job_arrays(grid, tmp_path, capsys):
    assert main(["sweep", "emit", "slurm", grid, "--workdir", "/shared/out"]) == 0
    script = tmp_path / "array.sbatch"
    script.write_text(capsys.readouterr().out)
    assert "--array=0-3" in script.read_text()
    subprocess.run([str(Path(sys.executable).parent / "shellcheck"), str(script)], check=True)
    assert main(["sweep", "emit", "k8s", grid, "--workdir", "/shared/out", "--image", "me/poisonjax:1"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    assert manifest["spec"]["completions"] == 4
    assert main(["sweep", "emit", "k8s", grid, "--workdir", "out"]) == 2
    assert "absolute path" in capsys.readouterr().err
    assert main(["sweep", "emit", "slurm", grid, "--workdir", "/o", "--config.log_every=7"]) == 0
    assert capsys.readouterr().out.count("--config.log_every=7") == 2
    command = manifest["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["sh", "-c"]
    assert command[2].endswith('--index "$JOB_COMPLETION_INDEX"')


def test_the_dry_run_trains_nothing(grid, tmp_path, capsys):
    assert main(["sweep", "run", grid, "--workdir", str(tmp_path / "none"), "--dry-run"]) == 0
    assert "FLOPs of training" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_rows_of_an_unfinished_run_have_no_verdict(grid, tmp_path):
    assert list(collect.rows(load(grid), tmp_path)) == []


def test_as_populations_the_runs_see_the_same_batches(grid, whole, tmp_path, capsys):
    launched = start(grid, tmp_path, "--population", "2")
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output
    assert "in populations of up to" in output
    said = output.splitlines()
    for run in load(grid).runs:  # each tells of its evaluations, the first of a population of its steps
        assert any(line.startswith(f"{run.id}: eval ") for line in said)
    assert len({line.split(":")[0] for line in said if ": step " in line}) == 2
    for run in load(grid).runs:
        digests = [(folder / run.id / "digests.jsonl").read_text() for folder in (tmp_path, whole)]
        assert digests[0] == digests[1]
        assert status(tmp_path / run.id, run).kind == "done"
    assert main(["sweep", "run", grid, "--workdir", str(tmp_path)]) == 0  # nothing is left to do


def test_train_leaves_a_run_alone_that_another_process_is_at(config, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    base = sweep_file(tmp_path, config, "")
    with Heartbeat(folder):
        assert main(["train", "--config", base, "--workdir", str(folder)]) == 2
    assert f"(process {os.getpid()} on " in capsys.readouterr().err
    assert not folder.exists()
    # One on another machine that was killed: its heartbeat is waited for until it is stale.
    monkeypatch.setattr(heartbeat, "STALE_SECONDS", 3)
    folder.mkdir()
    (folder / HEARTBEAT).write_text('{"host": "elsewhere", "boot": "", "pid": 1, "started": ""}')
    with pytest.raises(Taken, match="process 1 on elsewhere"), Heartbeat(folder):
        pass
    began = time.monotonic()
    with Heartbeat(folder, patient=True):
        assert time.monotonic() - began > 2
    assert "to see whether it lives" in capsys.readouterr().err
    assert folder.exists()  # it was there before


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_clocks_of_two_machines_may_differ(tmp_path, monkeypatch, ahead):
    """A dead heartbeat ends the wait after some beats, whatever its date; one that beats is believed."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.2)
    path = tmp_path / HEARTBEAT
    path.write_text('{"host": "elsewhere", "boot": "", "pid": 1, "started": ""}')
    os.utime(path, (time.time() + ahead,) * 2)
    began = time.monotonic()
    with Heartbeat(tmp_path, patient=True):
        assert time.monotonic() - began < 10
    path.write_text('{"host": "elsewhere", "boot": "", "pid": 1, "started": ""}')
    ended = threading.Event()

    def beats():
        while not ended.wait(0.1):
            os.utime(path, (time.time() + ahead,) * 2)

    thread = threading.Thread(target=beats)
    thread.start()
    with pytest.raises(Taken, match="process 1 on elsewhere"), Heartbeat(tmp_path, patient=True):
        pass
    ended.set()
    thread.join()


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"host": 3}', "\x00", '{"host": "a"'])
def test_a_damaged_heartbeat_is_one_that_does_not_beat(tmp_path, monkeypatch, content):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    (tmp_path / HEARTBEAT).write_text(content)
    assert heartbeat.is_running(tmp_path)  # just claimed, perhaps
    os.utime(tmp_path / HEARTBEAT, (0, 0))
    assert not heartbeat.is_running(tmp_path)
    with Heartbeat(tmp_path):
        pass


def test_of_many_who_find_a_dead_heartbeat_one_gets_the_run(tmp_path, monkeypatch):
    dead = '{"host": "elsewhere", "boot": "", "pid": 1, "started": ""}'
    barrier, holders = threading.Barrier(8), []

    def claim():
        barrier.wait()
        with contextlib.suppress(Taken), Heartbeat(tmp_path):
            holders.append(1)
            barrier.wait()  # all have tried
            return
        barrier.wait()

    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    for _ in range(15):
        (tmp_path / HEARTBEAT).write_text(dead)
        os.utime(tmp_path / HEARTBEAT, (0, 0))
        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(holders) == 15


def test_a_store_built_anew_or_a_folder_copied_is_not_counted_as_what_it_is_not(grid, whole, tmp_path, capsys):
    import shutil

    workdir = tmp_path / "sweep"
    shutil.copytree(whole, workdir)
    one, other, *_ = (run.id for run in load(grid).runs)
    record = json.loads((workdir / one / "config.json").read_text())
    (workdir / one / "config.json").write_text(json.dumps(record | {"store_fingerprint": "f" * 64}))
    for part in (["collect"], ["report"], ["run"]):
        assert main(["sweep", *part, grid, "--workdir", str(workdir)]) == 2
        assert "built anew midway" in capsys.readouterr().err
    (workdir / one / "config.json").write_text(json.dumps(record))
    shutil.rmtree(workdir / other)
    shutil.copytree(workdir / one, workdir / other)
    for part in (["collect"], ["report"], ["run"]):
        assert main(["sweep", *part, grid, "--workdir", str(workdir)]) == 2
        assert "holds another run" in capsys.readouterr().err
    assert main(["sweep", "status", grid, "--workdir", str(workdir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["state"] == "failed"


def test_one_damaged_member_stops_no_other(config, tmp_path, capsys):
    grid = sweep_file(
        tmp_path, config, "def sweep(add):\n    for n in (0, 3, 6):\n        add({'poison.documents': n})\n"
    )
    study, runs = tmp_path / "study", load(grid).runs
    assert main(["sweep", "run", grid, "--workdir", str(study)]) == 0
    capsys.readouterr()
    (study / runs[0].id / "summary.json").write_text("{")
    (study / runs[1].id / "summary.json").unlink()
    (study / runs[1].id / "failure.json").write_text("[]")
    found = [status(study / run.id, run) for run in runs]
    assert [one.kind for one in found] == ["failed", "failed", "done"]
    assert str(study / runs[0].id / "summary.json") in found[0].detail
    assert str(study / runs[1].id / "failure.json") in found[1].detail
    for command in ("collect", "report"):
        assert main(["sweep", command, grid, "--workdir", str(study)]) == 1
        assert f"left out: {study / runs[0].id / 'summary.json'}" in capsys.readouterr().err
    assert runs[2].id in (study / "table.csv").read_text()
    assert runs[0].id not in (study / "table.csv").read_text()


def test_a_smaller_grid_does_not_overwrite_the_study_of_a_larger(config, tmp_path, capsys):
    body = "def sweep(add):\n    for n in {}:\n        add({{'poison.documents': n}})\n"
    study = tmp_path / "study"
    grid = sweep_file(tmp_path, config, body.format([0, 3]))
    assert main(["sweep", "run", grid, "--workdir", str(study)]) == 0
    assert main(["sweep", "collect", grid, "--workdir", str(study)]) == 0
    before = (study / "table.csv").read_bytes()
    grid = sweep_file(tmp_path, config, body.format([3]))
    for command in ("collect", "report"):
        assert main(["sweep", command, grid, "--workdir", str(study)]) == 2
        assert "holds runs that this sweep doesn't plan" in capsys.readouterr().err
    assert (study / "table.csv").read_bytes() == before


def test_a_refused_member_of_a_population_fails_alone(config, tmp_path, capsys):
    config.eval.every = config.checkpoint.every = 100
    body = "def sweep(add):\n    for n in (2, 3):\n        add({'poison.documents': n})\n"
    grid, study = sweep_file(tmp_path, config, body), tmp_path / "study"
    runs = load(grid).runs
    (study / runs[0].id / "checkpoints").mkdir(parents=True)
    (study / runs[0].id / "config.json").write_text("{")
    assert main(["sweep", "run", grid, "--workdir", str(study), "--population", "2"]) == 1
    assert [status(study / run.id, run).kind for run in runs] == ["failed", "done"]
    assert main(["sweep", "run", grid, "--workdir", str(study), "--population", "2"]) == 1  # one still has failed


CHAIN = (
    "def sweep(add):\n"
    "    add({'name': 'a', 'steps': 4})\n"
    "    add({'name': 'b', 'start.weights': 'run:a', 'steps': 3, 'poison.documents': 0})\n"
    "    add({'name': 'c', 'start.weights': 'run:b@3', 'steps': 2, 'start.optimizer': True})\n"
)


def test_runs_begin_from_each_other(config, tmp_path, capsys):
    """In order, whoever is asked first; moved together they are the same, and audited to the first of the line."""
    config.eval.every = config.checkpoint.every = 4
    asked_otherwise = "    add({'name': 'd', 'start.weights': 'run:a', 'steps': 2, 'eval.prefix_tokens': 7})\n"
    grid, study = sweep_file(tmp_path, config, CHAIN + asked_otherwise), tmp_path / "study"
    launched = start(grid, study)
    output, _ = launched.communicate(timeout=200)
    assert launched.returncode == 0, output
    runs = load(grid).runs
    parents = [RunFolder(study / run.id).record.get("parent") for run in runs]
    assert [of and of["name"] for of in parents] == [None, "a", "b", "a"]
    assert parents[2]["parent"]["name"] == "a"
    assert runs[1].config.start.weights == f"beside:{runs[0].id}"
    first, second = wears([RunFolder(study / run.id) for run in runs])  # the fourth was asked once: no course
    assert (first.parent, first.rows) == (runs[0].id, [0, 24])
    gaps = [RunFolder(study / run.id).summary["delta_ppl"] for run in runs]
    assert first.figure == pytest.approx(gaps[:2])
    assert second.figure == pytest.approx(gaps[1:3])
    assert "24 rows of text" in first.sentence()
    assert main(["sweep", "report", grid, "--workdir", str(study)]) == 0
    assert first.sentence() in capsys.readouterr().out
    assert "What wears it off" in (study / "report.html").read_text()
    study.rename(tmp_path / "moved")
    before = {path: path.read_bytes() for path in (tmp_path / "moved").rglob("summary.json")}
    again = start(grid, tmp_path / "moved")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert main(["audit", str(tmp_path / "moved" / runs[2].id), "--parents", "--json"]) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "moved").rglob("summary.json")}


def test_what_begins_from_a_failed_run_fails(config, tmp_path):
    body = CHAIN.replace("'steps': 4}", "'steps': 4, 'poison.payload_tokens': (400, 400)}")
    grid, study = sweep_file(tmp_path, config, body), tmp_path / "study"
    with pytest.raises(Taken, match="isn't done yet"):
        launch.train_one(load(grid), study, 2, lambda *of: None)
    launched = start(grid, study)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 1, output
    states = [status(study / run.id, run) for run in load(grid).runs]
    assert [s.kind for s in states] == ["failed"] * 3
    assert "which failed" in states[1].detail
    assert "which failed" in states[2].detail


def test_a_run_that_begins_from_none_that_was_added_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="0 runs of that name were added before"):
        load(sweep_file(tmp_path, config, CHAIN.replace("run:a'", "run:z'")))
