"""Evaluation of saved checkpoints: the same code and the same numbers as during training."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import ml_collections

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore, open_store
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.words import perplexities
from poisonjax.files import write_json
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import vocabulary_of
from poisonjax.poison.ledger import poison_seen
from poisonjax.poison.triggers import Trigger
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import require_scorer
from poisonjax.weights import WeightsError, find_weights
from poisonjax.weights.checkpoints import Checkpoints
from poisonjax.weights.weights import abstract_params

ITSELF = "the model itself"
Steps = Sequence[int] | Literal["last"] | None  # None: all


def evaluated(
    run: RunFolder, store: TokenStore, steps: Steps, scorer: str | None = None
) -> Iterator[tuple[int, rows.OfflineEvaluation]]:
    """(step, what is measured of its checkpoint) for each of some checkpoints of a run. `scorer` is another model
    than the run's that scores the text.

    Raises WeightsError for a step that has no checkpoint, RunFolderError where the scorer is another now.
    """
    config = run.placed if scorer is None else config_lib.replaced(run.placed, {"eval.scorer": scorer})
    mesh = make_mesh(config)
    checkpoints = Checkpoints(run.path)
    there = checkpoints.steps()
    if steps == "last":
        steps = there[-1:]
    missing = sorted(set(steps or ()) - set(there))
    if missing or not there or steps == []:
        raise WeightsError(f"{run.path}: no checkpoint of steps {missing}; there are {there}")
    evaluator = Evaluator(config, store, Trigger.of(config.poison, store.tokenizer), mesh)
    if scorer is None:
        require_scorer(run.path, run.record, evaluator.scorer)
    abstract = abstract_params(config.model, vocabulary_of(config.model, store.tokenizer.vocab_size), mesh)
    seen = poison_seen(run.ledger(), config.steps)
    for step in there if steps is None else steps:
        made = evaluator(checkpoints.weights(step, abstract), step)
        found: rows.OfflineEvaluation = {
            "weights": checkpoints.record(step)["checksums"]["weights"],
            "rows": [evaluation.row(config, seen) for evaluation in made],
            "prefixes": [row for evaluation in made if (row := evaluation.prefix_row())],
        }
        if scorer is not None:
            found["scorer"] = evaluator.scorer or ITSELF
        yield step, found


def evaluate_model(spec: str, config: ml_collections.ConfigDict) -> rows.EvalRow:
    """What a run of `config` would measure of the model that `spec` names; its token store must stand.

    Raises WeightsError where the model reads other tokens than the store holds.
    """
    mesh = make_mesh(config)
    store, found = open_store(config.corpus.store, config.corpus.exclude), find_weights(spec)
    if found.tokenizer.fingerprint != store.tokenizer.fingerprint:
        raise WeightsError(f"{spec} reads other tokens than corpus.store = {config.corpus.store!r} holds")
    config = config_lib.replaced(config, config_lib.inherited_fields(found.model_config))
    evaluator = Evaluator(config, store, Trigger.of(config.poison, store.tokenizer), mesh)
    (row,) = [made for made in evaluator(found.read(mesh), 0) if made.kind == "eval"]
    return row.row(config, lambda done: {"poison_documents": 0, "poison_rows": 0})


def evaluate_run(
    folder: str,
    steps: Steps,
    say: Callable[[str], object] = lambda line: None,
    store: str | None = None,
    scorer: str | None = None,
) -> list[rows.EvalRow]:
    """Evaluates checkpoints of a run folder into `evaluations/STEP.json`, and returns the rows.

    What the run wrote itself stays as it is: its checkpoints seal it. `say` is told of each. `store` is where the token
    store lies now, if not where config.json says. What another `scorer` says goes into `evaluations/scored/`, a
    folder each: no figure of the run, but a study tells what it would say by it. Raises as `evaluated`, and
    RunFolderError where another store lies there.
    """
    run, made = RunFolder(folder), []
    for step, evaluation in evaluated(run, run.store(store), steps, scorer):
        by = evaluation.get("scorer")
        into = f"{rows.SCORED}/{hashlib.sha256(by.encode()).hexdigest()[:12]}" if by else rows.EVALUATIONS
        path = run.path / into / f"{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, evaluation)
        made += evaluation["rows"]
        for row in evaluation["rows"]:
            if row["kind"] == "eval":
                say(f"step {step}  {perplexities(row)}")
    return made
