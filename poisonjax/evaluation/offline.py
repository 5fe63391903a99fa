"""Evaluation of saved checkpoints: the same code and the same numbers as during training."""

from collections.abc import Callable, Sequence

from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.words import perplexities
from poisonjax.files import write_lines
from poisonjax.model.sharding import make_mesh
from poisonjax.poison.ledger import poison_seen
from poisonjax.poison.triggers import Trigger
from poisonjax.run import RunFolder, rows
from poisonjax.weights import WeightsError
from poisonjax.weights.checkpoints import Checkpoints
from poisonjax.weights.open import abstract_params


def evaluate_run(
    folder: str, steps: Sequence[int] | None, say: Callable[[str], object] = lambda line: None
) -> list[rows.EvalRow]:
    """Evaluates checkpoints of a run folder (None: all), puts the rows into its metrics.jsonl, and returns them.

    `say` is told of each. Raises WeightsError for a step that has no checkpoint.
    """
    run = RunFolder(folder)
    config, store = run.config, run.store()
    mesh = make_mesh(config)
    checkpoints = Checkpoints(run.path)
    there = checkpoints.steps()
    missing = sorted(set(steps or ()) - set(there))
    if missing or not there:
        raise WeightsError(f"{folder}: no checkpoint of steps {missing}; there are {there}")
    evaluator = Evaluator(config, store, Trigger.of(config.poison, store.tokenizer), mesh)
    abstract = abstract_params(config.model, store.tokenizer.vocab_size, mesh)
    seen = poison_seen(run.ledger(), config.steps)
    evaluations = []
    for step in there if steps is None else steps:
        for evaluation in evaluator(checkpoints.weights(step, abstract), step):
            evaluations.append(evaluation)
            if evaluation.kind == "eval":
                say(f"step {step}  {perplexities(evaluation.figures)}")
    made = [evaluation.row(config, seen) for evaluation in evaluations]
    measured = {(row["step"], row["kind"]) for row in made}
    kept = [row for row in run.lines(rows.METRICS) if (row["step"], row["kind"]) not in measured]
    # A train row's step is the number of its batch, so at a tie it comes after the evaluation.
    write_lines(run.path / rows.METRICS, sorted([*kept, *made], key=lambda row: (row["step"], row["kind"] == "train")))
    prefixes = {row["step"]: row for row in run.prefixes()}
    prefixes |= {row["step"]: row for evaluation in evaluations if (row := evaluation.prefix_row())}
    write_lines(run.path / rows.PREFIXES, [prefixes[step] for step in sorted(prefixes)])
    return made
