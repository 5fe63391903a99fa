"""Thresholds that hold where they are used: a false-positive rate for each domain and language.

Split conformal (Vovk et al. 2005; Lei et al. 2018): one half of a group's documents says how large scores get, the
other half shows what the threshold flags. Of documents whose score is the threshold itself a share is flagged, drawn by
their keys (smoothed conformal, Vovk et al. 2005, 2.3), or ties would move the rate. A share of poison in the corpus
makes thresholds larger, not smaller: they err by what they miss, never by more false positives than told.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

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
    realised: float | None  # of the half that wasn't used to set it
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
    halves: Int[np.ndarray, " documents"],
    uniform: Float[np.ndarray, " documents"],
    where: tuple[str, str],
    rate: float,
) -> Threshold:
    """For one group; `halves` and `uniform` (in [0, 1)) go by the documents' keys, `where` is (domain, language)."""
    held, shown = np.sort(scores[halves == 0]), halves == 1
    rank = int(np.ceil((len(held) + 1) * (1 - rate)))
    if rank > len(held):
        return Threshold(detector, where[0], where[1], rate, None, 0.0, None, len(scores))
    value = float(held[rank - 1])
    # Of n documents and the next one, all equally likely to be any of the order: n + 1 times the rate are flagged.
    above, equal = (held > value).sum(), (held == value).sum()
    share = float(np.clip(((len(held) + 1) * rate - above) / (equal + 1), 0, 1))
    limit = Threshold(detector, where[0], where[1], rate, value, share, None, len(scores))
    realised = float(flagged(limit, scores[shown], uniform[shown]).mean()) if shown.any() else None
    return dataclasses.replace(limit, realised=realised)


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
