"""The benches that need no other program, in small."""

import math

import pytest

from poisonjax.bench import growth, startup


def test_growth_measures_every_kind_of_work(monkeypatch, config):
    small = {"store_bytes": (10**5, 10**6), "audit_steps": (2, 20), "sweep_runs": (1, 2)}
    monkeypatch.setattr(growth, "SIZES", dict.fromkeys(growth.SIZES, (1, 4)) | small)
    monkeypatch.setattr(growth, "ROUNDS", 1)
    rows = list(growth.growth(config))
    exponents = {row["name"]: row["value"] for row in rows if row["unit"] == "exponent"}
    kinds = ("poison_documents", "store_bytes", "prefixes", "audit_steps")
    assert list(exponents) == [f"growth_{kind}" for kind in (*kinds, "sweep_status", "sweep_collect", "sweep_report")]
    assert all(map(math.isfinite, exponents.values()))


def test_growth_is_an_exponent():
    row, seconds = growth._rows("x", [(1, 1.0), (10, 1.0), (100, 100.0)])
    assert row["value"] == pytest.approx(2)
    assert (seconds["value"], seconds["ratio"]) == (100, 100)


def test_corpus_building_against_the_tokenizer_library(monkeypatch, config):
    monkeypatch.setattr(startup, "BUILT_MB", 1)
    (row,) = startup.corpus_build(config)
    assert row["value"] > 0
    assert row["ratio"] == pytest.approx(row["value"] / row["baseline"], rel=1)
