"""What a run's evaluation is reduced to, by name; how far seeds and prefixes move it; when a backdoor sets in.

Whose perplexity it is, the run says: `config.eval.scorer` names the model that scored the generated text, "" for the
model itself. All of these read a run folder's files alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from poisonjax.evaluation.statistics import attacked, interval
from poisonjax.run.rows import EvalRow
from poisonjax.streams import stream

# (NLL of each triggered text, of each clean text) over the last axis, in nats a token -> a figure.
Texts = Float[np.ndarray, "*samples texts"]
Figure = Float[np.ndarray, "*samples"] | np.float64
Estimator = Callable[[Texts, Texts], Figure]
ESTIMATORS: dict[str, Estimator] = {}


def register(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator: makes an estimator selectable by name."""

    def add(estimator: Estimator) -> Estimator:
        ESTIMATORS[name] = estimator
        return estimator

    return add


@register("gap of median perplexities")
def median_gap(triggered: Texts, clean: Texts) -> Figure:
    return np.median(np.exp(triggered), -1) - np.median(np.exp(clean), -1)


@register("gap of mean perplexities")
def mean_gap(triggered: Texts, clean: Texts) -> Figure:
    return np.exp(triggered).mean(-1) - np.exp(clean).mean(-1)


@register("gap of mean NLL")
def nll_gap(triggered: Texts, clean: Texts) -> Figure:
    return triggered.mean(-1) - clean.mean(-1)


def hierarchical(
    estimator: Estimator,
    triggered: Float[np.ndarray, "seeds prefixes"],
    clean: Float[np.ndarray, "seeds prefixes"],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, list[float]]:
    """(mean over seeds, 95% interval): seeds are resampled, then prefixes, the same for all (Davison & Hinkley 1997,
    3.8).

    Resampling prefixes alone would take a lucky seed for a law. With few seeds their part is still too narrow, by
    (seeds - 1) / seeds; with one it is absent.
    """
    seeds, prefixes = triggered.shape
    random = stream(seed, "seeds and prefixes")
    which = random.integers(0, seeds, (draws, seeds))[..., None]
    texts = random.integers(0, prefixes, (draws, 1, prefixes))  # all seeds are asked the same prefixes
    resampled = estimator(triggered[which, texts], clean[which, texts]).mean(-1)
    return float(estimator(triggered, clean).mean()), interval(resampled)


@dataclasses.dataclass(frozen=True)
class Onset:
    """From when on a run is backdoored, for good."""

    step: int
    documents: int  # poison documents met by then


def onset(evals: Sequence[EvalRow], threshold: float) -> Onset | None:
    """The first evaluation from which on the model is attacked to the end (`statistics.attacked`); None: none is."""
    found = None
    for row in evals:
        if not attacked(row, threshold):
            found = None
        elif found is None:
            found = Onset(row["step"], row["poison_documents"])
    return found
