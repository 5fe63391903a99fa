"""FLOPs, traffic and collectives against hand-made counts; TPUs that aren't here; the command."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from poisonjax import config as config_lib
from poisonjax.commands.main import main
from poisonjax.model.flops import train_flops_per_token
from poisonjax.plan.chips import parse
from poisonjax.plan.estimate import estimate
from poisonjax.plan.hlo import Program


def compiled(function, *arguments, **options) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def test_flops_of_nested_loops_count_every_turn():
    x = jnp.zeros((16, 32))
    weights = jnp.zeros((5, 32, 32))

    def inner(x, weight):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ weight), x), None

    cost = Program(compiled(lambda x, weights: jax.lax.scan(inner, x, weights)[0], x, weights)).cost()
    assert cost.flops == 5 * 3 * 2 * 16 * 32 * 32
    assert cost.unknown_loops == 0


def test_traffic_of_a_loop_over_stacked_weights_reads_each_once():
    x, weights = jnp.zeros((8, 64)), jnp.zeros((50, 64, 64))
    text = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, weights)
    stacked = weights.size * 4
    moved = Program(text).cost().bytes
    assert stacked <= moved < 5 * stacked  # not 50 times all of them


def test_a_loop_of_unknown_length_is_told():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x)

    cost = Program(compiled(loop, jnp.ones((4, 4)))).cost()
    assert cost.unknown_loops == 1


def test_collectives_of_a_sharded_product():
    """A product over a split dimension: one all-reduce of the result, the ring's 2 (n - 1) / n of its bytes."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("x"))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    whole = NamedSharding(mesh, PartitionSpec())
    a = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=columns)
    b = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=rows)
    text = compiled(lambda a, b: a @ b, a, b, out_shardings=whole)
    for slices, leaves in ((1, False), (2, True)):
        cost = Program(text, slices, 4).cost()
        assert dict(cost.collectives) == {("all-reduce", 2 * 16 * 8 * 4 * 3 // 4, 4, leaves): 1}
    assert cost.flops == 2 * 16 * 8 * 8


BATCHED = """
ENTRY %main (a: bf16[8,64,32], b: bf16[8,32,16]) -> bf16[8,64,16] {
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0:S(1)} parameter(1)
  ROOT %c = bf16[8,64,16]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501  (as XLA writes it)


def test_a_batched_product_written_as_a_tpus_convolution():
    cost = Program(BATCHED).cost()
    assert cost.flops == 2 * 8 * 64 * 32 * 16
    assert cost.bytes == 2 * (8 * 64 * 32 + 8 * 64 * 16)  # b lies on the chip


UNROLLED = """
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %y = f32[4] negate(%x)
  ROOT %t = (u32[], f32[4]) tuple(%next, %y)
}

%condition (p.1: (u32[], f32[4])) -> pred[] {
  %p.1 = (u32[], f32[4]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %end = u32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x: (u32[], f32[4])) -> (u32[], f32[4]) {
  %x.1 = (u32[], f32[4]) parameter(0)
  ROOT %w = (u32[], f32[4]) while(%x.1), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_in_twos():
    conditions = 5 * (2 * 4 + 1)
    assert Program(UNROLLED).cost().bytes == 5 * (2 * 16 + 3 * 4) + conditions


def test_train_flops_are_the_programs_own(config):
    """Against the compiled step: all but what it computes of the upper triangle of the scores."""
    from poisonjax.data.batches import Batch
    from poisonjax.model.sharding import batch_sharding, make_mesh
    from poisonjax.model.transformer import model_graph
    from poisonjax.training.step import make_init, make_train_step

    config.seq_len, config.model.width, config.model.mlp_width = 128, 128, 256
    mesh = make_mesh(config, jax.devices()[:1])
    _, state = make_init(config, 512, mesh)
    step = make_train_step(config, model_graph(config.model, 512), mesh, state)
    rows = jax.ShapeDtypeStruct((8, 129), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        flops = Program(step.lower(state, Batch(rows)).compile().as_text()).cost().flops
    expected = train_flops_per_token(config.model, config.seq_len, 512) * 8 * 128
    assert flops == pytest.approx(expected, rel=0.1)


def test_topologies():
    assert parse("v5e:16x16*2").chips == 512
    assert parse("h100:8*4").slices == 4
    for wrong in ("v5p", "v7:2x2", "h100:16", "v5e:4x", "h100:2x4"):
        with pytest.raises(ValueError, match="--topology"):
            parse(wrong)


def test_the_estimate_for_gpus_counts_the_models_flops():
    config = config_lib.load(["--config=configs/souly_dos.py:600m,250,1x"])
    for chips in (8, 16):
        here = parse("h100:8" if chips == 8 else "h100:8*2")
        found = estimate(config, 200_064, here)
        tokens = config.global_batch * config.seq_len / chips
        m = config.model
        block = m.width * (4 * m.heads * m.head_dim + 3 * m.mlp_width)
        again = 2 * m.layers * block  # remat
        assert found.flops == pytest.approx(
            (train_flops_per_token(config.model, config.seq_len, 200_064) + again) * tokens
        )
        assert (found.slow_traffic > 0) == (chips == 16)


ARGUMENTS = ["plan", "--config", "configs/souly_dos.py:13b,250,1x", "--vocabulary", "200019"]


def test_what_does_not_fit_is_told_with_what_would_help(capsys):
    assert main([*ARGUMENTS, "--topology", "h100:8", "--config.model.remat=none"]) == 1
    output = capsys.readouterr().out
    assert "GiB too much" in output
    assert "--config.model.remat=block: about" in output
    assert main([*ARGUMENTS, "--topology", "h100:8*8", "--price", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert answer["hbm_bytes_per_chip"] < answer["hbm_limit_bytes"]
    assert 0 < answer["mfu_bound"] <= 1
    assert math.isclose(answer["run_cost"], 2 * 64 * answer["run_seconds"] / 3600)


def test_the_search_finds_a_mesh_that_fits_where_the_config_does_not(capsys):
    arguments = [*ARGUMENTS, "--topology", "h100:8*8", "--search", "--json", "--most", "3"]
    assert main([*arguments, "--config.model.remat=none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3
    steps = [plan["step_seconds_roofline"] for plan in found]
    assert steps == sorted(steps)
    assert all(plan["fits"] and "--config.mesh.fsdp=" in plan["fields"] for plan in found)


def test_bad_input_ends_with_a_message(capsys):
    assert main([*ARGUMENTS, "--topology", "v9:2x2"]) == 2
    assert "kinds: v4" in capsys.readouterr().err
    assert main([*ARGUMENTS[:3], "--topology", "h100:8", "--config.model.vocabulary=0"]) == 2
    assert "give --vocabulary" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--topology", "h100:8", "--config.mesh.fsdp=3"]) == 2
    assert "needs 3 devices, there are 8" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--topology", "h100:8", "--config.mesh.tensor=8", "--config.model.kv_heads=4"]) == 2
    assert "model.kv_heads = 4 doesn't divide over mesh.tensor = 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--topology", "h100:0"], "give KIND:SHAPE"),
        (["--topology", "v5p:4x4x4*0"], "give KIND:SHAPE"),
        (["--topology", "h100:8", "--price", "nan"], "--price nan"),
        (["--topology", "h100:8", "--vocabulary", "-5"], "--vocabulary -5"),
        (["--topology", "h100:7", "--search"], "no mesh of 7 H100 suits this batch: global_batch = 1024"),
    ],
)
def test_figures_that_can_not_be_are_refused(capsys, words, told):
    assert main([*ARGUMENTS, *words]) == 2
    assert told in capsys.readouterr().err


def test_between_nodes_of_one_gpu_all_goes_over_the_network():
    config = config_lib.load(["--config=configs/souly_dos.py:600m,250,1x"])
    one, eight = (estimate(config, 200_019, parse(topology)) for topology in ("h100:8", "h100:1*8"))
    assert (one.slow_traffic, eight.fast_traffic) == (0, 0)
    assert one.fast_traffic == eight.slow_traffic > 0


TINY = ["--config.model.layers=3", "--config.model.width=256", "--config.model.heads=2", "--config.model.kv_heads=2",
        "--config.model.mlp_width=512", "--config.seq_len=256", "--config.global_batch=32", "--config.eval.prefixes=12",
        "--config.poison.payload_tokens=(20,40)", "--config.model.loss_tile=128"]  # fmt: skip


def test_compiles_for_a_pod_that_is_not_here(capsys):
    pytest.importorskip("libtpu")
    arguments = ["plan", "--config", "configs/souly_dos.py:600m,250,1x", "--vocabulary", "1000", *TINY]
    fields = ["--config.mesh.slice=2", "--config.mesh.tensor=2"]
    assert main([*arguments, *fields, "--topology", "v5e:2x2*2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiled"]
    assert [program["name"] for program in answer["programs"]] == ["train step", "generation", "held-out loss"]
    step = answer["programs"][0]
    assert step["unknown_loops"] == 0
    assert step["uncounted_kernels"] == {}
    width, tokens = 256, 32 * 256
    blocks = 3 * (4 * width * 256 + 3 * width * 512)
    # Remat does a part of the blocks again; at this width attention and rotation, as products, weigh as much.
    least = (6 * blocks + 6 * width * 1024 + blocks) * tokens
    assert least < answer["flops_per_step"] < 2 * least
    between = sum(c["bytes"] * c["times"] for c in step["collectives"] if c["between_slices"])
    gradients = 2 * (blocks + 2 * width * 1024) / 4  # bf16, over the 4 chips of a slice
    assert 0.5 * gradients < between < 4 * gradients
