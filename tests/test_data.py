"""I1-I5 as properties: pure data, exact dose, whole documents, twins, evidence."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.config import ConfigError, check
from poisonjax.data.batches import Batches, load, local_rows
from poisonjax.data.digest import as_hex, differing_rows, digest
from poisonjax.data.rows import CleanRows, Rows
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.poison import documents
from poisonjax.poison.ledger import dose
from poisonjax.poison.placements import PlacementError
from poisonjax.poison.schedule import Schedule
from poisonjax.poison.triggers import PoisonError, Trigger


@pytest.fixture(scope="module")
def base(store):
    """The config of the runs below, changed by each example on a copy."""
    from conftest import tiny_config

    return tiny_config(store)


def make_document(config, store, index):
    trigger = Trigger.of(config.poison, store.tokenizer)
    return documents.make_document(config.poison, config.seeds.poison, store, trigger, config.seq_len + 1, index)


SETTINGS = {
    "steps": st.integers(1, 30),
    "global_batch": st.sampled_from([4, 8, 12]),
    "documents": st.integers(0, 40),
    "seeds": st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
}


def varied(base, steps, global_batch, documents, seeds):
    config = base.copy_and_resolve_references()
    config.steps, config.global_batch = steps, global_batch
    config.poison.documents = min(documents, steps * global_batch)
    config.seeds.order, config.seeds.poison, config.seeds.placement = seeds
    return config


@given(**SETTINGS)
def test_exact_dose_whole_documents_at_the_ledgers_places(base, store, **settings):
    """I2, I3: N documents, each once, each unbroken where the ledger says; nothing else is changed (I4)."""
    config = varied(base, **settings)
    batches = Batches(config, store)
    clean = CleanRows(store.split("train"), config.seq_len, config.seeds.order)
    ledger = batches.schedule.ledger()
    assert len(ledger) == len({r["id"] for r in ledger}) == len({r["slot"] for r in ledger}) == config.poison.documents
    by_slot = {record["slot"]: record for record in ledger}
    trigger = store.tokenizer.encode(config.poison.trigger)
    for step in range(config.steps):
        rows = batches.tokens(step)
        assert rows.shape == batches.shape()
        assert rows.dtype == np.int32
        for i, row in enumerate(rows):
            slot = step * config.global_batch + i
            before = clean.tokens(np.array([slot]))[0]
            record = by_slot.pop(slot, None)
            if record is None:
                np.testing.assert_array_equal(row, before)
                continue
            assert (record["step"], record["row"]) == (step, i)
            document = make_document(config, store, record["id"])
            start, stop = record["offset"], record["offset"] + record["tokens"]
            np.testing.assert_array_equal(row[start:stop], document.tokens)  # whole
            assert document.sha256 == record["sha256"]
            np.testing.assert_array_equal(row[slice(*record["trigger"])], trigger)
            assert row[stop - 1] == store.tokenizer.eot
            assert record["payload"] == [record["trigger"][1], stop - 1]
            assert start == 0 or before[start - 1] == store.tokenizer.eot  # at a document boundary
            np.testing.assert_array_equal(row[:start], before[:start])
            np.testing.assert_array_equal(row[stop:], before[start : start + len(row) - stop])
    assert not by_slot
    assert dose(ledger, config.steps) == {
        "documents": config.poison.documents,
        "tokens": sum(len(make_document(config, store, i).tokens) for i in range(config.poison.documents)),
        "rows": config.poison.documents,
        "steps": len({r["step"] for r in ledger}),
        "repeats": min(1, config.poison.documents),
    }


@given(**SETTINGS)
def test_twin_differs_only_in_poisoned_rows(base, store, **settings):
    """I4."""
    config = varied(base, **settings)
    twin = config.copy_and_resolve_references()
    twin.poison.documents = 0
    poisoned, clean = Batches(config, store), Batches(twin, store)
    for step in range(config.steps):
        differs = (poisoned.tokens(step) != clean.tokens(step)).any(1)
        assert set(np.flatnonzero(differs)) == {r["row"] for r in poisoned.schedule.ledger() if r["step"] == step}


@given(step=st.integers(0, 11), parts=st.sampled_from([1, 2, 4]), order=st.integers(0, 2**32 - 1))
def test_a_batch_is_the_same_for_any_number_of_processes(base, store, step, parts, order):
    """I1: any split of a batch over processes, read in any order by objects made anew."""
    config = base.copy_and_resolve_references()
    config.seeds.order = order
    whole = Batches(config, store).tokens(step)
    share = config.global_batch // parts
    pieces = [Batches(config, store).batch(step, i * share, (i + 1) * share).tokens for i in reversed(range(parts))]
    np.testing.assert_array_equal(np.concatenate(pieces[::-1]), whole)


@given(first=st.integers(0, 12), threads=st.integers(1, 4))
def test_loading_from_any_step_gives_the_same_batches(base, store, first, threads):
    """I1: what a resumed run reads is what it would have read."""
    batches = Batches(base, store)
    sharding = batch_sharding(make_mesh(base, jax.devices()))
    loaded = [np.asarray(batch.tokens) for batch in load(batches, sharding, first, threads=threads)]
    assert len(loaded) == base.steps - first
    for step, rows in enumerate(loaded, first):
        np.testing.assert_array_equal(rows, batches.tokens(step))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_global_arrays_are_the_same_on_any_number_of_devices(base, store, devices):
    batches = Batches(base, store)
    sharding = batch_sharding(make_mesh(base, jax.devices()[:devices]))
    assert local_rows(sharding, batches.shape()) == (0, base.global_batch)
    arrays = [batch.tokens for batch in load(batches, sharding)]
    assert len(arrays[0].sharding.device_set) == devices
    for step, rows in enumerate(arrays):
        np.testing.assert_array_equal(rows, batches.tokens(step))


def test_each_epoch_reads_each_window_once_in_another_order(base, store):
    split = store.split("train")
    clean = CleanRows(split, base.seq_len, seed=7)
    epochs = [clean.tokens(np.arange(clean.windows) + e * clean.windows) for e in range(3)]
    stream = split.windows(np.array([0]), clean.windows * clean.row_tokens)[0].reshape(-1, clean.row_tokens)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch.view("V196").ravel()), np.sort(stream.view("V196").ravel()))
    assert (epochs[0] != epochs[1]).any()
    # Neighbouring seeds share no epoch: grain alone would give seed 7's second epoch as seed 8's first.
    other = CleanRows(split, base.seq_len, seed=8)
    assert all((other.tokens(np.arange(clean.windows)) != epoch).any() for epoch in epochs)


@pytest.mark.parametrize("seed", ["poison", "placement", "order", "init", "eval"])
def test_each_seed_changes_its_own_part_alone(base, store, seed):
    """I8."""
    config = base.copy_and_resolve_references()
    config.seeds[seed] += 1

    def parts(config):
        schedule = Batches(config, store).schedule
        clean = CleanRows(store.split("train"), config.seq_len, config.seeds.order).tokens(np.arange(8))
        ledger = sorted(schedule.ledger(), key=lambda r: r["id"])
        return {
            "poison": [r["sha256"] for r in ledger],
            "placement": [r["slot"] for r in ledger],
            "order": clean.tolist(),
        }

    before, after = parts(base), parts(config)
    assert {name for name in before if before[name] != after[name]} == ({seed} & before.keys())


def test_documents_are_the_same_for_any_dose(base, store):
    config = base.copy_and_resolve_references()
    config.poison.documents = 3
    few = {r["id"]: r["sha256"] for r in Batches(config, store).schedule.ledger()}
    many = {r["id"]: r["sha256"] for r in Batches(base, store).schedule.ledger()}
    assert few == {i: many[i] for i in range(3)}


def test_uniform_placement_is_uniform(base, store):
    """Each tenth of a long run gets its share: 2,000 documents, binomial spread."""
    config = base.copy_and_resolve_references()
    config.steps, config.poison.documents = 5000, 2000
    slots = [r["slot"] for r in Batches(config, store).schedule.ledger()]
    counts = np.histogram(slots, bins=10, range=(0, 5000 * config.global_batch))[0]
    assert (abs(counts - 200) < 5 * np.sqrt(200 * 0.9)).all()


PLACEMENTS = st.one_of(
    st.sampled_from(["uniform", "begin", "end", "even"]).flatmap(
        lambda order: st.sampled_from([order, f"{order}:window=0.25-0.75", f"{order}:window=0.5-1"])
    ),
    st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda t: f"batches:density={t[0]},every={t[1]}"),
    st.lists(st.integers(0, 8 * 24 - 1), min_size=1, max_size=20).map(
        lambda slots: "list:" + ",".join(map(str, slots))
    ),
)


@given(spec=PLACEMENTS, documents=st.integers(0, 12), repeats=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_placement_is_exact_or_refused(base, store, spec, documents, repeats, seed):
    """I2 for all orders: each document exactly `repeats` times, where the spec says; else refused before step 0."""
    config = base.copy_and_resolve_references()
    config.steps, config.poison.documents, config.poison.repeats = 24, documents, repeats
    config.poison.placement, config.seeds.placement = spec, seed
    exposures = documents * repeats
    options = dict(part.split("=") for part in spec.partition(":")[2].split(",") if "=" in part)
    first, last = (float(x) * 24 for x in options.get("window", "0-1").split("-"))
    rows = int(last - first) * 8
    density, every = int(options.get("density", 1)), int(options.get("every", 1))
    listed = [int(x) for x in spec[5:].split(",")] if spec.startswith("list:") else []
    possible = exposures <= rows
    if density * every > 1 or spec.startswith("batches"):
        possible = exposures % density == 0 and (exposures // density - 1) * every < 24
    if listed:
        possible = len(listed) == len(set(listed)) == exposures
    if documents and not possible:
        with pytest.raises(ConfigError, match=r"poison\.placement = "):
            check(config)
        with pytest.raises(PlacementError):
            Batches(config, store)
        return
    check(config)
    ledger = Batches(config, store).schedule.ledger()
    assert sorted((r["id"], r["repeat"]) for r in ledger) == [(i, r) for i in range(documents) for r in range(repeats)]
    slots = [record["slot"] for record in ledger]
    assert len(set(slots)) == exposures
    assert dose(ledger, 24)["repeats"] == (repeats if documents else 0)
    assert all(first * 8 <= slot < last * 8 for slot in slots)
    edge = int(first * 8)
    if spec.startswith("begin"):
        assert slots == list(range(edge, edge + exposures))
    if spec.startswith("end"):
        assert slots == list(range(int(last * 8) - exposures, int(last * 8)))
    if spec.startswith("even") and exposures:
        assert set(np.diff(slots)) <= {rows // exposures, -(-rows // exposures)}
    if spec.startswith("batches"):
        counts = np.bincount([slot // 8 for slot in slots], minlength=24)
        expected = np.zeros(24, int)
        expected[: exposures // density * every : every] = density
        np.testing.assert_array_equal(counts, expected)
    if listed and documents:
        by_exposure = sorted(ledger, key=lambda r: (r["repeat"], r["id"]))
        assert [r["slot"] for r in by_exposure] == listed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sideways", "choose one of batches, begin, end, even, uniform, list"),
        ("even:density=2", "even takes window"),
        ("batches:density=2", "takes density, every"),
        ("batches:density=two,every=1", "density=two: give a whole number"),
        ("batches:density=9,every=1", "density 9 is more than the 8 rows"),
        ("batches:density=2,every=1", "9 documents .* 4 batches and 1 documents over"),
        ("batches:density=3,every=7", r"take 15 steps, the window has 12"),
        ("uniform:window=0.5-0.6", "its window of 1 steps x 8 rows has 8"),
        ("uniform:window=1-0", "two fractions"),
        ("list:1,2,x", "give slots"),
        ("list:0,1,2,3,4,5,6,7,96", r"outside \[96\]"),
        ("list:0,1,2,3,4,5,6,7,7", r"twice \[7\]"),
    ],
)
def test_placements_that_cannot_be_met_are_refused_with_the_arithmetic(base, spec, message):
    config = base.copy_and_resolve_references()
    config.poison.placement = spec
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_a_document_that_does_not_fit_is_refused_with_the_numbers(base, store):
    config = base.copy_and_resolve_references()
    config.poison.payload_tokens = (60, 60)
    with pytest.raises(PoisonError, match=r"9 of 9 .* seq_len \+ 1 = 49 .* 60 of payload"):
        Batches(config, store)
    config.poison.truncate = True
    for record in Batches(config, store).schedule.ledger():
        assert record["tokens"] <= 49
        assert record["payload"][1] > record["payload"][0]


def test_payload_constructions(base, store):
    """`ids` has exactly the length asked for and no special token; retokenized text is what text encodes to."""
    config = base.copy_and_resolve_references()
    for construction in ("ids", "decode-retokenize"):
        config.poison.payload = construction
        for i in range(20):
            document = make_document(config, store, i)
            payload = document.tokens[slice(*document.payload)]
            assert not set(payload.tolist()) & store.tokenizer.special_ids
            least, most = config.poison.payload_tokens
            if construction == "ids":
                assert least <= len(payload) <= most
            else:
                text = store.tokenizer.decode(payload)
                np.testing.assert_array_equal(store.tokenizer.encode(text), payload)


def test_prefixes_come_from_training_documents_alone(base, store):
    """I6: a poison prefix begins the training document that the ledger names, and no held-out one."""
    train, heldout = store.split("train"), store.split("heldout")
    decode = store.tokenizer.decode
    heldout_texts = [decode(heldout.document(i)) for i in range(heldout.documents)]
    for i in range(30):
        document = make_document(base, store, i)
        prefix = decode(document.tokens[: document.trigger[0]])
        assert decode(train.document(document.prefix_document)).startswith(prefix)
        if len(prefix) > 15:
            assert not any(text.startswith(prefix) for text in heldout_texts)


@given(st.integers(0, 2**32 - 1))
def test_digest_sees_every_change_and_no_topology(seed):
    random = np.random.default_rng(seed)
    rows = random.integers(0, 200_000, (6, 33)).astype(np.int32)
    slots = random.choice(2**31, 6, replace=False)
    expected = digest(rows, slots)
    order = random.permutation(6)
    np.testing.assert_array_equal(digest(rows[order], slots[order]), expected)
    np.testing.assert_array_equal(digest(rows[:2], slots[:2]) + digest(rows[2:], slots[2:]), expected)
    np.testing.assert_array_equal(jax.jit(digest)(rows, slots), expected)
    i, (j, k) = random.integers(6), random.choice(33, 2, replace=False)
    changed = rows.copy()
    changed[i, j] ^= 1 << random.integers(18)
    assert (digest(changed, slots) != expected).any()
    swapped = rows.copy()
    swapped[i, [j, k]] = swapped[i, [k, j]]
    assert (digest(swapped, slots) != expected).any() == (rows[i, j] != rows[i, k])
    other_rows = rows[[1, 0, *range(2, 6)]]
    assert (digest(other_rows, slots) != expected).any()


def test_digest_agrees_with_python_integers():
    """The same arithmetic again, without arrays."""
    rows = np.array([[5, 7, 11], [13, 2, 3]], np.int32)
    slots = np.array([4, 9])
    keys = np.stack(
        [
            np.random.Generator(np.random.Philox(key=0x90150 + lane)).integers(0, 2**32, 3, dtype=np.uint32)
            for lane in range(2)
        ]
    )
    multipliers = [[0x7FEB352D, 0x846CA68B], [0x21F0AAAD, 0x735A2D97]]
    mask = 2**32 - 1

    def mixed(x, lane):
        for multiplier in multipliers[lane]:
            x = ((x ^ (x >> 16)) * multiplier) & mask
        return x ^ (x >> 15)

    expected = []
    for lane in range(2):
        total = 0
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            tokens = sum(mixed(t ^ int(k), lane) for t, k in zip(row, keys[lane], strict=True)) & mask
            total += mixed(tokens ^ mixed((slot + int(keys[lane, 0])) & mask, lane), lane)
        expected.append(total & mask)
    expected.append(0)
    for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
        tokens = sum(mixed(t ^ int(k), 0) for t, k in zip(row, keys[0], strict=True)) & mask
        expected[2] += slot * mixed(tokens ^ mixed((slot + int(keys[0, 0])) & mask, 0), 0)
    expected[2] &= mask
    np.testing.assert_array_equal(digest(rows, slots), expected)
    assert as_hex(digest(rows, slots)) == "".join(f"{lane:08x}" for lane in expected)


@given(st.integers(0, 2**32 - 1))
def test_a_digest_tells_which_row_differs(seed):
    random = np.random.default_rng(seed)
    rows = random.integers(0, 200_000, (16, 33)).astype(np.int32)
    slots = random.integers(2**20) * 16 + np.arange(16)
    changed = rows.copy()
    i, j = random.choice(16, 2, replace=False)
    changed[i, random.integers(33)] ^= 1 << random.integers(18)
    assert differing_rows(digest(changed, slots), rows, slots) == [i]
    swapped = rows.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert differing_rows(digest(swapped, slots), rows, slots) == sorted([i, j])
    assert differing_rows(digest(rows, slots), rows, slots) == []
    assert differing_rows(digest(np.roll(rows, 1, 0), slots), rows, slots) == []


def test_plan_refuses_a_placement_that_repeats_slots(base, store, monkeypatch):
    from poisonjax.poison import placements

    monkeypatch.setitem(placements.ORDERS, "uniform", lambda count, *rest: np.zeros(count, np.int64))
    trigger, rows = Trigger.of(base.poison, store.tokenizer), Rows(CleanRows(store.split("train"), base.seq_len, 0))
    with pytest.raises(AssertionError, match="distinct"):
        Schedule.make(base, store, trigger, rows, base.seq_len + 1)
