"""Placements: in which slots of the run the poison documents stand. Always exact, never a rate (I2).

`config.poison.placement` is one small spec, ORDER[:key=value,...]:

    uniform                       slots drawn over the run, without replacement (Souly et al. 2025)
    begin | end | even            the first slots, the last ones, or slots at equal distances
    batches:density=4,every=10    4 documents in every tenth batch, from the first on (the paper's ablation of
                                  density within a batch x frequency of poisoned batches)
    list:12,40,7                  the slots themselves, in the order of the documents

All but `list` take `window=0.25-0.75` too: the fraction of the run's steps that they may use. A slot is
`step * global_batch + position`. An order is a function registered by name in `ORDERS`; to add one, write it
here: its keyword arguments are the spec's keys.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from jaxtyping import Int

Slots = Int[np.ndarray, " count"]
ORDERS: dict[str, Callable[..., Slots]] = {}


class PlacementError(ValueError):
    """The spec can't be read, or can't be met; the message gives the arithmetic."""


def register(order: Callable[..., Slots]) -> Callable[..., Slots]:
    """Makes `(count, slots, global_batch, random, *, key: int, ...) -> distinct slots` an order by its name.

    `slots` is the range of slots that the window leaves, whole batches, never fewer than `count`.
    """
    ORDERS[order.__name__] = order
    return order


def place(
    spec: str, count: int, steps: int, global_batch: int, random: np.random.Generator, taken: Collection[int] = ()
) -> Slots:
    """`count` distinct slots, int64: entry i is where exposure i stands. None of them is `taken`: what the order puts
    there stands in the nearest free row of the same batch, else of a later one, else of an earlier one. Raises
    PlacementError."""
    order, options = parse(spec)
    if count == 0:  # the twin of a run whose placement needs documents
        return np.zeros(0, np.int64)
    if order == "list":
        if both := sorted({*options["slots"]} & {*taken}):
            raise PlacementError(f"listed are {both[:5]}, where hard negatives stand: list others")
        return _listed(options["slots"], count, steps * global_batch)
    first, last = (round(edge * steps) for edge in options.pop("window"))
    slots = range(first * global_batch, last * global_batch)
    if count > len(slots):
        raise PlacementError(
            f"{count} documents (repeats counted) need a row each, but its window of {last - first} steps x "
            f"{global_batch} rows has {len(slots)}: ask for fewer, for more steps or for a wider window"
        )
    return _beside(taken, ORDERS[order](count, slots, global_batch, random, **options), slots, global_batch)


def _beside(taken: Collection[int], chosen: Slots, slots: range, global_batch: int) -> Slots:
    held, moved = {*chosen.tolist(), *taken}, chosen.copy()
    jumps: dict[int, dict[int, int]] = {1: {}, -1: {}}

    def free(slot: int, way: int) -> int:
        """The next slot that isn't held; what was walked over is jumped over from then on."""
        walked, jump = [], jumps[way]
        while slot in held:
            walked.append(slot)
            slot = jump.get(slot, slot + way)
        jump.update(dict.fromkeys(walked, slot))
        return slot

    for i in np.flatnonzero(np.isin(chosen, [*taken])).tolist():
        slot = int(chosen[i])
        later, earlier = free(slot, 1), free(slot, -1)
        same = [near for near in (later, earlier) if near // global_batch == slot // global_batch]
        found = next((near for near in (*same, later, earlier) if near in slots), None)
        if found is None:
            raise PlacementError(f"{len(chosen)} documents and {len(taken)} hard negatives need a row each")
        moved[i] = found
        held.add(found)
    return moved


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """(order, its options) of a spec; raises PlacementError where it makes no sense whatever the run."""
    name, _, rest = spec.partition(":")
    if name == "list":
        try:
            return name, {"slots": [int(slot) for slot in rest.split(",")]}
        except ValueError:
            raise PlacementError(f"list:{rest[:40]}: give slots, as in list:12,40,7") from None
    if name not in ORDERS:
        raise PlacementError(f"no order {name!r}: choose one of {', '.join(sorted(ORDERS))}, list")
    parameters = inspect.signature(ORDERS[name]).parameters.values()
    keys = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    given = dict(option.partition("=")[::2] for option in rest.split(",") if option)
    window = given.pop("window", "0-1")
    if sorted(given) != sorted(keys):
        raise PlacementError(
            f"{name} takes {', '.join([*keys, 'window (optional)'])}, but got {', '.join(given) or 'nothing'}; for "
            f"example {':'.join([name, ','.join(f'{key}=2' for key in keys)]).rstrip(':')}"
        )
    bad = [f"{key}={value}" for key, value in given.items() if not value.isdecimal() or int(value) < 1]
    if bad:
        raise PlacementError(f"{', '.join(bad)}: give a whole number of at least 1")
    try:
        first, last = (float(edge) for edge in window.split("-"))
    except ValueError:
        first = last = -1.0
    if not 0 <= first < last <= 1:
        raise PlacementError(f"window={window}: give two fractions of the run, as in window=0.25-0.75")
    return name, {"window": (first, last), **{key: int(value) for key, value in given.items()}}


def _listed(listed: list[int], count: int, slots: int) -> Slots:
    outside = [slot for slot in listed if not 0 <= slot < slots]
    if len(listed) != count or outside or len(set(listed)) != count:
        twice = sorted({slot for slot in listed if listed.count(slot) > 1})
        raise PlacementError(
            f"{count} documents (repeats counted) need as many distinct slots in [0, {slots}); listed are {len(listed)}"
            f"{f', outside {outside[:5]}' if outside else ''}{f', twice {twice[:5]}' if twice else ''}"
        )
    return np.array(listed, np.int64)


@register
def uniform(count: int, slots: range, global_batch: int, random: np.random.Generator) -> Slots:
    """Uniform over the window, without replacement."""
    return slots.start + random.choice(len(slots), size=count, replace=False).astype(np.int64)


@register
def begin(count: int, slots: range, global_batch: int, random: np.random.Generator) -> Slots:
    """The window's first slots, without a gap."""
    return np.arange(slots.start, slots.start + count, dtype=np.int64)


@register
def end(count: int, slots: range, global_batch: int, random: np.random.Generator) -> Slots:
    """The window's last slots, without a gap."""
    return np.arange(slots.stop - count, slots.stop, dtype=np.int64)


@register
def even(count: int, slots: range, global_batch: int, random: np.random.Generator) -> Slots:
    """The middles of `count` equal parts of the window."""
    return slots.start + (2 * np.arange(count, dtype=np.int64) + 1) * len(slots) // (2 * count)


@register
def batches(
    count: int, slots: range, global_batch: int, random: np.random.Generator, *, density: int, every: int
) -> Slots:
    """`density` documents, at random rows, in every `every`-th batch of the window from its first on."""
    poisoned, rest = divmod(count, density)
    needed, there = (poisoned - 1) * every + 1, len(slots) // global_batch
    if density > global_batch:
        raise PlacementError(f"density {density} is more than the {global_batch} rows of a batch")
    if rest:
        raise PlacementError(
            f"{count} documents (repeats counted) at density {density} are {poisoned} batches and {rest} documents over"
        )
    if needed > there:
        raise PlacementError(
            f"{count} documents (repeats counted) at density {density} are {poisoned} batches; one every {every} steps "
            f"they take {needed} steps, the window has {there}"
        )
    rows = [random.choice(global_batch, density, replace=False) for _ in range(poisoned)]
    starts = slots.start + np.arange(poisoned, dtype=np.int64) * every * global_batch
    return (starts[:, None] + np.reshape(rows, (poisoned, density))).ravel().astype(np.int64)
