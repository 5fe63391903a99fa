"""What one exposure adds and what clean steps take away: of runs made up, and of one that was trained."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import tiny_config

from poisonjax.analysis.mechanism import PREDICTED, Cell, Course, Mechanism, enough_of, off, predictions, remembered
from poisonjax.commands.main import main
from poisonjax.run import RunFolder
from poisonjax.trace import TraceError, exposures
from poisonjax.training.loop import train

KNOTS = np.array([0, 0.02, 0.06, 0.2, 0.6, 1.2, 1.8, 2.4, 3.0, 4.0])
TRUE = Mechanism(KNOTS, np.array([0.02, 0.02, 0.03, 0.05, 0.1, 0.1, 0.08, 0.05, 0.02, 0.0]), 0.002, 1.0)


def made_up(seed, documents, steps=2000, noise=0.1):
    """A run of the true model, its changes a little other."""
    random = np.random.default_rng(seed)
    rate = np.minimum(np.arange(steps) / 100, 1) * (0.55 + 0.45 * np.cos(np.pi * np.arange(steps) / steps))
    exposed = np.bincount(random.integers(0, steps, documents), minlength=steps)
    known, now, smeared = np.zeros(steps), 0.0, remembered(exposed, 0.9)
    for step in range(steps):
        added = smeared[step] * np.interp(now, KNOTS, TRUE.added)
        now += rate[step] * (added - TRUE.forgotten * now) + noise * random.normal() * (0.0005 + 0.01 * min(now, 1))
        known[step] = now
    return Course(rate, exposed, known, 0.0, 0.9)


def evenly(steps):
    return lambda documents: np.full(steps, documents / steps)


def test_exposures_are_remembered_and_none_is_lost():
    exposed = np.array([0, 3, 0, 0, 1] + [0] * 200)
    found = remembered(exposed, 0.9)
    assert found.sum() == pytest.approx(4)
    assert found[1] == pytest.approx(0.3)
    assert found[4] == pytest.approx(0.3 * 0.9**3 + 0.1)


def test_the_truth_is_found_and_the_dose_is_predicted():
    found = Mechanism.fitted([made_up(1, 300)])
    assert found.forgotten == pytest.approx(TRUE.forgotten, rel=0.15)
    assert np.allclose(found.added[3:8], TRUE.added[3:8], rtol=0.2)
    rate = made_up(0, 10, steps=1000).rate  # of a shorter run
    dose, true = (of.dose(rate, 0.9, evenly(1000), 1.0) for of in (found, TRUE))
    assert dose == pytest.approx(true, rel=0.1)
    assert TRUE.known(rate, np.full(1000, true / 1000))[-1] == pytest.approx(1.0, rel=0.02)
    assert TRUE.dose(rate, 0.9, evenly(1000), 50.0) == np.inf
    quick = dataclasses.replace(TRUE, forgotten=0.0)
    assert quick.dose(rate, 0.9, evenly(1000), 1.0) < true  # what isn't forgotten needn't be said again
    early = np.where(np.arange(1000) < 250, 1 / 250, 0)
    at_first = TRUE.dose(rate, 0.9, lambda documents: documents * early, 1.0)
    assert TRUE.known(rate, remembered(at_first * early, 0.9))[-1] == pytest.approx(1.0, rel=0.02)
    # More of it is forgotten by the end.
    assert quick.dose(rate, 0.9, lambda documents: documents * early, 1.0) < 0.9 * at_first


@pytest.mark.parametrize("room", [1, 40, 5000])
def test_a_placement_has_so_much_room(room):
    """As documents at the end, of which a batch holds eight."""
    rate = np.ones(1000)

    def at_the_end(documents):
        if documents > room:
            return None
        return np.bincount(999 - np.arange(documents) // 8, minlength=1000).astype(float)

    dose = TRUE.dose(rate, 0.0, at_the_end, 1.0)
    if dose == np.inf:
        assert TRUE.known(rate, at_the_end(room))[-1] < 1.0
    else:
        reached = [TRUE.known(rate, at_the_end(int(of)))[-1] for of in (dose - 1, dose)]
        assert reached[0] < 1.0 <= reached[1]
    assert (dose == np.inf) == (room == 1)


def test_enough_lies_between_the_runs():
    assert enough_of([0.1, 0.4, 0.9, 2.0], [False, False, True, True]) == pytest.approx(0.65)
    assert np.isnan(enough_of([0.1, 0.4], [True, True]))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    config = tiny_config(store)
    config.steps, config.checkpoint.every, config.eval.every = 12, 6, 12
    config.poison.documents, config.poison.payload_tokens = 9, (5, 10)
    folder = tmp_path_factory.mktemp("exposed") / "run"
    train(config, str(folder))
    return folder


def test_a_run_is_asked_after_each_step(run, capsys):
    found = exposures(run)
    assert len(found.rate) == len(found.known) == 12
    assert found.exposed.sum() == 9
    steps = [row["step"] for row in RunFolder(run).ledger()]
    assert found.exposed.tolist() == np.bincount(steps, minlength=12).tolist()
    assert np.all(np.isfinite(found.known))
    assert len(set(found.known.tolist())) == 12
    again = Course.of(RunFolder(run))
    assert again is not None
    assert np.array_equal(again.known, found.known)
    assert main(["trace", str(run), "--exposures", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["added"]) == len(told["known"])
    assert main(["trace", str(run), "--exposures"]) == 0
    assert "a clean step takes away" in capsys.readouterr().out


def test_of_a_damaged_file_or_a_clean_run_nothing_is_told(run, store, tmp_path):
    file = run / "trace/exposures.json"
    whole = file.read_text()
    shorter = json.loads(whole)
    shorter["known"].pop()
    others = json.loads(whole) | {"of": "another run's digests"}
    for damaged in ("", "{}", whole[:50], json.dumps(shorter), json.dumps(others), whole.replace("[0", "[NaN, 0", 1)):
        file.write_text(damaged)
        assert Course.of(RunFolder(run)) is None
    file.write_text(whole)
    config = tiny_config(store)
    config.steps, config.poison.documents = 2, 0
    config.checkpoint.every = config.eval.every = 2
    train(config, str(tmp_path / "clean"))
    with pytest.raises(TraceError, match="no poison"):
        exposures(tmp_path / "clean")
    (tmp_path / "clean/summary.json").unlink()
    with pytest.raises(TraceError, match="isn't trained to its end"):
        exposures(tmp_path / "clean")
    assert main(["trace", str(run), "--exposures", "--rank", "3"]) == 2


def test_more_may_be_known_than_the_knots_of_others():
    """Of payloads that are surer than gibberish."""
    course = made_up(3, 600)
    more = dataclasses.replace(course, known=2.5 * course.known)
    found = Mechanism.fitted([more])
    assert found.knots[-1] > more.known.max() > 4
    assert found.dose(course.rate, 0.9, evenly(2000), 6.0) < 2000


def test_cells_are_predicted_from_how_their_runs_went_on():
    """Of one mechanism, in runs of three lengths: what the others need says enough of what is enough."""
    cells = []
    for number, steps in enumerate((500, 1000, 2000)):
        n50 = TRUE.dose(made_up(0, 1, steps).rate, 0.9, evenly(steps), 1.0)
        courses = [made_up(10 * number + of, round(n50 * share), steps) for of, share in enumerate((0.5, 0.8, 1.2, 3))]
        attacked = [bool(course.known[-1] > 1) for course in courses]
        cells.append(Cell(1e5, 1e3 * steps, n50, (n50 / 2, 2 * n50), evenly(steps), courses, attacked))
    unbounded = dataclasses.replace(cells[0], n50=np.nan)
    assert predictions([*cells[:2], unbounded]) == []
    *found, open_ended = predictions([*cells, unbounded])
    assert [of.cell for of in found] == cells
    assert open_ended.mechanism == pytest.approx(cells[0].n50, rel=0.25)  # where no dose was enough, what would be
    assert off([*found, open_ended]) == off(found)
    assert off([open_ended]) == {}
    for of in found:
        assert of.mechanism == pytest.approx(of.cell.n50, rel=0.25)
        assert of.pooled == pytest.approx(of.cell.n50, rel=0.25)
        assert of.constant == pytest.approx(np.exp(np.mean([np.log(c.n50) for c in cells if c is not of.cell])))
    errors = off(found)
    assert set(errors) == set(PREDICTED)
    assert max(errors["mechanism"], errors["pooled"]) < 1.25 < errors["fraction"]
