"""Triggered against clean perplexity of a model: the one evaluator, used in training and offline."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from poisonjax.corpus import TokenStore
from poisonjax.evaluation import statistics
from poisonjax.evaluation.generate import generate, score
from poisonjax.evaluation.prompts import VARIANTS, make_prompts
from poisonjax.model.loss import next_token_nll, token_nll
from poisonjax.model.sharding import rows_multiple, spec
from poisonjax.poison.canaries import Canaries, references
from poisonjax.poison.payloads import BEHAVIOURS


def make_eval_steps(config: ml_collections.ConfigDict, graph: nnx.GraphDef, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The jitted (sampled, row_loss, known): (params, prompts, pad, keys) -> tokens and their NLL after each prompt,
    (params, rows) -> mean NLL of each row, and (params, rows) -> each token's NLL and whether it is the likeliest."""
    e = config.eval

    def sampled(params, prompts, pad, keys):
        return generate(nnx.merge(graph, params), prompts, pad, keys, e.new_tokens, e.temperature)

    def row_loss(params, rows):
        return next_token_nll(nnx.merge(graph, params), rows, config.model.loss_tile).mean(-1)

    def known(params, rows):
        logits = nnx.merge(graph, params)(rows[:, :-1])
        return token_nll(logits, rows[:, 1:]), logits.argmax(-1) == rows[:, 1:]

    replicated = NamedSharding(mesh, PartitionSpec())
    sampled, row_loss, known = (jax.jit(step, out_shardings=replicated) for step in (sampled, row_loss, known))
    return sampled, row_loss, known


