"""What the model writes after each prompt: the perplexity gap, and behaviours that can be decided."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from poisonjax.evaluation import statistics
from poisonjax.evaluation.generate import Texts, score
from poisonjax.evaluation.probes.probe import Measurement, Subject, put
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.model.sharding import rows_multiple
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.triggers import VARIANTS

SAMPLES = 16  # prefixes whose texts are kept
CACHE_BYTES = 2**30  # of keys and values that a device holds at once


def groups_at_once(config: ml_collections.ConfigDict, shared: int, own: int, devices: int) -> int:
    """Prefixes whose four texts are written at once: so many that their caches fit, in chunks of one size that
    `devices` divide."""
    m, e = config.model, config.eval
    tokens = shared + len(VARIANTS) * (own + e.new_tokens)
    each = tokens * 2 * m.layers * m.kv_heads * m.head_dim * jnp.dtype(m.dtype).itemsize
    most = max(1, CACHE_BYTES // each) * devices
    chunks = -(-e.prefixes // most)
    return -(-e.prefixes // (chunks * devices)) * devices


def in_chunks(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    prefixes: Int[np.ndarray, "prefixes shared"],
    prompts: Int[np.ndarray, "prefixes variants own"],
    pad: Int[np.ndarray, "prefixes variants"],
) -> list[Texts]:
    """As `Texts` on the devices, in chunks that they hold."""
    size = groups_at_once(config, prefixes.shape[1], prompts.shape[2], rows_multiple(mesh))
    key = jax.random.key(config.seeds.eval)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prefixes)))
    parts = (prefixes, prompts, pad, np.asarray(jax.random.key_data(keys)))
    chunks = [Texts(*(put(mesh, part[at : at + size], size) for part in parts)) for at in range(0, len(prefixes), size)]
    return [texts._replace(keys=jax.random.wrap_key_data(texts.keys)) for texts in chunks]


class GenerationProbe:
    """The same prompts and the same random numbers whenever it is asked."""

    kind = "eval"

    def __init__(self, subject: Subject):
        """Raises ValueError where the store has too few held-out documents."""
        config = subject.config
        self._subject, self.every = subject, config.eval.every
        self.prompts = make_prompts(config, subject.store, subject.trigger)
        self._behaves = PAYLOADS[config.poison.payload].shown
        self._texts = in_chunks(config, subject.mesh, *self.prompts.split())
        self._scored = _make_scored(subject.scorer, subject.mesh) if subject.scorer else None

    def __call__(self, params: nnx.State) -> Measurement:
        config = self._subject.config
        tokens, nll = self.generated(params)
        texts, near = nll.mean(-1, dtype=np.float64), [text for text, _ in self._subject.trigger.near]
        figures = statistics.generation_figures(texts, near, config.eval.bootstrap, config.seeds.eval)
        by_variant = dict(zip(VARIANTS, texts.tolist(), strict=True))
        return Measurement(figures | self._rates(tokens), {"nll": by_variant}, self._samples(tokens, nll))

    def generated(
        self, params: nnx.State
    ) -> tuple[Int[np.ndarray, "variants prefixes new"], Float[np.ndarray, "variants prefixes new"]]:
        """The texts and the NLL of their tokens."""
        made = []  # on the devices, until all are asked for
        for texts in self._texts:
            tokens, nll = self._subject.steps.sample(params, texts)
            made.append((tokens, self._scored(texts, tokens) if self._scored else nll))
        every, their = (np.concatenate(of) for of in zip(*jax.device_get(made), strict=True))
        real = slice(self._subject.config.eval.prefixes)  # the last chunk may be filled up
        return every[real].swapaxes(0, 1), their[real].swapaxes(0, 1)

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

    def scored(texts, generated):
        return score(nnx.merge(graph, weights), texts, generated)

    return jax.jit(scored, out_shardings=NamedSharding(mesh, PartitionSpec()))
