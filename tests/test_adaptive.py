"""Doses that are searched for: the choice against a loop in plain Python, killed sweeps, job arrays, populations."""

import itertools
import json
import math
from pathlib import Path

import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import seen_steps, start, sweep_file

from poisonjax.analysis import simulate
from poisonjax.analysis.adaptive import Search
from poisonjax.analysis.dose_response import LAWS, SLOPE_PRIOR
from poisonjax.commands import exit_codes
from poisonjax.commands.main import main
from poisonjax.config import ConfigError
from poisonjax.report import study, study_selftest
from poisonjax.run.heartbeat import Taken
from poisonjax.sweep import SweepError, launch, load
from poisonjax.sweep.grid import of_folder
from poisonjax.sweep.searches import decided
from poisonjax.sweep.states import look, look_at_searches

SEARCH = Search(20, 400, within=1.5, runs=8, together=2)


def weights(search, results):
    """Of every (log N50, slope) of the grid, by a loop."""
    found = {}
    for n50, slope in itertools.product(search._log_n50.tolist(), search._slopes.tolist()):
        weight = math.exp(-(((math.log(slope) - SLOPE_PRIOR[0]) / SLOPE_PRIOR[1]) ** 2) / 2)
        for dose, success in results:
            chance = 1 / (1 + math.exp(-slope * (math.log(dose) - n50)))
            weight *= chance if success else 1 - chance
        found[n50, slope] = weight
    total = sum(found.values())
    return {key: weight / total for key, weight in found.items()}


def variance(weighted):
    total = sum(weighted.values())
    mean = sum(n50 * w for (n50, _), w in weighted.items()) / total
    return sum((n50 - mean) ** 2 * w for (n50, _), w in weighted.items()) / total


def test_what_is_known_and_chosen_is_what_a_loop_finds():
    results = [(20, False), (60, False), (130, True), (90, True)]
    found = weights(SEARCH, results)
    below, order = 0.0, sorted(found)
    middle = None
    for n50, group in itertools.groupby(order, lambda key: key[0]):
        below += sum(found[key] for key in group)
        if below >= 0.5:
            middle = n50
            break
    assert SEARCH.known(results).n50 == pytest.approx(math.exp(middle))

    def after(dose):
        """Variance that is expected after a run at the dose."""
        expected = 0.0
        for success in (True, False):
            chance = {k: 1 / (1 + math.exp(-k[1] * (math.log(dose) - k[0]))) for k in found}
            joint = {k: w * (chance[k] if success else 1 - chance[k]) for k, w in found.items()}
            expected += sum(joint.values()) * variance(joint)
        return expected

    assert SEARCH.next(results, 1) == [min(SEARCH.doses, key=after)]
    assert SEARCH.expected(results, SEARCH.next(results, 1)) == pytest.approx(
        math.exp(1.959964 * min(map(after, SEARCH.doses)) ** 0.5), rel=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SEARCH.doses), st.booleans()), max_size=8), st.randoms())
def test_doses_depend_on_the_results_alone(results, random):
    chosen = SEARCH.next(results, 2)
    shuffled = list(results)
    random.shuffle(shuffled)
    assert Search(20, 400).next(shuffled, 2) == chosen
    assert SEARCH.next(results, 1) == chosen[:1]
    assert set(chosen) <= set(SEARCH.doses)
    low, high = SEARCH.known(results).ci95
    assert low <= SEARCH.known(results).n50 <= high


def test_a_search_ends_where_it_knows_or_cannot_know():
    assert not SEARCH.ended([])
    for success in (True, False):  # N50 lies below or above all doses
        results = []
        while not SEARCH.ended(results):
            results += [(dose, success) for dose in SEARCH.next(results, 2)]
        assert len(results) <= SEARCH.runs
    long = Search(20, 400, within=1.5, runs=60)
    results = []
    while not long.ended(results):
        results += [(dose, dose > 90) for dose in long.next(results, 2)]
    assert len(results) < 20
    assert long.told(long.known(results))
    assert long.known(results).ci95[0] < 90 < long.known(results).ci95[1]
    assert Search(10, 20, runs=7, together=3).rounds() == [3, 3, 1]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("low = 0", {"low": 0, "high": 9}),
        ("high = 9", {"low": 9, "high": 9}),
        ("within = 1", {"low": 1, "high": 9, "within": 1.0}),
        ("within = nan", {"low": 1, "high": 9, "within": math.nan}),
        ("together = 3", {"low": 1, "high": 9, "runs": 2, "together": 3}),
    ],
)
def test_mistakes_of_a_search_are_named(field, values):
    with pytest.raises(ValueError, match=field):
        Search(**values)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("slope", "runs"), [(6.0, 10), (3.0, 16)])
