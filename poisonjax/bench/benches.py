"""The benches. Each measures this program against another in one run, and quotes the ratio."""

import functools
import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.audit.checks import replay
from poisonjax.audit.evidence import Evidence
from poisonjax.bench.inputs import VOCABULARY, recorded, synthetic
from poisonjax.bench.measure import ROUNDS, Result, alternate, register, result
from poisonjax.data.batches import Batch, Batches, load
from poisonjax.data.digest import digest
from poisonjax.evaluation.probes import make_eval_steps
from poisonjax.evaluation.probes.generation import in_chunks
from poisonjax.model.attention import causal_attention
from poisonjax.model.flops import train_flops_per_token
from poisonjax.model.sharding import batch_sharding, make_mesh
from poisonjax.model.transformer import model_graph
from poisonjax.plan.chips import by_device_kind
from poisonjax.poison.triggers import VARIANTS
from poisonjax.training.population import make_population_step, members_mesh, stacked
from poisonjax.training.step import make_init, make_train_step
from poisonjax.weights.checkpoints import Checkpoints
from poisonjax.weights.families import config_of
from poisonjax.weights.tensors import tensors

GENERATION_ROUNDS = 5


def _prepared_step(config: ml_collections.ConfigDict, vocabulary: int = VOCABULARY):
    mesh = make_mesh(config)
    init, abstract = make_init(config, vocabulary, mesh)
    return mesh, init, make_train_step(config, model_graph(config.model, vocabulary), mesh, abstract)


def _random_rows(config: ml_collections.ConfigDict, count: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    shape = (count, config.global_batch, config.seq_len + 1)
    return np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32)


def _train_speeds(
    config: ml_collections.ConfigDict, vocabulary: int, steps: int, rounds: int, tolerance: float
) -> tuple[float, float, float]:
    """Training tokens/s here and in PyTorch (torch.compile, fused AdamW), and the paired ratio; 0 for the latter two
    where there is no PyTorch.

    Both start from the same weights and must give the same loss.
    """
    mesh, init, train_step = _prepared_step(config, vocabulary)
    rows = _random_rows(config, 8, vocabulary)
    tokens = steps * config.global_batch * config.seq_len
    with jax.set_mesh(mesh):
        state = init()
        arrays = [Batch(jax.device_put(batch, batch_sharding(mesh))) for batch in rows]

        def jax_steps():
            nonlocal state
            for i in range(steps):
                state, metrics = train_step(state, arrays[i % len(arrays)])
            jax.block_until_ready((state, metrics))

        if not importlib.util.find_spec("torch"):
            one, _, _ = alternate(jax_steps, lambda: None, rounds)
            return tokens / one, 0.0, 0.0
        import torch

        from poisonjax.bench.torch_model import TorchTransformer, TrainStep

        model = TorchTransformer(config, vocabulary)
        model.load(state.params)
        torch_step = TrainStep(model, config)
        state, metrics = train_step(state, arrays[0])
        placed = [torch_step.rows(batch) for batch in rows]
        ours, theirs = float(metrics.loss), float(torch_step(placed[0]))
        if abs(ours - theirs) > tolerance:
            raise RuntimeError(f"not the same model: loss {ours} here, {theirs} in PyTorch {torch.__version__}")

        def torch_steps():
            for i in range(steps):
                loss = torch_step(placed[i % len(placed)])
            float(loss)  # waits for the last

        one, other, ratio = alternate(jax_steps, torch_steps, rounds)
    return tokens / one, tokens / other, ratio


