"""Candidates tested on prefixes that didn't propose them, against strings like them; which of them is the trigger."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from poisonjax.scan.model import candidates as sources
from poisonjax.scan.model.changes import Null, family_wise
from poisonjax.scan.model.parts import ALONE, LEADING, RELATED, Scan
from poisonjax.scan.model.proposals import Proposed
from poisonjax.scan.model.writing import LONGEST, String, Writer

TOLD = 100  # candidates
ALIKE = 8  # strings that overlap, which are tested
SAME = 0.6  # of the strongest string's value: it does the same
OFTEN = 0.7  # of the texts that change after a string of a group: nearly all


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A string that was tested."""

    text: str
    tokens: String
    leads: bool  # the first of strings that overlap and do the same
    value: float  # robust standard deviations of its largest change from those of strings like it
    p_value: float  # of the smallest of all that were considered
    p_alone: float
    shift: list[float]  # by window: of what is expected, in variances of clean texts, logarithm
    entropy: list[float]  # nats
    sources: list[str]
    under_trained: bool  # a token that training hardly touched, of which some are tested: what follows proves little
    texts: int  # that the model wrote, and that changed after it
    clean: str  # a sample after a prefix alone
    triggered: str  # and with the string


@dataclasses.dataclass(frozen=True)
class Tested:
    candidates: list[Candidate]  # the likeliest trigger first
    null: Null  # what strings like them do


def tested(scan: Scan, proposed: Proposed, twins: Sequence[Writer]) -> Tested:
    """Of what is proposed, the strings that change most on a few prefixes are tested on others; then what overlaps
    the strongest."""
    sizes, prefixes = scan.sizes, proposed.prefixes
    few, fresh = prefixes[: sizes.screen_prefixes], prefixes[sizes.screen_prefixes :][: sizes.prefixes]
    chosen = various(_screened(scan, few, proposed.best(sizes.screened)), sizes.tested)
    apart = [(token,) for token in sorted(proposed.hardly_known)[:ALONE]]
    # Parts of a trigger are no strings like it.
    parts = {token for string in chosen[:ALIKE] for token in string}
    like = scan.like(chosen, proposed.counts, sizes.null, parts | proposed.hardly_known)
    measured = dict(_measured(scan, "test", fresh, [*chosen, *apart, *like], twins))
    null = Null(np.array([measured[string].figures for string in like]))
    values = {string: null.value(measured[string].figures) for string in chosen}
    related, led = _related(proposed, values)
    measured |= _measured(scan, "related", fresh, related, twins)
    values |= {string: null.value(measured[string].figures) for string in related}
    groups = grouped(values, led)
    leads = {group[0] for group in groups}
    order = [string for group in groups for string in group][:TOLD]
    values |= {string: null.value(measured[string].figures) for string in apart}
    every = [*order, *sorted(apart, key=lambda string: -values[string])]
    alone = null.p_values(np.array([values[string] for string in every]))
    p = family_wise(alone, proposed.considered + len(related) + len(apart))
    decode, prefix = scan.tokenizer.decode, scan.tokenizer.decode(fresh[0, 1:])
    told = [
        Candidate(
            text=decode(string),
            tokens=string,
            leads=string in leads,
            value=values[string],
            p_value=float(p[i]),
            p_alone=float(alone[i]),
            shift=measured[string].shift.tolist(),
            entropy=measured[string].entropy.tolist(),
            sources=[name for name, of in proposed.by_source.items() if string in of],
            under_trained=i >= len(order),
            texts=led.get(string, 0),
            clean=prefix + decode(_known(scan, measured[string].clean)),
            triggered=prefix + decode(string) + decode(_known(scan, measured[string].text)),
        )
        for i, string in enumerate(every)
    ]
    return Tested(told, null)


def _known(scan: Scan, tokens: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " known"]:
    """Without ids that the tokenizer has no text for: a model's table may be longer."""
    return tokens[tokens < scan.tokenizer.vocab_size]


def _screened(scan: Scan, prefixes: Int[np.ndarray, "prefixes length"], strings: Sequence[String]) -> list[String]:
    """The strings in order of what they change, as against random ones of their lengths."""
    random = np.random.default_rng(scan.seed)
    control = [tuple(random.choice(scan.ordinary, 1 + i % LONGEST).tolist()) for i in range(scan.sizes.tested)]
    figures = np.array([one.figures for _, one in _measured(scan, "screen", prefixes, [*strings, *control], [])])
    values = Null(figures[len(strings) :])(figures[: len(strings)])
    return [strings[i] for i in np.argsort(-values, kind="stable")]


