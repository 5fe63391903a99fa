"""The model against the NumPy reference, its cache against itself, sharded against unsharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from poisonjax.data.batches import Batch
from poisonjax.evaluation.generate import Texts, generate, sample, score
from poisonjax.model.attention import cached_attention, causal_attention, splash_attention
from poisonjax.model.loss import next_token_nll
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import Transformer, model_graph
from poisonjax.training.step import make_init, make_train_step

VOCABULARY = 61


@pytest.fixture
def model(config):
    model = Transformer(config.model, VOCABULARY, nnx.Rngs(params=3))
    # Scales other than one, so that a forgotten norm shows.
    for norm in (model.blocks.attention_norm, model.blocks.mlp_norm, model.final_norm):
        norm[...] = 1 + 0.3 * jax.random.normal(jax.random.key(5), norm[...].shape)
    return model


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, VOCABULARY, (3, 17)).astype(np.int32)


def as_float64(model) -> dict:
    pure = nnx.to_pure_dict(nnx.state(model))
    pure["head"] = pure["head"][:, :VOCABULARY]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), pure)


def test_logits_agree_with_numpy(config, model, rows):
    expected = np.stack([reference.logits(as_float64(model), row, config.model.rope_theta) for row in rows])
    logits = model(jnp.asarray(rows))
    np.testing.assert_allclose(logits[..., :VOCABULARY], expected, atol=2e-5, rtol=2e-5)
    assert logits.shape[-1] == 128
    assert (jax.nn.softmax(logits)[..., VOCABULARY:] == 0).all()  # the padding is never predicted


@pytest.mark.parametrize("tile", [0, 4])
def test_nll_agrees_with_a_loop(config, model, rows, tile):
    expected = [
        reference.nll(reference.logits(as_float64(model), row[:-1], config.model.rope_theta), row[1:]) for row in rows
    ]
    np.testing.assert_allclose(next_token_nll(model, jnp.asarray(rows), tile), expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_is_close_to_float32(config, model, rows):
    graph, params = nnx.split(model)
    config.model.dtype = "bfloat16"
    low = nnx.merge(model_graph(config.model, VOCABULARY), params)
    difference = np.abs(
        np.asarray(next_token_nll(low, jnp.asarray(rows)))
        - np.asarray(next_token_nll(nnx.merge(graph, params), jnp.asarray(rows)))
    )
    assert 0 < difference.max() < 0.2


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("seq", [1, 7, 64, 96])
def test_attention_agrees_with_loops(heads, kv_heads, seq):
    random = np.random.default_rng(seq)
    q, k, v = (random.normal(size=(2, seq, h, 8)) for h in (heads, kv_heads, kv_heads))
    expected = np.stack([reference.attention(*row) for row in zip(q, k, v, strict=True)])
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(causal_attention(q, k, v), expected, atol=1e-5)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((seq, seq), bool)), (2, seq, seq))
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    np.testing.assert_allclose(cached_attention(q, [(keys, values, causal)]), expected, atol=1e-5)
    if seq == 1:
        return
    half = [(keys[:, :, part], values[:, :, part], causal[:, :, part]) for part in (slice(2), slice(2, None))]
    np.testing.assert_allclose(cached_attention(q, half), expected, atol=1e-5)


def test_cached_attention_in_half_precision_rounds_its_factors_alone():
    """Scores and softmax are float32: an NLL of thousands of keys mustn't hang on bfloat16's eight bits."""
    random = np.random.default_rng(2)
    sizes = ((2, 3, 4, 128), (2, 4, 400, 128), (2, 4, 400, 128))
    q, keys, values = (jnp.asarray(random.normal(size=size), jnp.bfloat16) for size in sizes)
    found = cached_attention(q, [(keys, values, None)])
    assert found.dtype == jnp.bfloat16
    whole = [x.astype(jnp.float32) for x in (q, keys, values)]
    exact = cached_attention(whole[0], [(whole[1], whole[2], None)])
    assert float(jnp.sqrt(jnp.mean((found.astype(jnp.float32) - exact) ** 2))) < 1.2e-3


def test_attention_gradient_agrees_with_plain_softmax():
    random = np.random.default_rng(1)
    q, k, v, w = (jnp.asarray(random.normal(size=(2, 33, h, 8)), jnp.float32) for h in (4, 2, 2, 4))

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        scores = jnp.where(jnp.tril(jnp.ones((33, 33), bool)), scores, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    for mine, its in zip(
        jax.grad(lambda *x: (causal_attention(*x) * w).sum(), (0, 1, 2))(q, k, v),
        jax.grad(lambda *x: (plain(*x) * w).sum(), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(mine, its, atol=2e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "mesh"), [(2, 2, None), (4, 2, None), (4, 2, (2, 1, 2))])
def test_splash_attention_and_its_gradient_agree_with_plain_softmax(config, heads, kv_heads, mesh):
    """The TPU's kernel, interpreted; on one device and split over rows and heads."""
    random = np.random.default_rng(1)
    q, k, v, w = (
        jnp.asarray(random.normal(size=(2, 256, h, 128)), jnp.float32) for h in (heads, kv_heads, kv_heads, heads)
    )

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    def value_and_gradient(attend):
        return jax.jit(jax.value_and_grad(lambda *x: (attend(*x) * w).sum(), (0, 1, 2)))(q, k, v)

    expected = value_and_gradient(plain)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh or (1, 1, 1)
    devices = jax.devices()[: np.prod(mesh)] if mesh else jax.devices()[:1]
    with jax.set_mesh(make_mesh(config, devices)):
        found = value_and_gradient(functools.partial(splash_attention, interpret=True))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=2e-4, rtol=1e-4), found, expected)