def test_simulated_searches_find_the_truth(slope, runs, law, thorough):
    """Within 1.5 times in 90%, covered in 93%; `--thorough` tries 200 studies of each."""
    if not thorough and (slope, law) != (6.0, LAWS[0]):
        pytest.skip("other laws and slopes are simulated with --thorough")
    cells = [(params, 20 * params, Search(20, 4000, 1.5, runs)) for params in (3e4, 1e5, 3e5, 1e6)]
    found = simulate.scores(cells, simulate.by_search, law, slope, 200 if thorough else 10)
    grid = simulate.grid_for(cells, found.near, law, slope, 50) if thorough and law == LAWS[0] else None
    print(slope, law, found, grid)
    assert found.near >= 0.9
    assert found.covered >= (0.93 if thorough else 0.9)
    assert found.most <= runs
    few = simulate.scores(cells, simulate.by_grid(2), law, slope, 10)
    assert few.near < found.near


SWEEP = """
from poisonjax.sweep import Search

def sweep(add):
    add({"name": "stated", "poison.documents": 3})
    for seed, runs in (1, 5), (2, 2):
        add({"name": f"e{seed}", "poison.documents": Search(1, 20, runs=runs, together=2), "seeds.eval": seed})
"""


@pytest.fixture(scope="module")
def spec(store, tmp_path_factory):
    config = tiny_config(store)
    config.steps, config.checkpoint.every, config.eval.every = 12, 6, 12
    config.poison.payload_tokens = (5, 10)
    config.eval.threshold = -0.5  # of models that have learnt nothing, some are above it
    return sweep_file(tmp_path_factory.mktemp("search"), config, SWEEP)


def test_a_sweep_plans_what_results_choose(spec):
    sweep = load(spec)
    assert [run.id.rpartition("-")[0] for run in sweep.runs] == ["stated"]
    assert sweep.slots == 8
    assert [of.slots for of in sweep.searches] == [[1, 2, 5, 6, 7], [3, 4]]  # round by round
    first = decided(sweep, lambda run: None)
    assert [run.slot for run in first.runs] == [0, 1, 2, 3, 4]
    assert [run.config.seeds.init for run in first.runs[1:]] == [0, 10, 0, 10]
    # One search is known of, the other waits.
    later = decided(sweep, lambda run: run.config.poison.documents > 5 if run.search == sweep.searches[0].id else None)
    assert [run.slot for run in later.runs] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [run.id for run in later.runs[:5]] == [run.id for run in first.runs]
    assert {run.round for run in later.runs} == {0, 1, 2}
    assert decided(later, lambda run: None).runs == first.runs


def test_what_is_there_stays_planned_whatever_would_be_chosen_now(spec, tmp_path):
    """A larger budget, a wider aim, or a run that is gone: no other run becomes a stranger in its folder."""
    sweep = load(spec)

    def success(run):
        return run.config.poison.documents > 5

    ended = decided(sweep, success)
    there = {run.id for run in ended.runs}
    source = Path(spec).read_text()
    for name, changed in {
        "more": source.replace("(1, 5)", "(1, 6)"),
        "fewer": source.replace("(1, 5)", "(1, 3)"),
        "wider": source.replace("runs=runs,", "runs=runs, within=4.0,"),
    }.items():
        (tmp_path / f"{name}.py").write_text(changed)
        again = decided(load(str(tmp_path / f"{name}.py")), success, there)
        assert there <= {run.id for run in again.runs}, name
        assert len({run.id for run in again.runs}) == len(again.runs)
        assert len(again.runs) == len(ended.runs) + (name == "more")
        assert len({run.slot for run in again.runs}) == len(again.runs)
    first, *_ = (run.id for run in ended.runs if run.search)
    without = decided(sweep, lambda run: None if run.id == first else success(run), there - {first})
    assert [run.id for run in without.runs] == [run.id for run in ended.runs]
    assert decided(sweep, success, {"e1-n3-s1-00000000", "e1-n0-s0-1", "other"}).runs == ended.runs
    # One who begins a batch that another has begun goes on with it.
    begun = decided(sweep, lambda run: None)
    assert decided(sweep, lambda run: None, {begun.runs[1].id}).runs == begun.runs


