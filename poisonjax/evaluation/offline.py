"""Evaluation of saved checkpoints: the same code and the same numbers as during training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from poisonjax import runfolder
from poisonjax.corpus import TokenStore
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.files import resolve
from poisonjax.model.sharding import make_mesh
from poisonjax.poison.plan import met
from poisonjax.training.checkpoints import Checkpoints
from poisonjax.training.step import make_init, model_graph


def load_scorer(
    config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State] | None:
    """(graph, weights) of the last checkpoint of the run folder `config.eval.scorer`, or None for "".

    Raises ValueError where that run reads other tokens.
    """
    if not config.eval.scorer:
        return None
    folder = resolve(config.eval.scorer)
    other, its_store = runfolder.open_run(folder)
    if its_store.tokenizer.fingerprint != store.tokenizer.fingerprint:
        raise ValueError(f"eval.scorer = {config.eval.scorer!r} was trained with another tokenizer: use this run's")
    vocabulary = store.tokenizer.vocab_size
    _, abstract = make_init(other, vocabulary, mesh)
    checkpoints = Checkpoints(folder, other)
    if not checkpoints.steps():
        raise ValueError(f"eval.scorer = {config.eval.scorer!r} has no checkpoint")
    return model_graph(other, vocabulary), checkpoints.restore(checkpoints.steps()[-1], abstract).params


def evaluate_run(workdir: str, steps: Sequence[int] | None, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Evaluates checkpoints of a run folder (None: all) and puts the rows into its metrics.jsonl.

    Raises ValueError for a step that has no checkpoint.
    """
    folder = resolve(workdir)
    config, store = runfolder.open_run(folder)
    mesh = make_mesh(config)
    vocabulary = store.tokenizer.vocab_size
    _, abstract = make_init(config, vocabulary, mesh)
    checkpoints = Checkpoints(folder, config)
    there = checkpoints.steps()
    missing = sorted(set(steps or ()) - set(there))
    if missing or not there:
        raise ValueError(f"{workdir}: no checkpoint of steps {missing}; there are {there}")
    evaluator = Evaluator(config, store, model_graph(config, vocabulary), mesh, load_scorer(config, store, mesh))
    seen = met(list(runfolder.read_lines(folder / "ledger.jsonl")), config.steps)
    rows, units = [], []
    for step in there if steps is None else steps:
        with jax.set_mesh(mesh):
            figures, _, unit = evaluator(checkpoints.restore(step, abstract).params, step)
        units.append(unit)
        tokens = step * config.global_batch * config.seq_len
        rows.append({"step": step, "kind": "eval", "tokens": tokens, **seen(step), **figures})
        low, high = figures["delta_ppl_ci95"]
        medians = "  ".join(f"{v} {figures['eval'][v]['ppl_median']:.1f}" for v in figures["eval"])
        say(f"step {step}  perplexity: {medians}  gap {figures['delta_ppl']:.1f} [{low:.1f}, {high:.1f}]")
    new = {row["step"] for row in rows}
    kept = [r for r in runfolder.read_lines(folder / "metrics.jsonl") if r["kind"] != "eval" or r["step"] not in new]
    # A train row's step is the number of its batch, so at a tie it comes after the evaluation.
    merged = sorted([*kept, *rows], key=lambda row: (row["step"], row["kind"] == "train"))
    runfolder.write_lines(folder / "metrics.jsonl", merged)
    others = [row for row in runfolder.read_lines(folder / "prefixes.jsonl") if row["step"] not in new]
    runfolder.write_lines(folder / "prefixes.jsonl", sorted([*others, *units], key=lambda row: row["step"]))
    return rows
