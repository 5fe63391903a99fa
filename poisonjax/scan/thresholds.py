"""Thresholds that hold where they are used: a false-positive rate for each domain and language.

Conformal (Vovk et al. 2005): a group's documents say how large scores get. What the threshold flags is told out of
fold: of each fifth of them, by the threshold that the others set (cross-conformal, Vovk 2015). Of documents whose score
is the threshold itself a share is flagged, drawn by their keys (smoothed conformal, Vovk et al. 2005, 2.3), or ties
would move the rate. A share of poison in the corpus makes thresholds larger, not smaller: they err by what they miss,
never by more false positives than told.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

FOLDS = 5
ALL = "*"  # a language that a domain has too few documents of


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Scores above `value` are flagged in documents of this domain and language, and of those equal to it a share."""

    detector: str
    domain: str
    language: str
    nominal: float  # the rate asked for
    value: float | None  # None: the group has fewer documents than it takes to tell (1 / rate)
    share: float  # of the documents whose score is `value`: those of the smallest keys
    realised: float | None  # out of fold
    documents: int


def groups(
    domains: Int[np.ndarray, " documents"], languages: Int[np.ndarray, " documents"], fewest: int
) -> Iterator[tuple[int, int | None, Int[np.ndarray, " group"]]]:
    """(domain, language, which documents), by their numbers; a domain's small languages are put together as None."""
    for domain in np.unique(domains):
        here = np.flatnonzero(domains == domain)
        spoken = languages[here]
        numbers, counts = np.unique(spoken, return_counts=True)
        for number in numbers[counts >= fewest].tolist():
            yield int(domain), number, here[spoken == number]
        if len(small := numbers[counts < fewest]):
            yield int(domain), None, here[np.isin(spoken, small)]


def conformal(
    detector: str,
    scores: Float[np.ndarray, " documents"],
    folds: Integer[np.ndarray, " documents"],
    uniform: Float[np.ndarray, " documents"],
    where: tuple[str, str],
    rate: float,
) -> Threshold:
    """For one group; `folds` (in [0, FOLDS)) and `uniform` (in [0, 1)) go by the documents' keys, `where` is (domain,
    language)."""
    limit = _limit(Threshold(detector, where[0], where[1], rate, None, 0.0, None, len(scores)), scores)
    told = 0
    for fold in range(FOLDS):
        apart = folds == fold
        of_others = _limit(limit, scores[~apart])
        if of_others.value is None:
            return dataclasses.replace(limit, realised=None)
        told += int(flagged(of_others, scores[apart], uniform[apart]).sum())
    return dataclasses.replace(limit, realised=told / len(scores))


def _limit(limit: Threshold, held: Float[np.ndarray, " documents"]) -> Threshold:
    """As these scores set it."""
    rank = int(np.ceil((len(held) + 1) * (1 - limit.nominal)))
    if rank > len(held):
        return dataclasses.replace(limit, value=None)
    value = float(np.partition(held, rank - 1)[rank - 1])
    # Of n documents and the next one, all equally likely to be any of the order: n + 1 times the rate are flagged.
    above, equal = (held > value).sum(), (held == value).sum()
    share = float(np.clip(((len(held) + 1) * limit.nominal - above) / (equal + 1), 0, 1))
    return dataclasses.replace(limit, value=value, share=share)


def flagged(
    limit: Threshold, scores: Float[np.ndarray, " documents"], uniform: Float[np.ndarray, " documents"]
) -> Bool[np.ndarray, " documents"]:
    """Which documents of its group a threshold flags."""
    if limit.value is None:
        return np.zeros(len(scores), bool)
    return (scores > limit.value) | ((scores == limit.value) & (uniform < limit.share))


def p_values(scores: Float[np.ndarray, " documents"]) -> Float[np.ndarray, " documents"]:
    """The share of its group whose score is at least a document's."""
    order = np.argsort(scores)
    ranked, p = scores[order], np.empty(len(scores))
    p[order] = 1 - np.searchsorted(ranked, ranked, side="left") / max(len(scores), 1)
    return p
