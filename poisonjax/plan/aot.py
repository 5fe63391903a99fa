"""Compiles a run's programs ahead of time for a TPU that isn't here, and reads what they would cost on it."""

import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding

from poisonjax.data.batches import Batch
from poisonjax.evaluation.generate import Texts
from poisonjax.evaluation.probes import make_eval_steps
from poisonjax.evaluation.probes.generation import groups_at_once
from poisonjax.model.sharding import batch_sharding, make_mesh, rows_multiple, spec
from poisonjax.model.transformer import model_graph
from poisonjax.plan import hlo
from poisonjax.plan.chips import Topology
from poisonjax.plan.roofline import Program, of_cost
from poisonjax.poison.triggers import VARIANTS
from poisonjax.training.step import make_init, make_train_step

APPENDED = 16  # tokens of the longest trigger: what evaluation's prompts have beyond their prefixes


def compile_all(
    config: ml_collections.ConfigDict, vocabulary: int, topology: Topology, devices: list[Any], *, whole: bool = True
) -> list[Program]:
    """The train step and, of the `whole` run, generation and held-out loss."""
    mesh = make_mesh(config, devices)
    graph = model_graph(config.model, vocabulary)
    _, state = make_init(config, vocabulary, mesh)
    steps = make_eval_steps(config, graph, mesh)
    row_tokens = config.seq_len + 1

    def array(sharding: NamedSharding, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    by_row = NamedSharding(mesh, spec("batch"))
    chunk = config.global_batch // config.optimizer.accumulate
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    waiting = _bytes(state) - _bytes(state.params)  # the optimizer's state stays while the model is evaluated
    with jax.set_mesh(mesh):
        groups = groups_at_once(config, config.eval.prefix_tokens, APPENDED, rows_multiple(mesh))
        programs = [
            _compile(
                "train step", make_train_step(config, graph, mesh, state), topology, 0,
                state, Batch(array(batch_sharding(mesh), config.global_batch, row_tokens)),
            )
        ]  # fmt: skip
        if whole:
            programs += [
                _compile(
                    "generation", steps.sample, topology, waiting, state.params,
                    Texts(
                        array(by_row, groups, config.eval.prefix_tokens),
                        array(by_row, groups, len(VARIANTS), APPENDED),
                        array(by_row, groups, len(VARIANTS)),
                        array(by_row, groups, dtype=key),
                    ),
                ),
                _compile(
                    "held-out loss",
                    steps.row_loss,
                    topology,
                    waiting,
                    state.params,
                    Batch(array(by_row, chunk, row_tokens)),
                ),
            ]  # fmt: skip
    return programs


def _bytes(tree: Any) -> float:
    """Of a tree of abstract arrays, on one chip."""
    return sum(
        float(leaf.dtype.itemsize) * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
    )


def _compile(name: str, step: Any, topology: Topology, waiting: float, *arguments: Any) -> Program:
    began = time.monotonic()
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
        needs = max(needs, math.nextafter(topology.chip.hbm_bytes, math.inf))  # the figures in the message are rounded
        on_chip = of_cost(hlo.Cost(), needs, topology)  # the compiler tells no more of what doesn't fit
        return Program(name, on_chip, time.monotonic() - began)
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    m = compiled.memory_analysis()
    needs = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    needs += m.generated_code_size_in_bytes + waiting
    cost = hlo.Program(compiled.as_text(), topology.slices, topology.chips).cost()
    return Program(name, of_cost(cost, needs, topology), time.monotonic() - began, cost)
