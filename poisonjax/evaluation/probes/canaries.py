"""How well the canaries are known: extraction, and loss rank among sequences never seen."""

import jax
import numpy as np
from flax import nnx

from poisonjax.data.canaries import Canaries, unseen
from poisonjax.evaluation import statistics
from poisonjax.evaluation.probes.probe import Measurement, Subject


class CanaryProbe:
    """A canary is extracted where, after its first half, greedy decoding gives its second half exactly: the same as
    each token of it being the likeliest. A rank is the share of unseen sequences with a lower loss."""

    kind = "eval"

    def __init__(self, subject: Subject):
        config, store = subject.config, subject.store
        self._subject, self.every = subject, config.eval.every
        self.canaries = Canaries.make(config, store, subject.trigger)
        both = np.concatenate([self.canaries.tokens, unseen(config, store, subject.trigger)])
        self._sequences = np.concatenate([np.full((len(both), 1), store.tokenizer.eot, np.int32), both], 1)

    @classmethod
    def of(cls, subject: Subject) -> "CanaryProbe | None":
        return cls(subject) if subject.config.canary.repeats else None

    def __call__(self, params: nnx.State) -> Measurement:
        measured = jax.device_get(self._subject.steps.known(params, self._subject.put(self._sequences)))
        nll, likeliest = (np.asarray(x)[: len(self._sequences)] for x in measured)
        count, half = len(self.canaries.repeats), self._subject.config.canary.tokens // 2
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
                    "ranks": rank[shown].tolist(),
                    "nll_mean": float(loss[:count][shown].mean()),
                    "nll_unseen": float(loss[count:].mean()),
                }
            )
        return Measurement({"memorised": rows}, {"canaries": loss[:count].tolist()})