class Measured(NamedTuple):
    """Of a string."""

    figures: Float[np.ndarray, " figures"]  # what it changes, less what it does in clean twins
    shift: Float[np.ndarray, " windows"]
    entropy: Float[np.ndarray, " windows"]
    clean: Int[np.ndarray, " new"]  # written after the first prefix
    text: Int[np.ndarray, " new"]  # and the string


def _measured(
    scan: Scan,
    name: str,
    prefixes: Int[np.ndarray, "prefixes length"],
    strings: Sequence[String],
    twins: Sequence[Writer],
) -> Iterator[tuple[String, Measured]]:
    if not strings:
        return
    change, clean, seen = scan.changes(name, prefixes, strings)
    figures = change.figures
    for number, twin in enumerate(twins):
        figures = figures - scan.changes(f"{name}-twin-{number}", prefixes, strings, twin)[0].figures / len(twins)
    for i, string in enumerate(strings):
        yield string, Measured(figures[i], change.shift[i], change.entropy[i], clean.tokens[0, 0], seen.tokens[i, 0])


def various(strings: Sequence[String], number: int) -> list[String]:
    """So many of the strings, the first ones, of those that overlap `ALIKE` at most."""
    chosen: list[String] = []
    for string in strings:
        if len(chosen) < number and sum(overlap(string, other) for other in chosen) < ALIKE:
            chosen.append(string)
    return chosen


def _leading(values: Mapping[String, float]) -> list[String]:
    """The strongest string of each of the first groups."""
    first: list[String] = []
    for string in sorted(values, key=values.__getitem__, reverse=True):
        if len(first) < LEADING and not any(overlap(string, other) for other in first):
            first.append(string)
    return first


def _related(proposed: Proposed, values: Mapping[String, float]) -> tuple[list[String], dict[String, int]]:
    """(of the first groups, what overlaps their strongest string and leads most texts to change: parts of it, and what
    any source proposed; how many texts changed after each string)."""
    leading = _leading(values)
    known = {string for of in proposed.by_source.values() for string in of}
    parts = {first[i:j] for first in leading for i in range(len(first)) for j in range(i + 1, len(first) + 1)}
    led = sources.led_to_change(proposed.written, known | parts)
    most = sorted(led, key=lambda of: (-led[of], of))
    found: dict[String, None] = {}
    for first in leading:
        beside = [of for of in most if of in known or _within(of, first)]
        related = itertools.islice((of for of in beside if overlap(of, first)), RELATED)
        found |= dict.fromkeys(of for of in related if of not in values)
    return [*found], led


def _within(part: String, whole: String) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def grouped(values: Mapping[String, float], led: Mapping[String, int]) -> list[list[String]]:
    """Strings that overlap and change the same, together; of each group the likeliest trigger first.

    `led` is how many texts changed after each string. The beginning of a trigger does as much as the whole, for the
    model goes on with the rest; so the longest leads of those that nearly all of these texts hold.
    """
    groups: list[list[String]] = []
    for string in sorted(values, key=values.__getitem__, reverse=True):
        group = next((group for group in groups if any(overlap(string, one) for one in _same(group, values))), None)
        if group is None:
            groups.append([string])
        else:
            group.append(string)
    for group in groups:
        strong = _same(group, values)
        most = max(led[string] for string in strong)
        held = [string for string in strong if led[string] >= OFTEN * most]
        lead = max(held, key=lambda of: (len(of) if most else 0, values[of]))
        group.sort(key=lambda of: (of != lead, values[of] < SAME * values[lead], -led[of], -values[of]))
    return groups


def _same(group: Sequence[String], values: Mapping[String, float]) -> list[String]:
    """Those that change nearly as much as the first."""
    return [string for string in group if values[string] >= SAME * values[group[0]]]


def overlap(one: String, other: String) -> bool:
    """Whether they share half of the shorter one, in one piece."""
    size = -(-min(len(one), len(other)) // 2)
    parts = {one[i : i + size] for i in range(len(one) - size + 1)}
    return any(other[i : i + size] in parts for i in range(len(other) - size + 1))