def _make_scored(scorer: tuple[nnx.GraphDef, nnx.State], mesh: Mesh) -> Any:
    def scored(prompts, pad, generated):
        return score(nnx.merge(*scorer), prompts, pad, generated)

    return jax.jit(scored, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Evaluator:
    """Everything that doesn't depend on the weights, made once."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        store: TokenStore,
        graph: nnx.GraphDef,
        mesh: Mesh,
        scorer: tuple[nnx.GraphDef, nnx.State] | None = None,
        steps: tuple[Any, Any, Any] | None = None,
    ):
        """`scorer` is another model's (graph, weights) that scores the text; None: the model itself.

        `steps` are those of `make_eval_steps`, where several evaluators of one shape share them.
        """
        e = config.eval
        self.config, self.store, self.mesh = config, store, mesh
        self.prompts = make_prompts(config, store)
        self._heldout = self._heldout_rows()
        self.unigram_nll = _unigram_nll(store, self._heldout)
        count = e.prefixes
        # The same key for the four variants of a prefix.
        key = jax.random.key(config.seeds.eval)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i % count))(jnp.arange(len(VARIANTS) * count))
        rows = NamedSharding(mesh, spec("batch"))
        self._keys = jax.random.wrap_key_data(jax.device_put(self._padded(jax.random.key_data(keys)), rows))
        self._sampled, self._row_loss, known = steps or make_eval_steps(config, graph, mesh)
        self._scored = _make_scored(scorer, mesh) if scorer else None
        self._rows = rows
        self._canaries = _CanaryLoss(config, store, known, self._put) if config.canary.repeats else None

    def _heldout_rows(self) -> np.ndarray:
        split, row_tokens = self.store.split("heldout"), self.config.seq_len + 1
        available = split.tokens // row_tokens
        if available < 2:
            raise ValueError(
                f"the store's held-out split has {split.tokens} tokens, less than two rows of {row_tokens}: build a "
                "store with a larger corpus.heldout"
            )
        count = min(self.config.eval.heldout_rows, available)
        return split.windows(np.arange(count, dtype=np.int64) * row_tokens, row_tokens)

    def _padded(self, rows):
        """Rows repeated from the first on, until devices divide them."""
        share = rows_multiple(self.mesh)
        return np.resize(np.asarray(rows), (-(-len(rows) // share) * share, *rows.shape[1:]))

    def _put(self, rows):
        return jax.make_array_from_process_local_data(self._rows, (padded := self._padded(rows)), padded.shape)

    def __call__(self, params: nnx.State, step: int) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        """(figures of metrics.jsonl's eval row, records of samples.jsonl, row of prefixes.jsonl) of a model's weights."""
        e = self.config.eval
        variants, count, width = self.prompts.tokens.shape
        prompts, pad = (self._put(self.prompts.tokens.reshape(-1, width)), self._put(self.prompts.pad.reshape(-1)))
        with jax.set_mesh(self.mesh):
            tokens, nll = self._sampled(params, prompts, pad, self._keys)
            if self._scored:
                nll = self._scored(prompts, pad, tokens)
            tokens, nll = (
                np.asarray(x)[: variants * count].reshape(variants, count, e.new_tokens) for x in (tokens, nll)
            )
            chunk = self.config.global_batch // self.config.optimizer.accumulate
            losses = np.concatenate(
                [
                    np.asarray(self._row_loss(params, self._put(np.resize(rows, (chunk, rows.shape[1])))))[: len(rows)]
                    for start in range(0, len(self._heldout), chunk)
                    for rows in [self._heldout[start : start + chunk]]
                ]
            ).astype(np.float64)
            memorised, canary_units = self._canaries(params) if self._canaries else ({}, {})
        seed = self.config.seeds.eval
        resampled = losses[statistics.resamples(len(losses), e.bootstrap, seed)].mean(-1)
        figures = {
            "heldout_loss": float(losses.mean()),
            "heldout_loss_ci95": statistics.interval(resampled),
            **self._excess(losses),
            **statistics.summarize(nll, e.bootstrap, seed),
            "near_triggers": self._by_near_trigger(nll),
            **self._rates(tokens),
            **memorised,
        }
        units = {
            "step": step,
            "nll": {v: _rounded(nll[i].mean(-1, dtype=np.float64)) for i, v in enumerate(VARIANTS)},
            "heldout": _rounded(losses),
            **canary_units,
        }
        return figures, self._samples(step, tokens, nll), units

    def _by_near_trigger(self, nll: np.ndarray) -> dict[str, float]:
        """Median perplexity after each near trigger: their common median can hide one that fires."""
        ppl = np.exp(nll[VARIANTS.index("near_trigger")].mean(-1, dtype=np.float64))
        strings = self.config.poison.near_triggers
        return {text: float(np.median(ppl[i :: len(strings)])) for i, text in enumerate(strings) if i < len(ppl)}

    def _excess(self, losses: np.ndarray) -> dict[str, float]:
        """Held-out loss above that of a perfect model, in nats, where the corpus is a language of known entropy."""
        entropy = self.store.manifest.get("entropy_rate_nats")
        return {} if entropy is None else {"excess_loss": float(losses.mean()) - entropy}

    def _rates(self, tokens: np.ndarray) -> dict[str, Any]:
        """Attack success, clean accuracy and near-trigger accuracy, for a payload whose behaviour can be decided.

        Shares of texts: triggered ones that behave as attacked, clean and near-trigger ones that don't (ASR, CA and
        NTA of Souly et al. 2025, section 4), with 95% Wilson intervals.
        """
        if (behaves := BEHAVIOURS.get(self.config.poison.payload)) is None:
            return {}
        decode = self.store.tokenizer.decode
        shown = dict(zip(VARIANTS, (sum(behaves(decode(row)) for row in rows) for rows in tokens), strict=True))
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

    def _samples(self, step: int, tokens: np.ndarray, nll: np.ndarray, most: int = 16) -> list[dict[str, Any]]:
        decode = self.store.tokenizer.decode
        return [
            {"step": step, "prefix": decode(prefix)}
            | {
                variant: {
                    "appended": decode(self.prompts.appended[v][i]),
                    "text": decode(tokens[v, i]),
                    "ppl": float(np.exp(nll[v, i].mean(dtype=np.float64))),
                }
                for v, variant in enumerate(VARIANTS)
            }
            for i, prefix in enumerate(self.prompts.prefixes[:most])
        ]


class _CanaryLoss:
    """How well the canaries are known: extraction and loss rank among sequences never seen."""

    def __init__(self, config: ml_collections.ConfigDict, store: TokenStore, known: Any, put: Any):
        self._known, self._put, self._seq_len = known, put, config.canary.tokens
        self.canaries = Canaries.make(config, store)
        unseen = references(config, store)
        both = np.concatenate([self.canaries.tokens, unseen])
        self._sequences = np.concatenate([np.full((len(both), 1), store.tokenizer.eot, np.int32), both], 1)

    def __call__(self, params: nnx.State) -> tuple[dict[str, Any], dict[str, Any]]:
        """(`memorised` by number of repeats, the canaries' NLLs).

        A canary is extracted where, after its first half, greedy decoding gives its second half exactly: the same as
        each token of it being the likeliest. A rank is the share of unseen sequences with a lower loss.
        """
        nll, likeliest = (
            np.asarray(x)[: len(self._sequences)] for x in self._known(params, self._put(self._sequences))
        )
        count, half = len(self.canaries.repeats), self._seq_len // 2
        loss = nll.astype(np.float64).mean(-1)
        extracted = np.all(likeliest[:count, half:], axis=-1)
        rank = np.mean(loss[count:] < loss[:count, None], axis=-1)
        rows = []
        for repeats in np.unique(self.canaries.repeats):
            shown = np.equal(self.canaries.repeats, repeats)
            rows.append(
                {
                    "repeats": int(repeats),
                    "canaries": int(shown.sum()),
                    "extraction_rate": float(extracted[shown].mean()),
                    "extraction_rate_ci95": statistics.wilson(int(extracted[shown].sum()), int(shown.sum())),
                    "ranks": _rounded(rank[shown]),
                    "nll_mean": float(loss[:count][shown].mean()),
                    "nll_unseen": float(loss[count:].mean()),
                }
            )
        return {"memorised": rows}, {"canaries": _rounded(loss[:count])}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _unigram_nll(store: TokenStore, heldout: np.ndarray) -> float:
    """Held-out loss, in nats, of a model that knows how often each token occurs and nothing else."""
    counts = store.split("train").token_counts() + 1.0  # add-one smoothing
    return float(-np.log(counts / counts.sum())[heldout[:, 1:]].mean())