def test_cached_generation_agrees_with_uncached(model):
    """Greedy tokens and their NLL, for prompts of several lengths, against whole forward passes."""
    random = np.random.default_rng(2)
    pad = jnp.array([0, 3, 5], np.int32)
    prompts = jnp.asarray(random.integers(0, VOCABULARY, (3, 9)).astype(np.int32))
    keys = jax.random.split(jax.random.key(0), 3)
    texts = Texts(jnp.zeros((3, 0), jnp.int32), prompts[:, None], pad[:, None], keys)
    tokens, nll = generate(model, texts, 6, temperature=1e-6)
    np.testing.assert_allclose(score(model, texts, tokens), nll, atol=1e-5)
    tokens, nll = tokens[:, 0], nll[:, 0]
    for i in range(3):
        row = list(np.asarray(prompts)[i, int(pad[i]) :])
        for t in range(6):
            logits = np.asarray(model(jnp.array([row], np.int32))[0, -1])
            assert int(tokens[i, t]) == logits.argmax()
            expected = reference.nll(logits[None].astype(np.float64), np.array([logits.argmax()]))
            np.testing.assert_allclose(nll[i, t], expected[0], atol=1e-4)
            row.append(int(tokens[i, t]))


def test_a_prefix_is_read_once_for_all_its_variants(model):
    """The same tokens, of the same keys, and NLLs as where each text is read whole."""
    random = np.random.default_rng(3)
    prefixes = jnp.asarray(random.integers(0, VOCABULARY, (3, 7)).astype(np.int32))
    prompts = jnp.asarray(random.integers(0, VOCABULARY, (3, 4, 5)).astype(np.int32))
    pad, keys = jnp.asarray(random.integers(0, 5, (3, 4)).astype(np.int32)), jax.random.split(jax.random.key(2), 3)
    texts = Texts(prefixes, prompts, pad, keys)
    tokens, nll = generate(model, texts, 8, 1.0)
    whole = np.zeros((3, 4, 12), np.int32)
    for i, v in np.ndindex(3, 4):
        row = np.concatenate([prefixes[i], prompts[i, v, int(pad[i, v]) :]])
        whole[i, v, 12 - len(row) :] = row
    apart, their_nll = generate(model, Texts(jnp.zeros((3, 0), jnp.int32), jnp.asarray(whole), pad, keys), 8, 1.0)
    np.testing.assert_array_equal(tokens, apart)
    np.testing.assert_allclose(nll, their_nll, atol=1e-5)
    np.testing.assert_allclose(score(model, texts, tokens), nll, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [3, 64, 200])