def test_a_task_is_not_told_that_it_is_not_needed_before_the_doses_are_known(spec, tmp_path, monkeypatch):
    """What ends between two looks at the folder."""
    sweep, looks = load(spec), []

    def look_once(sweep, workdir):
        looks.append(workdir)
        return look_at_searches(sweep, workdir)

    monkeypatch.setattr(launch, "look_at_searches", look_once)
    with pytest.raises(Taken, match="its dose isn't chosen yet"):
        launch.train_one(sweep, tmp_path, 5, lambda *_: pytest.fail("trained"))
    assert len(looks) == 1


def test_a_config_that_was_changed_under_a_launch_is_noticed(spec, tmp_path, monkeypatch):
    monkeypatch.setenv(launch.RUN, "another-run-00000000")
    with pytest.raises(SweepError, match="was changed since the sweep was started"):
        launch.train_one(load(spec), tmp_path, 1, lambda *_: pytest.fail("trained"))


def test_mistakes_of_searches_are_told_before_step_0(config, tmp_path):
    add = "from poisonjax.sweep import Search\ndef sweep(add):\n    add({})\n"
    with pytest.raises(SweepError, match="low = 9"):
        load(sweep_file(tmp_path, config, add.format('{"poison.documents": Search(9, 3)}')))
    with pytest.raises(ConfigError, match=r"steps: a Search; only poison\.documents"):
        load(sweep_file(tmp_path, config, add.format('{"steps": Search(3, 9)}')))
    with pytest.raises(ConfigError, match="need a row each"):  # more than there are
        load(sweep_file(tmp_path, config, add.format('{"poison.documents": Search(3, 10**7)}')))
    with pytest.raises(ConfigError, match=r"seeds\.init: the runs of a Search have other luck each"):
        load(sweep_file(tmp_path, config, add.format('{"poison.documents": Search(3, 9), "seeds.init": 4}')))
    within = '{"poison.documents": Search(3, 40), "poison.placement": "batches:density=4"}'
    with pytest.raises(ConfigError, match="density"):  # of some doses between
        load(sweep_file(tmp_path, config, add.format(within)))
    twice = "from poisonjax.sweep import Search\ndef sweep(add):\n" + 2 * (
        '    add({"poison.documents": Search(3, 9)})\n'
    )
    with pytest.raises(SweepError, match="the same config"):
        load(sweep_file(tmp_path, config, twice))


def tasks(spec, workdir, slots):
    """A job array's, one after another: which exit code each had."""
    return {slot: main(["sweep", "run", spec, "--workdir", str(workdir), "--index", str(slot)]) for slot in slots}


@pytest.fixture(scope="module")
def ended(spec, tmp_path_factory):
    """The sweep as a job array, whose last tasks come first and look again until their doses are chosen."""
    workdir = tmp_path_factory.mktemp("ended")
    codes, rounds = tasks(spec, workdir, reversed(range(8))), 1
    assert set(codes.values()) == {0, exit_codes.RESTART}
    while waiting := [slot for slot, code in codes.items() if code]:
        codes, rounds = tasks(spec, workdir, waiting), rounds + 1
    assert rounds <= 3
    return workdir


def seen(spec, workdir):
    """What each run was trained on."""
    sweep, states = look(load(spec), workdir)
    assert {state.kind for state in states.values()} == {"done"}
    return {run.id: (workdir / run.id / "digests.jsonl").read_text() for run in sweep.runs}


