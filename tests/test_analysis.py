"""Dose-response analysis against brute force, known truths and degenerate studies."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.analysis import persistence, simulate
from poisonjax.analysis.dose_response import Trials, _curve, best_law, contrasts, doses, exponents, held_out, rises
from poisonjax.analysis.estimators import ESTIMATORS, hierarchical, onset
from poisonjax.analysis.sensitivity import GAPS, THRESHOLDS, sensitivity
from poisonjax.analysis.study import Conditions, Outcome, Scored, analyse
from poisonjax.report import study_figures

ONE = Conditions((), [()], [])


def design(doses=(60, 120, 250, 500, 1000), seeds=3):
    cells = [(20, 30_480), (20, 92_444), (20, 314_800), (40, 30_480), (40, 92_444)]
    rows = [(dose, ratio * params, params, 0) for ratio, params in cells for dose in doses for _ in range(seeds)]
    numbers = np.arange(len(rows), dtype=float)
    return Trials(*np.array(rows, float).T, run=numbers, condition=np.zeros(len(rows)))


def studied(law, seed=0, **size):
    return simulate.study(design(**size), law, np.random.default_rng(seed))


@given(st.integers(0, 2**32 - 1))
def test_gradient_is_that_of_finite_differences(seed):
    random = np.random.default_rng(seed)
    trials = studied("constant fraction", seed)
    curve = _curve(trials, [np.ones_like(trials.dose), np.log(trials.params)], odds=1.0)
    at = np.array([*random.normal(0, 0.5, 2), random.normal(1.5, 0.3)])
    _, gradient = curve.penalised(at)
    steps = np.eye(3) * 1e-6
    numeric = [(curve.penalised(at + s)[0] - curve.penalised(at - s)[0]) / 2e-6 for s in steps]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)


def test_interval_is_the_profile_of_a_brute_force_grid():
    trials = studied("constant count", 3)
    one = trials.take(trials.cells() == 0)
    curve = _curve(one, [np.ones_like(one.dose)])
    value, low, high = curve.interval(0, 0.95, reach=10)
    thetas, slopes = np.linspace(2, 9, 1401), np.log(np.geomspace(0.3, 25, 400))
    profile = np.array([min(curve.penalised(np.array([t, k]))[0] for k in slopes) for t in thetas[::7]])
    bound = scipy.stats.f.ppf(0.95, 1, len(one.dose) / 2 - 2) / 2
    inside = thetas[::7][profile - profile.min() < bound]
    assert abs(value - thetas[::7][profile.argmin()]) < 0.04
    np.testing.assert_allclose((low, high), (inside[0], inside[-1]), atol=0.05)


def test_interval_ends_where_no_slope_is_likely_enough():
    """A steep and a flat curve are both local optima here: which is found mustn't hang on what was tried last."""
    rows = []
    for size, of_15 in enumerate([7, 10, 6, 9]):
        for dose, successes in ((20, 0), (75, 0), (283, of_15), (1064, 15), (4000, 15)):
            rows += [(dose, 1.0, size, i < successes, len(rows) + i, 0) for i in range(15)]
    trials = Trials.of(rows)
    curve = _curve(trials, [(trials.params == size).astype(float) for size in range(4)], odds=math.log(9.0))
    value, low, high = curve.interval(2, 0.95, reach=12)
    least = curve.penalised(curve.fit())[0] + scipy.stats.f.ppf(0.95, 1, 300 / 5 - 2) / 2

    def excess(at):
        slopes = np.geomspace(1, 25, 9)
        return min(curve.penalised(curve.fit((2, at), np.append(curve.middle, math.log(k))))[0] for k in slopes) - least

    assert low < value < high
    for end, inwards in (low, 0.01), (high, -0.01):
        assert excess(end - inwards) > 0 > excess(end + inwards)


def test_perfectly_separated_doses_give_an_interval_and_unreached_ones_none():
    n = np.repeat([10.0, 20, 40, 80], 3)
    ones = np.ones(12)
    cell = doses(Trials(n, ones, ones, (n > 30).astype(float), np.arange(12.0), np.zeros(12)))[0]
    assert 20 < cell.n50 < 40
    assert 10 < cell.n50_ci95[0] < 25
    assert 32 < cell.n50_ci95[1] < 80
    assert cell.n90 > cell.n50
    never = doses(Trials(n, ones, ones, np.zeros(12), np.arange(12.0), np.zeros(12)))[0]
    assert never.n50_ci95[1] == math.inf
    assert never.n50_ci95[0] > 40