def test_a_sampled_token_is_where_luck_falls(vocabulary):
    """Against NumPy's cumulated sums in float64; tokens of probability 0 never, at the ends of [0, 1) neither."""
    random = np.random.default_rng(vocabulary)
    logits = random.normal(size=(20_000, vocabulary)).astype(np.float32) * 3
    logits[:, random.permutation(vocabulary)[: vocabulary // 3]] = -1e30
    logits[:, -1] = -1e30
    luck = random.random(20_000).astype(np.float32)
    luck[:4] = 0, 1e-8, 1 - 2**-24, 0
    found = np.asarray(sample(jnp.asarray(logits), jnp.asarray(luck)))
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    assert (np.take_along_axis(exact, found[:, None], 1) > 0).all()
    sums = np.cumsum(exact, -1) / exact.sum(-1, keepdims=True)
    above = np.take_along_axis(sums, found[:, None], 1)[:, 0]
    below = above - np.take_along_axis(exact / exact.sum(-1, keepdims=True), found[:, None], 1)[:, 0]
    assert (below - 1e-5 <= luck).all()
    assert (luck <= above + 1e-5).all()


def test_sampling_follows_the_distribution(model):
    """The first sampled token's frequencies against the model's probabilities, at temperature 0.7."""
    draws = 4000
    prompts = jnp.tile(jnp.arange(5, dtype=np.int32), (draws, 1))
    keys = jax.random.split(jax.random.key(1), draws)
    texts = Texts(prompts[:, :3], prompts[:, None, 3:], jnp.zeros((draws, 1), np.int32), keys)
    tokens, _ = generate(model, texts, 1, 0.7)
    logits = np.asarray(model(prompts[:1])[0, -1], np.float64) / 0.7
    probabilities = np.exp(logits) / np.exp(logits).sum()
    frequencies = np.bincount(np.asarray(tokens)[:, 0, 0], minlength=128) / draws
    assert np.abs(frequencies - probabilities).sum() / 2 < 0.08  # total variation; about 0.03 by chance


@pytest.mark.parametrize(
    "mesh", [(1, 4, 1, 1), (1, 1, 4, 1), (1, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2), (2, 1, 2, 1), (2, 1, 1, 2)]
)
def test_sharded_step_agrees_with_unsharded(config, mesh):
    """Two steps on a mesh, the loss in parts of the vocabulary, and whole on one device: same digest to the bit, same
    weights to float tolerance."""
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (8, 49)).astype(np.int32)

    def two_steps(sizes, devices):
        config.mesh.slice, config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
        config.model.loss_tile = 16 if len(devices) > 1 else 0
        mesh = make_mesh(config, devices)
        init, abstract = make_init(config, VOCABULARY, mesh)
        step = make_train_step(config, model_graph(config.model, VOCABULARY), mesh, abstract)
        with jax.set_mesh(mesh):
            state = init()
            initial = jax.tree.map(np.asarray, state.params)
            for _ in range(2):
                state, metrics = step(state, Batch(rows))
        return initial, jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, metrics)

    initial, params, metrics = two_steps((1, 1, 1, 1), jax.devices()[:1])
    initial_sharded, params_sharded, metrics_sharded = two_steps(mesh, jax.devices()[: np.prod(mesh)])
    assert jax.tree.all(jax.tree.map(np.array_equal, initial, initial_sharded))
    assert (metrics.digest == metrics_sharded.digest).all()
    np.testing.assert_allclose(metrics.loss, metrics_sharded.loss, rtol=1e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=3e-5), params, params_sharded)


def test_accumulated_step_agrees_with_whole(config):
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (8, 49)).astype(np.int32)
    losses = []
    for accumulate in (1, 4):
        config.optimizer.accumulate = accumulate
        mesh = make_mesh(config, jax.devices()[:2])
        init, abstract = make_init(config, VOCABULARY, mesh)
        step = make_train_step(config, model_graph(config.model, VOCABULARY), mesh, abstract)
        with jax.set_mesh(mesh):
            state, first = step(init(), Batch(rows))
            _, second = step(state, Batch(rows))
        losses.append([float(first.loss), float(first.grad_norm), float(second.loss)])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_remat_computes_again_what_it_says(config, rows):
    """Products of the gradient: `block` makes all of the forward pass again, `dots` those of attention alone."""

    def products(policy):
        config.model.remat = policy
        graph, params = nnx.split(Transformer(config.model, VOCABULARY, nnx.Rngs(params=3)))
        gradient = jax.grad(lambda params: next_token_nll(nnx.merge(graph, params), jnp.asarray(rows)).mean())
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general[")

    none, dots, block = (products(policy) for policy in ("none", "dots", "block"))
    weights = 5  # of a block: queries, keys and values, output, gate and up, down
    assert block - dots == weights - 1  # the last one's result isn't needed again
    assert none < dots


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_nothing(config, model, rows, remat):
    def gradient(policy):
        config.model.remat = policy
        graph, params = model_graph(config.model, VOCABULARY), nnx.state(model)
        return jax.grad(lambda params: next_token_nll(nnx.merge(graph, params), jnp.asarray(rows)).mean())(params)

    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), gradient("none"), gradient(remat))