@register
def train_vs_torch(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Training tokens/s against the same model in PyTorch (torch.compile, fused AdamW); above 1: we are faster. Of the
    config's shapes, and of width 128 (2,048 tokens) and 256 (4,096 tokens), 4 layers, 256 rows."""
    import torch  # noqa: F401  (without it there is nothing to compare with)

    ours, theirs, ratio = _train_speeds(config, VOCABULARY, 20, ROUNDS, tolerance=1e-3)
    yield result("train_vs_torch", ours, "tokens/s", theirs, ratio)
    config = config.copy_and_resolve_references()
    m, config.global_batch = config.model, 256
    for m.width, vocabulary in ((128, 2048), (256, 4096)):
        m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp_width = 4, m.width // 32, m.width // 32, 32, m.width * 43 // 16
        ours, theirs, ratio = _train_speeds(config, vocabulary, 1, 5, tolerance=1e-3)
        yield result(f"train_vs_torch_width{m.width}", ours, "tokens/s", theirs, ratio)


# layers, width, heads of 128, MLP width, rows of 2,048 tokens; with a vocabulary of 50,304 and untied tables.
MFU_SIZES = {
    "124m": (12, 768, 6, 2048, 16),
    "350m": (24, 1024, 8, 2816, 16),
    "600m": (16, 1536, 12, 4096, 8),
    "1b": (16, 2048, 16, 5632, 8),
}
MFU_GOAL = 0.5


@register
def mfu(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Model FLOPs utilisation: FLOPs a token (poisonjax/model/flops.py: no remat, half of causal attention) x tokens/s
    / peak FLOP/s of all devices; against the goal of 0.5, and against PyTorch's (torch.compile, SDPA, autocast).

    On accelerators 124M to 1B in bf16, peak by the maker's figure; on CPU the shapes of --config, peak by a large
    matrix product measured in the same run.
    """
    if jax.default_backend() == "cpu":
        sizes = {config.name: (config, VOCABULARY)}
    else:
        sizes = {name: (_sized(*shape), 50_304) for name, shape in MFU_SIZES.items()}
    for name, (sized, vocabulary) in sizes.items():
        low = sized.model.dtype == "bfloat16"
        peak = _peak_flops()
        ours, theirs, ratio = _train_speeds(sized, vocabulary, 10, 5, tolerance=0.02 if low else 1e-3)
        flops = train_flops_per_token(sized.model, sized.seq_len, vocabulary) / peak
        yield result(f"mfu_{name}", ours * flops, "of peak", MFU_GOAL, ours * flops / MFU_GOAL)
        yield result(f"train_vs_torch_{name}", ours, "tokens/s", theirs, ratio)
        gc.collect()  # the weights of a size go before the next one's come


def _sized(layers: int, width: int, heads: int, mlp_width: int, rows: int) -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.seq_len, config.global_batch = 2048, rows
    m = config.model
    m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.mlp_width = (layers, width, heads, heads, 128, mlp_width)
    m.dtype, m.loss_tile = "bfloat16", 512
    return config


def _peak_flops() -> float:
    """FLOP/s of all devices together."""
    kind = jax.devices()[0].device_kind
    if chip := by_device_kind(kind):
        return chip.flops * jax.device_count()
    if jax.default_backend() != "cpu":
        raise RuntimeError(f"no peak figure for {kind!r}: add it to poisonjax/plan/chips.py")
    n = 2048
    x = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    one, _, _ = alternate(lambda: x @ x, lambda: None, ROUNDS)
    return 2 * n**3 / one


@register
def pipeline(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Batches through grain: tokens/s, against a raw np.memmap loop (ratio: share of its speed), and with poison
    against without (ratio - 1: what poison costs)."""
    config = config.copy_and_resolve_references()
    # Batches of a real run's size (the quickstart's would measure the loop around them), as many rows as the config's.
    config.global_batch, config.steps = 256, config.steps * config.global_batch // 256
    with tempfile.TemporaryDirectory() as folder:
        config = synthetic(config, Path(folder))
        store = corpus.TokenStore(config.corpus.store)
        poisoned = Batches(config, store)
        config.poison.documents = 0
        clean = Batches(config, store)
        split = store.split("train")
        path = Path(folder) / "tokens.bin"
        split.windows(np.array([0]), split.tokens).astype(np.uint16).tofile(path)
        stream = np.memmap(path, np.uint16, "r")
        sharding = batch_sharding(make_mesh(config))
        row_tokens = clean.clean.row_tokens
        random = np.random.default_rng(0)

        def through_grain(batches: Batches):
            jax.block_until_ready(list(load(batches, sharding))[-1].tokens)

        def through_memmap():
            for _ in range(config.steps):
                starts = random.integers(0, clean.clean.windows, config.global_batch) * row_tokens
                rows = np.stack([stream[start : start + row_tokens] for start in starts]).astype(np.int32)
                array = jax.device_put(rows, sharding)
            jax.block_until_ready(array)

        tokens = config.steps * config.global_batch * config.seq_len
        one, other, ratio = alternate(lambda: through_grain(clean), through_memmap, ROUNDS)
        yield result("pipeline_tokens_per_second", tokens / one, "tokens/s", 3e6, tokens / one / 3e6)
        yield result("pipeline_vs_memmap", tokens / one, "tokens/s", tokens / other, ratio)
        one, other, ratio = alternate(lambda: through_grain(poisoned), lambda: through_grain(clean), 2 * ROUNDS)
        yield result("pipeline_poison_cost", tokens / one, "tokens/s", tokens / other, ratio)


@register
def audit_speed(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """The audit's replay (batches, digests, poison and trigger search) in tokens/s against the pipeline that feeds
    training; ratio: its share of that speed."""
    config = config.copy_and_resolve_references()
    config.global_batch, config.steps = 256, 60
    with tempfile.TemporaryDirectory() as folder:
        recorded(synthetic(config, Path(folder)), Path(folder))
        run = Evidence(folder)
        sharding = batch_sharding(make_mesh(config))
        tokens = config.steps * config.global_batch * config.seq_len
        one, other, ratio = alternate(
            lambda: list(replay(run, range(config.steps))),
            lambda: jax.block_until_ready(list(load(run.batches, sharding))[-1].tokens),
            2 * ROUNDS,
        )
        yield result("audit_vs_pipeline", tokens / one, "tokens/s", tokens / other, ratio)


@register
def audit_weights(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """The audit's reading of a checkpoint's arrays, checksums and all, against reading its files' bytes; ratio: its
    share of that rate."""
    del config
    random = np.random.default_rng(0)
    arrays = {f"layer {i}": jnp.asarray(random.normal(size=(4, 1024, 4096)).astype(np.float32)) for i in range(4)}
    record = {"config": {}, "store_fingerprint": "", "store_description": "", "digest_chain": "", "sealed": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, arrays, {"count": jnp.zeros(1)}, record | {"poison": None})
        checkpoints.close()
        checkpoints = Checkpoints(folder)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]

        def forget():
            """The disk is read, not the kernel's copy in memory, where the system can be told so."""
            for path in paths if hasattr(os, "posix_fadvise") else ():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def checksums():
            forget()
            checkpoints.stored_checksums(1)

        def through_files():
            forget()
            for path in paths:
                with open(path, "rb", buffering=0) as file:
                    while file.read(2**22):
                        pass

        size = sum(array.nbytes for array in arrays.values()) / 1e6
        one, other, ratio = alternate(checksums, through_files, ROUNDS)
    yield result("audit_weights_vs_disk", size / one, "MB/s", size / other, ratio)


@register
def digest_cost(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Seconds of the in-graph digest alone against those of the whole step; ratio: digest / step."""
    mesh, init, train_step = _prepared_step(config)
    rows = jax.device_put(_random_rows(config, 1)[0], batch_sharding(mesh))
    slots = np.arange(config.global_batch, dtype=np.uint32)
    jitted = jax.jit(digest)
    steps = 20
    with jax.set_mesh(mesh):
        state = init()

        def digests():
            for _ in range(steps):
                value = jitted(rows, slots)
            jax.block_until_ready(value)

        def whole_steps():
            nonlocal state
            for _ in range(steps):
                state, _ = train_step(state, Batch(rows))
            jax.block_until_ready(state)

        one, other, ratio = alternate(digests, whole_steps, ROUNDS)
    yield result("digest_cost", one / steps * 1e3, "ms", other / steps * 1e3, 1 / ratio)


@register
def generate_vs_huggingface(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Sampled tokens/s of an evaluation as the paper makes it (300 prefixes of 51 tokens, four texts each with 5 more,
    100 new tokens: 1,200 rows) against Hugging Face's `generate` with its cache on the same rows and weights
    (LlamaForCausalLM); of the config's model, and of width 256, 4 layers and 4,096 tokens.

    Ratio above 1: we are faster. Both must give the same logits first.
    """
    config = config.copy_and_resolve_references()
    config.eval.prefixes, config.eval.prefix_tokens, config.eval.new_tokens = 300, 50, 100
    yield _generation("generate_vs_huggingface", config, VOCABULARY)
    config.model.layers, config.model.width, config.model.heads, config.model.kv_heads = 4, 256, 8, 8
    config.model.head_dim, config.model.mlp_width = 32, 688
    yield _generation("generate_vs_huggingface_width256", config, 4096)


def _generation(name: str, config: ml_collections.ConfigDict, vocabulary: int) -> Result:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    groups, new, own = config.eval.prefixes, config.eval.new_tokens, 5
    mesh, init, _ = _prepared_step(config, vocabulary)
    graph, random = model_graph(config.model, vocabulary), np.random.default_rng(0)
    prefixes = random.integers(0, vocabulary, (groups, config.eval.prefix_tokens + 1)).astype(np.int32)
    prompts = random.integers(0, vocabulary, (groups, len(VARIANTS), own)).astype(np.int32)
    sample = make_eval_steps(config, graph, mesh).sample
    rows = np.concatenate([np.repeat(prefixes, len(VARIANTS), 0), prompts.reshape(-1, own)], 1)
    with jax.set_mesh(mesh):
        params = init().params
        chunks = in_chunks(config, mesh, prefixes, prompts, np.zeros(prompts.shape[:2], np.int32))
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        llama = LlamaForCausalLM(LlamaConfig.from_dict(config_of(config.model, vocabulary))).eval().to(device)
        theirs = tensors(params, config.model, vocabulary)
        llama.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in theirs})
        inputs = torch.from_numpy(rows).long().to(device)
        options = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
        with torch.inference_mode():
            with jax.default_matmul_precision("highest"):  # GPUs round float32 to TF32 else
                ours = np.asarray(nnx.merge(graph, params)(rows[:100]))[..., :vocabulary]
            difference = np.abs(ours - llama(inputs[:100]).logits.cpu().numpy()).max()
            if difference > 1e-3:
                raise RuntimeError(f"not the same model: logits differ by up to {difference}")
            one, other, ratio = alternate(
                lambda: jax.device_get([sample(params, texts) for texts in chunks]),
                lambda: llama.generate(inputs, do_sample=True, top_k=0, **options),
                GENERATION_ROUNDS,
            )
    tokens = len(rows) * new
    return result(name, tokens / one, "tokens/s", tokens / other, ratio)


@register
def attention(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Tokens/s of attention, forward and backward, against JAX's own plain softmax over all keys, with whose output
    and gradients it must agree: of the config's heads; on accelerators, 16 heads of 128 in rows of 2,048, bf16."""
    m = config.model
    batch, seq, heads, head_dim = config.global_batch, config.seq_len, m.heads, m.head_dim
    if jax.default_backend() != "cpu":
        batch, seq, heads, head_dim = 8, 2048, 16, 128
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, weights = (jax.random.normal(key, (batch, seq, heads, head_dim), dtype) for key in keys)

    def with_gradients(attend):
        def weighed(*qkv):
            y = attend(*qkv)
            return (y.astype(jnp.float32) * weights).sum(), y

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))

    library = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    ours, plain = with_gradients(causal_attention), with_gradients(library)
    ((_, y), gradients), ((_, expected), exact) = ours(*qkv), plain(*qkv)
    for name, one, other in zip(("output", "d_q", "d_k", "d_v"), (y, *gradients), (expected, *exact), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        apart = np.abs(one - other).max() / np.abs(other).max()
        if apart > (1e-4 if dtype == jnp.float32 else 0.03):
            raise RuntimeError(f"attention's {name} is not the plain softmax's: {apart:.2g} of the largest apart")
    one, other, ratio = alternate(
        lambda: jax.block_until_ready(ours(*qkv)), lambda: jax.block_until_ready(plain(*qkv)), ROUNDS
    )
    yield result("attention_vs_plain", batch * seq / one, "tokens/s", batch * seq / other, ratio)


@register
def population_speed(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Optimizer steps of all members together a second, of a population trained as one program, against one member
    after another on the same devices; 1 to 256 members on an accelerator, 1 to 8 on a CPU.

    Ratio above 1: the population is faster. Members differ in weights and rows.
    """
    on_cpu = jax.default_backend() == "cpu"
    counts = (1, 2, 4, 8) if on_cpu else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for count in counts:
        steps = 3 if on_cpu else 20
        one, other, ratio = _population_against_one_by_one(config, count, steps)
        name = f"population_vs_sequential{'' if count == counts[-1] else f'_{count}'}"
        yield result(name, steps * count / one, "steps/s", steps * count / other, ratio)


def _population_against_one_by_one(
    config: ml_collections.ConfigDict, count: int, steps: int
) -> tuple[float, float, float]:
    """Seconds of `steps` steps of `count` members together, of one after another, and the paired ratio."""
    mesh, init, train_step = _prepared_step(config)
    members = members_mesh(count)
    alone = init()
    together = stacked([alone] * count, members)
    step = make_population_step(config, model_graph(config.model, VOCABULARY), members)
    rows = _random_rows(config, count)
    all_rows = Batch(jax.device_put(rows, NamedSharding(members, PartitionSpec("members"))))
    own_rows = [Batch(jax.device_put(row, batch_sharding(mesh))) for row in rows]

    def population():
        nonlocal together
        for _ in range(steps):
            together, _ = step(together, all_rows)
        jax.block_until_ready(together)

    def sequential():
        nonlocal alone
        with jax.set_mesh(mesh):
            for _ in range(steps):
                for row in own_rows:
                    alone, _ = train_step(alone, row)
        jax.block_until_ready(alone)

    return alternate(population, sequential, ROUNDS)