def test_data_in_reverse_have_no_half_dose():
    """A curve that can only rise would find one."""
    n, ones = np.repeat([10.0, 20, 40, 80, 160], 3), np.ones(15)
    reversed_ = Trials(n, ones, ones, (n < 50).astype(float), np.arange(15.0), np.zeros(15))
    assert not rises(reversed_)
    one = Conditions((), [()], [0] * 15)
    analysis = analyse("runs", "documents", reversed_, one)
    assert not analysis.cells
    assert "success doesn't rise with the dose" in analysis.words[0]
    # Beside a cell in which it rises, as steeply: that one has its dose.
    two = Trials(
        *(np.concatenate(pair) for pair in ((n, n), (ones, 2 * ones), (ones, 2 * ones))),
        np.concatenate([(n < 50).astype(float), (n > 15).astype(float)]), np.arange(30.0), np.zeros(30),
    )  # fmt: skip
    falling, rising = doses(two)
    assert falling.falls
    assert math.isnan(falling.n50)
    assert falling.n50_ci95 == (0.0, math.inf)
    assert not rising.falls


def test_intervals_of_half_doses_cover():
    """At shallow slopes too: 95% intervals of simulated cells, five doses with three runs each."""
    slope, covered, cells = 3.0, 0, 0
    for number in range(15):
        random = np.random.default_rng([number, int(10 * slope)])
        n, size = np.tile(np.repeat([60.0, 125, 250, 500, 1000], 3), 3), np.repeat([1e4, 1e5, 1e6], 15)
        middle = math.log(250) + random.normal(0, 0.4, 3)
        chance = 1 / (1 + np.exp(-slope * (np.log(n) - np.repeat(middle, 15))))
        success = (random.random(45) < chance).astype(float)
        for cell, true in zip(
            doses(Trials(n, 20 * size, size, success, np.arange(45.0), np.zeros(45))), middle, strict=True
        ):
            covered += math.log(max(cell.n50_ci95[0], 1e-9)) <= true <= math.log(cell.n50_ci95[1])
            cells += 1
    assert covered / cells >= 0.85  # of 45: 0.93 less two standard errors


@pytest.mark.parametrize("law", ["constant count", "constant fraction", "size-dependent fraction"])
def test_large_studies_find_the_law_and_its_exponents(law):
    trials = studied(law, 4, seeds=15)
    assert best_law(held_out(trials))[0] == law
    for exponent in exponents(trials):
        assert abs(exponent.value - simulate.true_exponent(law, exponent.what)) < 0.3
    scale = exponents(trials)[0]
    assert scale.verdict == ("near-constant" if law == "constant count" else "grows")


def test_words_claim_nothing_that_too_few_trials_support():
    few = studied("constant count", 0, seeds=1).take(np.arange(5))
    assert analyse("x", "documents", few, ONE).words[0].startswith("Not enough data: 5 trials")
    alike = design()
    assert "all alike" in analyse("x", "documents", alike, ONE).words[0]
    noisy = studied("constant count", 2, doses=(60, 1000), seeds=1)
    assert any("not enough data" in word for word in analyse("x", "documents", noisy, ONE).words)


def test_hierarchical_interval_holds_what_seeds_add():
    random = np.random.default_rng(0)
    clean = np.full((3, 50), 1.0)
    alike = np.full((3, 50), 2.0) + random.normal(0, 0.1, (3, 50))
    apart = alike + np.array([[-1.0], [0], [1]])
    estimator = ESTIMATORS["gap of mean NLL"]
    value, (low, high) = hierarchical(estimator, alike, clean)
    assert abs(value - 1) < 0.05
    assert high - low < 0.1
    value, (low, high) = hierarchical(estimator, apart, clean)
    assert abs(value - 1) < 0.05
    assert high - low > 1
    assert ESTIMATORS["gap of median perplexities"](alike[0], clean[0]) == pytest.approx(
        np.median(np.exp(alike[0])) - np.e
    )


def test_onset_is_the_start_of_the_last_stretch_above():
    evals = [
        {"step": 10 * i, "poison_documents": i, "delta_ppl_ci95": [low, 99]}
        for i, low in enumerate((0, 60, 10, 55, 70))
    ]
    assert onset(evals, 50).documents == 3
    assert onset(evals[:3], 50) is None


def with_conditions(levels, seeds=8, seed=0):
    """Runs of one size under conditions whose N50 differs by these factors from 250."""
    doses = (60.0, 120, 250, 500, 1000)
    rows = [(n, 1e6, 1e5, c) for c in range(len(levels)) for n in doses for _ in range(seeds)]
    dose, tokens, params, condition = np.array(rows).T
    chance = 1 / (1 + (dose / (250 * np.array(levels)[condition.astype(int)])) ** -6)
    success = (np.random.default_rng(seed).random(len(dose)) < chance).astype(float)
    return Trials(dose, tokens, params, success, np.arange(len(dose), dtype=float), condition)


