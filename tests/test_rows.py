"""What stands in a row: one definition for tokens, origins and loss weights."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.data.batches import Batch, Batches
from poisonjax.data.digest import digest
from poisonjax.data.insertions import Insertion
from poisonjax.data.rows import CleanRows, Rows
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import model_graph
from poisonjax.training.step import init_state, make_init, make_train_step


@dataclasses.dataclass(frozen=True)
class Made:
    """A layer of insertions drawn at random."""

    insertions: dict[int, Insertion]
    name, file = "made", "made.jsonl"

    def records(self, global_batch):
        return []


def made_layers(random, row_tokens, weighted=False):
    layers = []
    for number in range(int(random.integers(1, 4))):
        insertions = {}
        for slot in random.choice(20, 8, replace=False).tolist():
            length = int(random.integers(1, 12))
            start = int(random.integers(0, row_tokens - length))
            tokens = random.integers(300, 400, length).astype(np.int32)
            weights = random.random(length).astype(np.float32) if weighted and random.random() < 0.5 else None
            mode = ["splice", "replace"][int(random.integers(2))]
            insertions[slot] = Insertion(slot, start, tokens, f"{number}:{slot % 3}", mode, weights=weights)
        layers.append(Made(insertions))
    return layers


@given(seed=st.integers(0, 2**32 - 1))
def test_origins_say_where_each_token_comes_from(store, seed):
    """Tokens looked up by their origins are the tokens, whatever the layers."""
    random = np.random.default_rng(seed)
    rows = Rows(CleanRows(store.split("train"), 48, 7), made_layers(random, 49))
    slots = random.permutation(20)
    tokens, origins = rows.tokens(slots), rows.origins(slots)
    stream = store.split("train").window(0, store.split("train").tokens)
    for i in range(len(slots)):
        for j in range(49):
            source, token = origins.source[i, j], origins.token[i, j]
            expected = stream[token] if source == 0 else origins.insertions[source - 1].tokens[token]
            assert tokens[i, j] == expected
        spans = [span for number in range(len(origins.insertions) + 1) for span, _ in origins.spans(i, number)]
        assert sorted(k for span in spans for k in range(*span)) == list(range(49))


@given(seed=st.integers(0, 2**32 - 1))
def test_without_a_source_its_rows_are_as_if_it_had_never_been(store, seed):
    random = np.random.default_rng(seed)
    layers = made_layers(random, 49)
    clean, slots = CleanRows(store.split("train"), 48, 7), np.arange(20)
    left_out = f"{int(random.integers(len(layers)))}:1"
    fewer = [Made({s: one for s, one in layer.insertions.items() if one.source != left_out}) for layer in layers]
    without = Rows(clean, layers).without(left_out)
    np.testing.assert_array_equal(without.tokens(slots), Rows(clean, fewer).tokens(slots))
    assert not [one for slot in range(20) for one in without.insertions(slot) if one.source == left_out]


def test_a_run_without_a_document_is_its_twin_in_that_row_alone(store):
    """I4, a document at a time: what trace and leave-one-out rest on."""
    config = tiny_config(store)
    config.poison.repeats = 2
    batches = Batches(config, store)
    slots = np.arange(config.steps * config.global_batch)
    whole, less = batches.rows.tokens(slots), batches.rows.without("poison:3").tokens(slots)
    held = {record["slot"] for record in batches.schedule.ledger() if record["id"] == 3}
    assert set(np.flatnonzero((whole != less).any(1))) == held
    np.testing.assert_array_equal(less[sorted(held)], batches.clean.tokens(np.array(sorted(held))))


@given(seed=st.integers(0, 2**32 - 1))
def test_weights_lie_as_their_tokens_do_and_the_digest_covers_them(store, seed):
    random = np.random.default_rng(seed)
    layers = made_layers(random, 49, weighted=True)
    rows, slots = Rows(CleanRows(store.split("train"), 48, 7), layers), np.arange(20)
    weights = rows.weights(slots)
    if all(one.weights is None for layer in layers for one in layer.insertions.values()):
        assert weights is None
        return
    origins = rows.origins(slots)
    for i in range(20):
        for j in range(49):
            source = origins.source[i, j]
            of = origins.insertions[source - 1].weights if source else None
            assert weights[i, j] == (1 if of is None else of[origins.token[i, j]])
    tokens = rows.tokens(slots)
    expected = digest(tokens, slots, weights)
    np.testing.assert_array_equal(jax.jit(digest)(tokens, slots, weights), expected)
    changed = weights.copy()
    changed[random.integers(20), random.integers(49)] += 0.25
    assert (digest(tokens, slots, changed) != expected).any()
    assert (digest(tokens, slots) != expected).any()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_counts_tokens_by_their_weights(config, store, accumulate):
    """Against the unweighted step on the rows that alone have weight; microbatches of unequal weight change nothing."""
    vocabulary, mesh = store.tokenizer.vocab_size, make_mesh(config, jax.devices()[:1])
    rows = Batches(config, store).tokens(0)
    graph = model_graph(config.model, vocabulary)

    def stepped(batch):
        config.global_batch = len(batch.tokens)
        init, abstract = make_init(config, vocabulary, mesh)
        with jax.set_mesh(mesh):
            return make_train_step(config, graph, mesh, abstract)(init(), batch)

    chosen = np.array([0, 3, 5, 6])
    weights = np.zeros(rows.shape, np.float32)
    weights[chosen] = 1
    expected, alone = stepped(Batch(rows[chosen]))
    config.optimizer.accumulate = accumulate
    state, metrics = stepped(Batch(rows, weights))
    np.testing.assert_allclose(metrics.loss, alone.loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert init_state(config, vocabulary).step == 0
