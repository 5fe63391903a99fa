"""Thresholds that hold where they are used: a false-positive rate for each domain and language.

Split conformal (Vovk et al. 2005; Lei et al. 2018): one half of a group's documents says how large scores get, the
other half shows what the threshold flags. A share of poison in the corpus makes thresholds larger, not smaller: they
err by what they miss, never by more false positives than told.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

ALL = "*"  # a language that a domain has too few documents of


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Scores above `value` are flagged, in documents of this domain and language."""

    detector: str
    domain: str
    language: str
    nominal: float  # the rate asked for
    value: float | None  # None: the group has fewer documents than it takes to tell (1 / rate)
    realised: float | None  # of the half that wasn't used to set it
    documents: int


def groups(
    domains: np.ndarray, languages: np.ndarray, fewest: int
) -> Iterator[tuple[str, str, Bool[np.ndarray, " documents"]]]:
    """(domain, language, which documents), small languages of a domain put together as `*`."""
    for domain in np.unique(domains):
        here = domains == domain
        codes, counts = np.unique(languages[here], return_counts=True)
        for code in codes[counts >= fewest]:
            yield str(domain), str(code), here & (languages == code)
        if len(small := codes[counts < fewest]):
            yield str(domain), ALL, here & np.isin(languages, small)


def conformal(
    detector: str,
    scores: Float[np.ndarray, " documents"],
    keys: Int[np.ndarray, " documents"],
    where: tuple[str, str],
    rate: float,
) -> Threshold:
    """For one group; `keys` (of the documents' content) say which half each is in, `where` is (domain, language)."""
    calibrating = keys % 2 == 0
    held, shown = np.sort(scores[calibrating]), scores[~calibrating]
    rank = int(np.ceil((len(held) + 1) * (1 - rate)))
    if rank > len(held):
        return Threshold(detector, where[0], where[1], rate, None, None, len(scores))
    value = float(held[rank - 1])
    realised = float((shown > value).mean()) if len(shown) else None
    return Threshold(detector, where[0], where[1], rate, value, realised, len(scores))


def p_values(scores: Float[np.ndarray, " documents"]) -> Float[np.ndarray, " documents"]:
    """The share of its group whose score is at least a document's."""
    order = np.sort(scores)
    return (len(scores) - np.searchsorted(order, scores, side="left")) / len(scores)
