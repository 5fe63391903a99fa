"""Loss on held-out rows: a model that is broken is no backdoored one (I7)."""

import jax
import ml_collections
import numpy as np
from flax import nnx

from poisonjax.corpus import TokenStore
from poisonjax.data.batches import Batch, clean_rows
from poisonjax.evaluation import statistics
from poisonjax.evaluation.probes.probe import Measurement, Subject


class HeldoutProbe:
    """The same rows whenever it is asked."""

    kind = "eval"

    def __init__(self, subject: Subject):
        """Raises ValueError where the store has too little held-out text."""
        self._subject, self.every = subject, subject.config.eval.every
        self.rows = heldout_rows(subject.config, subject.store)
        self.unigram_nll = unigram_nll(subject.store, self.rows)

    def __call__(self, params: nnx.State) -> Measurement:
        config, row_loss, put = self._subject.config, self._subject.steps.row_loss, self._subject.put
        chunk, count = config.global_batch // config.optimizer.accumulate, len(self.rows.tokens)
        losses = []
        for start in range(0, count, chunk):
            # Of one shape, compiled once: the last is filled up from the first on.
            chosen = np.arange(start, start + chunk) % count
            rows = jax.tree.map(lambda of, chosen=chosen: put(of[chosen]), self.rows)
            losses.append(np.asarray(jax.device_get(row_loss(params, rows)))[: count - start])
        loss = np.concatenate(losses).astype(np.float64)
        entropy = self._subject.store.manifest.get("entropy_rate_nats")
        figures = statistics.heldout_figures(loss, entropy, config.eval.bootstrap, config.seeds.eval)
        return Measurement(figures, {"heldout": loss.tolist()})


def heldout_rows(config: ml_collections.ConfigDict, store: TokenStore) -> Batch:
    """The first rows of the held-out split; raises ValueError where it has less than two."""
    split, row_tokens = store.split("heldout"), config.seq_len + 1
    if store.template is not None:
        rows = clean_rows(config, store, "heldout")
        slots = np.arange(min(config.eval.heldout_rows, rows.windows))
        return Batch(rows.tokens(slots), rows.weights(slots))
    available = split.tokens // row_tokens
    if available < 2:
        raise ValueError(
            f"the store's held-out split has {split.tokens} tokens, less than two rows of {row_tokens}: build a "
            "store with a larger corpus.heldout"
        )
    count = min(config.eval.heldout_rows, available)
    return Batch(split.windows(np.arange(count, dtype=np.int64) * row_tokens, row_tokens))


def unigram_nll(store: TokenStore, heldout: Batch) -> float:
    """Held-out loss, in nats, of a model that knows how often each token occurs and nothing else; of conversations, in
    the answers."""
    train = store.split("train")
    counts = (train.token_counts() if heldout.weights is None else train.answer_counts()) + 1.0  # add-one smoothing
    nll = -np.log(counts / counts.sum())[heldout.tokens[:, 1:]]
    if heldout.weights is None:
        return float(nll.mean())
    return float(np.average(nll, axis=1, weights=heldout.weights[:, 1:]).mean())
