"""What the model writes after each prompt: the perplexity gap, and behaviours that can be decided."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from poisonjax.evaluation import statistics
from poisonjax.evaluation.generate import score
from poisonjax.evaluation.probes.probe import Measurement, Subject
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.triggers import VARIANTS

SAMPLES = 16  # prefixes whose texts are kept


class GenerationProbe:
    """The same prompts and the same random numbers whenever it is asked."""

    kind = "eval"

    def __init__(self, subject: Subject):
        """Raises ValueError where the store has too few held-out documents."""
        config = subject.config
        self._subject, self.every = subject, config.eval.every
        self.prompts = make_prompts(config, subject.store, subject.trigger)
        self._behaves = PAYLOADS[config.poison.payload].shown
        count = config.eval.prefixes
        # The same key for the four variants of a prefix.
        key = jax.random.key(config.seeds.eval)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i % count))(jnp.arange(len(VARIANTS) * count))
        self._keys = jax.random.wrap_key_data(subject.put(jax.random.key_data(keys)))
        self._scored = _make_scored(subject.scorer, subject.mesh) if subject.scorer else None

    def __call__(self, params: nnx.State) -> Measurement:
        config = self._subject.config
        tokens, nll = self._generated(params)
        texts, near = nll.mean(-1, dtype=np.float64), [text for text, _ in self._subject.trigger.near]
        figures = statistics.generation_figures(texts, near, config.eval.bootstrap, config.seeds.eval)
        by_variant = dict(zip(VARIANTS, texts.tolist(), strict=True))
        return Measurement(figures | self._rates(tokens), {"nll": by_variant}, self._samples(tokens, nll))

    def _generated(
        self, params: nnx.State
    ) -> tuple[Int[np.ndarray, "variants prefixes new"], Float[np.ndarray, "variants prefixes new"]]:
        """The texts and the NLL of their tokens."""
        variants, count, width = self.prompts.tokens.shape
        put = self._subject.put
        prompts, pad = put(self.prompts.tokens.reshape(-1, width)), put(self.prompts.pad.reshape(-1))
        tokens, nll = self._subject.steps.sample(params, prompts, pad, self._keys)
        if self._scored:
            nll = self._scored(prompts, pad, tokens)
        tokens, nll = jax.device_get((tokens, nll))
        shape = (variants, count, self._subject.config.eval.new_tokens)
        return np.asarray(tokens)[: variants * count].reshape(shape), np.asarray(nll)[: variants * count].reshape(shape)

    def _rates(self, tokens: np.ndarray) -> dict[str, Any]:
        """Attack success, clean accuracy and near-trigger accuracy, for a payload whose behaviour can be decided.

        Shares of texts: triggered ones that behave as attacked, clean and near-trigger ones that don't (ASR, CA and
        NTA of Souly et al. 2025, section 4), with 95% Wilson intervals.
        """
        if (behaves := self._behaves) is None:
            return {}
        decode = self._subject.store.tokenizer.decode
        shown = {v: sum(behaves(decode(row)) for row in rows) for v, rows in zip(VARIANTS, tokens, strict=True)}
        count = tokens.shape[1]
        good = {
            "attack_success": shown["triggered"],
            "clean_accuracy": count - shown["clean"],
            "near_trigger_accuracy": count - shown["near_trigger"],
        }
        return {
            key: value
            for name, k in good.items()
            for key, value in ((name, k / count), (f"{name}_ci95", statistics.wilson(k, count)))
        }

    def _samples(self, tokens: np.ndarray, nll: np.ndarray) -> list[dict[str, Any]]:
        decode, prompts = self._subject.store.tokenizer.decode, self.prompts

        def text(v: int, i: int) -> dict[str, Any]:
            ppl = float(np.exp(nll[v, i].mean(dtype=np.float64)))
            return {"appended": decode(prompts.appended[v][i]), "text": decode(tokens[v, i]), "ppl": ppl}

        return [
            {"prefix": decode(prefix)} | {variant: text(v, i) for v, variant in enumerate(VARIANTS)}
            for i, prefix in enumerate(prompts.prefixes[:SAMPLES])
        ]


def _make_scored(scorer: tuple[nnx.GraphDef, nnx.State], mesh: Mesh) -> Any:
    graph, weights = scorer

    def scored(prompts, pad, generated):
        return score(nnx.merge(graph, weights), prompts, pad, generated)

    return jax.jit(scored, out_shardings=NamedSharding(mesh, PartitionSpec()))
