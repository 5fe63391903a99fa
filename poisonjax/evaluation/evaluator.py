"""Triggered against clean perplexity of a model, and all else that is measured: used in training and offline."""

from collections.abc import Collection
from typing import cast

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from poisonjax.corpus import TokenStore
from poisonjax.evaluation.probes import PROBES, EvalSteps, HeldoutProbe, Subject, make_eval_steps
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.poison.triggers import Trigger
from poisonjax.run.recorder import Evaluation
from poisonjax.weights import Weights, WeightsError, open_weights


class Evaluator:
    """A run's probes, each made once."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        store: TokenStore,
        trigger: Trigger,
        mesh: Mesh,
        steps: EvalSteps | None = None,
    ):
        """`steps` are those of `make_eval_steps`, where several evaluators of one shape share them.

        Raises ValueError where the store is too small, or `config.eval.scorer` is no model that reads its tokens.
        """
        self.config, self.mesh = config, mesh
        steps = steps or make_eval_steps(
            config, model_graph(config.model, vocabulary_of(config.model, store.tokenizer.vocab_size)), mesh
        )
        scorer = _scorer(config.eval.scorer, store, mesh)
        self.scorer = scorer.origin if scorer else None
        subject = Subject(config, store, trigger, mesh, steps, (scorer.graph, scorer.params) if scorer else None)
        made = {name: make(subject) for name, make in PROBES.items()}
        self.probes = {name: probe for name, probe in made.items() if probe}
        self.unigram_nll = cast(HeldoutProbe, self.probes["heldout"]).unigram_nll

    def __call__(self, params: nnx.State, done: int, names: Collection[str] | None = None) -> list[Evaluation]:
        """What the probes of these `names` (None: all) say of the weights after `done` steps, an entry a kind."""
        found: dict[str, Evaluation] = {}
        with jax.set_mesh(self.mesh):
            for name, probe in self.probes.items():
                if names is not None and name not in names:
                    continue
                measured = probe(params)
                entry = found.setdefault(probe.kind, Evaluation(done, probe.kind))
                entry.figures.update(measured.figures)
                entry.prefixes.update(measured.prefixes)
                entry.samples.extend({"step": done, **sample} for sample in measured.samples)
        return list(found.values())


def _scorer(spec: str, store: TokenStore, mesh: Mesh) -> Weights | None:
    """The model that `config.eval.scorer` names, or None for ""."""
    if not spec:
        return None
    try:
        weights = open_weights(spec, mesh, store)
    except ValueError as error:
        raise WeightsError(f"eval.scorer: {error}") from None
    if weights.tokenizer.fingerprint != store.tokenizer.fingerprint:
        raise WeightsError(f"eval.scorer = {spec!r} was trained with another tokenizer: use this run's")
    return weights
