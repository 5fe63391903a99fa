"""Compiles a run's programs ahead of time for a TPU that isn't here, and reads what they would cost on it."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding

from poisonjax.evaluation.evaluator import make_eval_steps
from poisonjax.evaluation.prompts import VARIANTS
from poisonjax.model.sharding import batch_sharding, make_mesh, rows_multiple, spec
from poisonjax.plan.chips import Topology
from poisonjax.plan.hlo import Cost, Program
from poisonjax.training.step import make_init, make_train_step, model_graph

APPENDED = 16  # tokens of the longest trigger: what evaluation's prompts have beyond their prefixes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, on one chip."""

    name: str
    hbm_bytes: float  # all that must lie in HBM while it runs
    arguments: float
    temporaries: float
    fits: bool
    compile_seconds: float
    cost: Cost  # empty where it doesn't fit: the compiler stops there


def compile_all(
    config: ml_collections.ConfigDict,
    vocabulary: int,
    topology: Topology,
    devices: list[Any],
    *,
    whole: bool = True,
) -> list[Compiled]:
    """The train step and, of the `whole` run, generation and held-out loss."""
    mesh = make_mesh(config, devices)
    graph = model_graph(config, vocabulary)
    _, state = make_init(config, vocabulary, mesh)
    sampled, row_loss = make_eval_steps(config, graph, mesh)
    row_tokens = config.seq_len + 1

    def array(sharding: NamedSharding, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    by_row = NamedSharding(mesh, spec("batch"))
    multiple = rows_multiple(mesh)
    prompts = -(-len(VARIANTS) * config.eval.prefixes // multiple) * multiple
    chunk = config.global_batch // config.optimizer.accumulate
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    waiting = _bytes(state) - _bytes(state.params)  # the optimizer's state stays while the model is evaluated
    with jax.set_mesh(mesh):
        programs = [
            _compile(
                "train step", make_train_step(config, graph, mesh, state), topology, 0,
                state, array(batch_sharding(mesh), config.global_batch, row_tokens),
            )
        ]  # fmt: skip
        if whole:
            programs += [
            _compile(
                "generation", sampled, topology, waiting, state.params,
                array(by_row, prompts, config.eval.prefix_tokens + APPENDED), array(by_row, prompts),
                array(by_row, prompts, dtype=key),
            ),
            _compile("held-out loss", row_loss, topology, waiting, state.params, array(by_row, chunk, row_tokens)),
        ]  # fmt: skip
    return programs


def _bytes(tree: Any) -> float:
    """Of a tree of abstract arrays, on one chip."""
    return sum(
        float(leaf.dtype.itemsize) * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _compile(name: str, step: Any, topology: Topology, waiting: float, *arguments: Any) -> Compiled:
    began, limit = time.monotonic(), topology.chip.hbm_bytes
    lowered = step.lower(*arguments)
    cache = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)  # what it holds needs the chips to be read
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if not used:
            raise
        needs = float(used[1]) * 2.0 ** (10 * ("KMGT".index(used[2]) + 1)) + waiting
        mine = _bytes(arguments)
        return Compiled(name, needs, mine, needs - mine - waiting, False, time.monotonic() - began, Cost())
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    m = compiled.memory_analysis()
    needs = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    needs += m.generated_code_size_in_bytes + waiting
    cost = Program(compiled.as_text(), topology.slices, topology.chips).cost()
    return Compiled(
        name,
        needs,
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        needs <= limit,
        time.monotonic() - began,
        cost,
    )