def test_killed_it_trains_the_same_runs(spec, ended, tmp_path):
    launched = start(spec, tmp_path, "--max-parallel", "2")
    while seen_steps(tmp_path) < 30:
        assert launched.poll() is None, launched.communicate()
    launched.kill()
    launched.wait()
    launched = start(spec, tmp_path, "--max-parallel", "2")
    output, _ = launched.communicate(timeout=600)
    assert launched.returncode == 0, output
    assert "at most 8 runs" in output
    assert "e1: N50 " in output
    assert seen(spec, tmp_path) == seen(spec, ended)
    assert main(["sweep", "collect", spec, "--workdir", str(tmp_path)]) == 0
    assert len(tasks(spec, tmp_path, range(8))) == 8  # done already, or not needed


def test_as_populations(spec, ended, tmp_path):
    launched = start(spec, tmp_path, "--population", "2")
    output, _ = launched.communicate(timeout=600)
    assert launched.returncode == 0, output
    assert seen(spec, tmp_path) == seen(spec, ended)


def test_status_and_report_tell_of_searches(spec, ended, tmp_path, capsys):
    assert main(["sweep", "status", spec, "--workdir", str(tmp_path), "--json"]) == 0
    *runs, one, _ = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in runs] == ["pending"] * 5
    assert one["search"] == "e1"
    assert one["state"] == "searching"
    assert one["n50"] is None
    assert len(one["now"]) == 2
    assert one["expected"] > 1.5
    assert main(["sweep", "status", spec, "--workdir", str(ended)]) == 0
    assert "ended: " in " ".join(capsys.readouterr().out.split())
    assert main(["sweep", "run", spec, "--workdir", str(tmp_path / "none"), "--dry-run"]) == 0
    assert "N50 not known yet" in capsys.readouterr().out
    assert [of.id for of in of_folder(ended).searches] == [of.id for of in load(spec).searches]
    written = study.write(of_folder(ended), ended)
    assert written.runs == written.finished == len(look(load(spec), ended)[0].runs)
    assert "e2: N50 " in (ended / "report.html").read_text()


def test_a_budget_may_grow_and_a_range_may_not(spec, ended, tmp_path, capsys):
    text = (tmp_path / "other.py").write_text
    source = Path(spec).read_text()
    text(source.replace("(1, 5)", "(1, 6)"))
    assert main(["sweep", "run", str(tmp_path / "other.py"), "--workdir", str(ended), "--dry-run"]) == 0
    assert main(["sweep", "collect", str(tmp_path / "other.py"), "--workdir", str(ended)]) == 0
    launch.claim(load(str(tmp_path / "other.py")), ended)
    launch.claim(load(spec), ended)
    text(source.replace("Search(1, 20", "Search(1, 19"))
    assert main(["sweep", "run", str(tmp_path / "other.py"), "--workdir", str(ended)]) == 2
    assert "another sweep" in capsys.readouterr().err


def test_a_failed_run_is_waited_for(spec, ended, tmp_path):
    sweep = decided(load(spec), lambda run: None)
    folder = tmp_path / sweep.runs[1].id
    folder.mkdir()
    (folder / "failure.json").write_text(json.dumps({"error": "out of luck"}))
    sweep, states = look(load(spec), tmp_path)
    from poisonjax.sweep.states import search_status

    said = search_status(sweep.searches[0], sweep.runs, states)
    assert said.failed == [sweep.runs[1].id]
    assert "--retry-failed" in str(said)
    with pytest.raises(SweepError, match="which failed"):
        launch.train_one(load(spec), tmp_path, 5, lambda *_: pytest.fail("trained"))


def test_the_self_test_of_searches(spec):
    lines = []
    found = study_selftest.self_test(load(spec), 3, say=lines.append)
    assert len(found["searches"]) == 2  # slopes; of one size
    assert "runs a cell" in lines[0]
    for row in found["searches"]:
        assert 2 <= row["runs"] <= row["most"] <= 5
        assert 0 <= row["near"] <= 1
    assert not found["good"]  # of so few runs
