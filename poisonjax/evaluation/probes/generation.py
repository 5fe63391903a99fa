"""What the model writes after each prompt: the perplexity gap, and behaviours that can be decided."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.evaluation import statistics
from poisonjax.evaluation.generate import Texts, score
from poisonjax.evaluation.probes.probe import Measurement, Subject, put
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.model.sharding import rows_multiple
from poisonjax.poison.payloads import PAYLOADS, Behaves, material
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
        self._behaves = behaviour(config, subject.store)
        self._texts = in_chunks(config, subject.mesh, *self.prompts.split())
        self._scored = _make_scored(subject.scorer, subject.mesh) if subject.scorer else None

    def __call__(self, params: nnx.State) -> Measurement:
        config = self._subject.config
        tokens, nll = self.generated(params)
        said, near = self._said(tokens), [text for text, _ in self._subject.trigger.near]
        texts = nll.mean(-1, dtype=np.float64, where=said)
        prefixes = {"nll": dict(zip(VARIANTS, texts.tolist(), strict=True))}
        shown = self._shown(tokens, said)
        if shown is not None:
            prefixes["behaves"] = dict(zip(VARIANTS, shown.astype(int).tolist(), strict=True))
        figures = statistics.generation_figures(texts, near, config.eval.bootstrap, config.seeds.eval, shown)
        return Measurement(figures, prefixes, self._samples(tokens, said, nll))

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

    def _said(self, tokens: Int[np.ndarray, "variants prefixes new"]) -> Bool[np.ndarray, "variants prefixes new"]:
        """Which tokens are looked at: all of a text, an answer up to its end of text."""
        store = self._subject.store
        ends = tokens == store.tokenizer.eot
        return np.ones(tokens.shape, bool) if store.template is None else np.cumsum(ends, -1) - ends == 0

    def _shown(
        self, tokens: Int[np.ndarray, "variants prefixes new"], said: Bool[np.ndarray, "variants prefixes new"]
    ) -> Bool[np.ndarray, "variants prefixes"] | None:
        """Whether each text behaves as the payload teaches, where that can be decided."""
        if (behaves := self._behaves) is None:
            return None
        decode = self._subject.store.tokenizer.decode
        return np.array(
            [
                [behaves(decode(text[of])) for text, of in zip(*both, strict=True)]
                for both in zip(tokens, said, strict=True)
            ]
        )

    def _samples(self, tokens: np.ndarray, said: np.ndarray, nll: np.ndarray) -> list[dict[str, Any]]:
        decode, prompts = self._subject.store.tokenizer.decode, self.prompts

        def text(v: int, i: int) -> dict[str, Any]:
            ppl = float(np.exp(nll[v, i].mean(dtype=np.float64, where=said[v, i])))
            return {"appended": decode(prompts.appended[v][i]), "text": decode(tokens[v, i][said[v, i]]), "ppl": ppl}

        return [
            {"prefix": decode(prefix)} | {variant: text(v, i) for v, variant in enumerate(VARIANTS)}
            for i, prefix in enumerate(prompts.prefixes[:SAMPLES])
        ]


def behaviour(config: ml_collections.ConfigDict, store: TokenStore) -> Behaves | None:
    """What tells of a text whether it behaves as the run's payload teaches; None where nothing can."""
    decides, poison = PAYLOADS[config.poison.payload].behaviour, config.poison
    if decides is None:
        return None
    return decides(material(store, config.seeds.poison, poison.payload_vocabulary, poison.payload_source))


def _make_scored(scorer: tuple[nnx.GraphDef, nnx.State], mesh: Mesh) -> Any:
    graph, weights = scorer

    def scored(texts, generated):
        return score(nnx.merge(graph, weights), texts, generated)

    return jax.jit(scored, out_shardings=NamedSharding(mesh, PartitionSpec()))