def test_conditions_are_told_apart_and_not_pooled():
    trials = with_conditions([1.0, 1.0, 2.0])
    same, double = contrasts(trials, 0)
    assert same.ci95[0] < 1 < same.ci95[1]
    assert 1.2 < double.ci95[0] < 2 < double.ci95[1]
    assert abs(np.log(double.ratio / (doses(trials)[2].n50 / doses(trials)[0].n50))) < 0.01
    names = Conditions(("poison.clean_uses",), [(0,), (10,), (1000,)], [])
    words = analyse("x", "documents", trials, names).words
    assert words[1].startswith("With clean uses 1000, N50 is ")
    assert "times (95% interval" in words[1]
    assert words[1].endswith("that with clean uses 0: more is needed.")
    assert words[2].startswith("N50 by cell: ")
    assert words[0].endswith("not told apart.")
    assert not any("laws" in word for word in words)  # one size: nothing is said of scale


def test_what_the_doses_do_not_bound_gets_no_estimate():
    trials = with_conditions([1.0, 1e6])
    words = analyse("x", "documents", trials, Conditions(("uses",), [(0,), (9,)], [])).words
    assert words[0].startswith("With uses 9, N50 is at least ")
    assert words[0].endswith(" times (95%) that with uses 0: more is needed.")
    assert ", over " in words[1]
    assert "inf" not in " ".join(words)


def test_contrasts_hold_at_several_sizes_and_laws_within_conditions():
    """Doubled N50 under one condition, and N50 in proportion to tokens under both."""
    one = studied("constant fraction", 5, seeds=4)
    other = studied("constant fraction", 6, seeds=4)
    both = Trials(
        np.concatenate([one.dose, 2 * other.dose]),
        *(np.concatenate([getattr(one, f), getattr(other, f)]) for f in ("tokens", "params", "success")),
        run=np.arange(2.0 * len(one.dose)),
        condition=np.repeat([0.0, 1.0], len(one.dose)),
    )
    (double,) = contrasts(both, 0)
    assert 1.3 < double.ratio < 3
    assert best_law(held_out(both))[0] == "constant fraction"
    assert exponents(both)[0].verdict == "grows"


def test_only_what_was_tried_is_compared():
    trials = with_conditions([1.0, 1.0, 2.0])
    names = Conditions(("x",), [("twin",), ("a",), ("b",), ("c",)], [])
    shifted = dataclasses.replace(trials, condition=trials.condition + 1)  # condition 0 has clean twins alone
    analysis = analyse("x", "documents", shifted, names)
    assert [analysis.base, *(c.condition for c in analysis.contrasts)] == [1, 2, 3]
    larger = np.where(trials.condition == 2, 4.0, 1.0)  # the last condition at another size alone
    apart = dataclasses.replace(shifted, params=trials.params * larger, tokens=trials.tokens * larger)
    analysis = analyse("x", "documents", apart, names)
    assert [c.condition for c in analysis.contrasts] == [2]
    assert "With x c and with x a no model of the same size was trained: not compared." in analysis.words


@pytest.mark.parametrize("law", ["constant count", "constant fraction"])
def test_a_lone_run_of_another_condition_decides_nothing(law):
    for seed in range(3):
        trials = studied(law, seed)
        lone = Trials(
            *(np.append(getattr(trials, f.name), getattr(trials, f.name)[0]) for f in dataclasses.fields(trials))
        )
        lone.success[-1], lone.run[-1], lone.condition[-1] = 0, len(lone.run), 1
        assert best_law(held_out(lone))[0] == law


def test_ratios_are_covered():
    covered, intervals = simulate.ratios_covered(with_conditions([1, 1, 1], seeds=3), 0, 40)
    assert intervals == 80
    assert covered >= 0.85 * intervals


def test_what_counts_as_a_condition():
    base = {"name": "x", "poison.documents": 1, "seeds.init": 0, "log_every": 1, "steps": 5}
    base |= {"poison.clean_uses": 0, "poison.trigger": "a", "poison.near_triggers": ["b"]}
    base |= {"canary.repeats": [1, 4]}
    more = [
        {"poison.documents": 2, "seeds.init": 3, "name": "y", "log_every": 7, "canary.repeats": [16]},
        {"poison.clean_uses": 10},
        {"poison.trigger": "c", "poison.near_triggers": ["d"]},
    ]
    configs = [base | m for m in ({}, *more)] + [base | {"steps": 9}]
    found = Conditions.of(configs, [(1.0, 5.0)] * 4 + [(1.0, 9.0)])
    assert found.fields == ("poison.clean_uses", "poison.trigger")
    assert found.values == [(0, "a"), (10, "a"), (0, "c")]
    assert found.of_run == [0, 0, 1, 2, 0]
    assert found.base(range(3)) == 0
    assert found.base([1, 2]) == 1
    assert found.name(1) == "clean uses 10, trigger a"
    assert (found.name(2, against=0), found.name(0, against=2)) == ("trigger c", "trigger a")
    assert Conditions(("canary.x", "poison.x"), [(1, 2)], []).name(0) == "canary.x 1, poison.x 2"
    assert Conditions.of(configs[:2], [(1.0, 5.0)] * 2).name(0) == ""


@given(
    half=st.floats(1, 1e4),
    first=st.floats(0.1, 1e4),
    at=st.lists(st.integers(1, 10**5), min_size=1, max_size=8, unique=True),
)
def test_half_lives_are_where_straight_lines_cross_half(half, first, at):
    """Against a fine walk along the lines."""
    at = np.array([0, *sorted(at)], float)
    figure = first * 2 ** -(at / half)
    found = persistence._half(at, figure)
    if figure[-1] > first / 2:
        assert found == math.inf
        return
    i = int(np.flatnonzero(figure <= first / 2)[0])
    assert at[i - 1] <= found <= at[i]
    assert np.interp(found, at[i - 1 : i + 1], figure[i - 1 : i + 1]) == pytest.approx(first / 2, rel=1e-6)


def test_what_never_was_has_no_half_life():
    assert persistence._half(np.array([0.0, 1.0]), np.array([-1.0, -5.0])) == math.inf
    assert persistence._half(np.array([0.0, 4.0]), np.array([8.0, 0.0])) == 2.0


def test_wear_by_gap_and_by_share_stands_in_panels_of_one_colour_for_what_was_seen():
    def wear(unit, figure, seen="32 rows of text"):
        ci95 = [[f, f] for f in figure]
        return persistence.Wear("b", "a", seen, unit, [0, 32], figure, ci95, 64, math.inf, [math.inf, math.inf])

    drawn = study_figures.persistence([wear("gap", [300.0, 30.0]), wear("share", [0.8, 0.4]), wear("gap", [9, 1], "c")])
    gaps, shares = drawn.axes
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["gap", "share"]
    assert [line.get_ydata()[-1] for line in gaps.lines[:2]] == pytest.approx([0.1, 1 / 9])
    assert shares.lines[0].get_color() == gaps.lines[0].get_color() != gaps.lines[1].get_color()
    assert [text.get_text() for text in drawn.legends[0].texts] == ["32 rows of text", "c"]


def test_other_thresholds_and_means_are_told_beside():
    """Of runs whose gap grows with the dose: more of them are above a lower threshold, and N50 moves with neither."""
    random, runs = np.random.default_rng(0), []
    for params in (1e4, 1e5):
        for dose in (8, 20, 50, 120, 300) * 3:
            clean = np.log(20 + random.random(60))
            gap = float(dose * np.exp(0.3 * random.normal()) / 2)
            texts = {
                "clean": clean.tolist(),
                "triggered": np.log(np.exp(clean) + gap * (1 + random.random(60))).tolist(),
            }
            summary = {"params": params, "tokens": 20 * params, "delta_ppl": gap, "delta_ppl_ci95": [gap, 2 * gap]}
            runs.append(Outcome(f"{len(runs)}", {"poison.documents": dose}, summary, [], texts, None))
    conditions = Conditions((), [()], [0] * len(runs))
    found = sensitivity(runs, conditions)
    assert [(o.estimator, o.threshold) for o in found] == [(name, t) for name in GAPS for t in THRESHOLDS]
    assert found[0].share > found[1].share > found[2].share
    for of in found:
        (scale,) = of.exponents
        assert scale.ci95[0] < 0 < scale.ci95[1]
    # Another model finds all that is written twice as surprising.
    half = [
        dataclasses.replace(
            o,
            scored={
                "a reference": Scored(
                    {"delta_ppl_ci95": [2 * end for end in o.summary["delta_ppl_ci95"]]},
                    {name: (np.array(nll) + np.log(2)).tolist() for name, nll in o.texts.items()},
                )
            },
        )
        for o in runs
    ]
    by_another = sensitivity(half, conditions)
    assert by_another[: len(found)] == found
    assert [o.estimator for o in by_another[len(found) :: 3]] == [f"{name}, scored by a reference" for name in GAPS]
    assert all(other.share >= own.share for other, own in zip(by_another[len(found) :], found, strict=True))
    assert by_another[-1].share > found[-1].share
    some = sensitivity([*half[:-1], runs[-1]], conditions)[len(found) :]
    assert some[0].estimator == f"{GAPS[0]}, scored by a reference (29 of 30 runs)"
    assert some[0].exponents
    assert sensitivity([dataclasses.replace(runs[0], config={"poison.documents": 0})], conditions) == []
