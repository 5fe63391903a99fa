"""What a sweep file says its points with: fields of a config by dotted name, and sets of them."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Point = dict[str, Any]  # config fields by dotted name
Axis = Mapping[str, Iterable[Any]] | Iterable[Point]


def _points(axis: Axis) -> list[Point]:
    if isinstance(axis, Mapping):
        return [dict(zip(axis, values, strict=True)) for values in itertools.product(*map(list, axis.values()))]
    return [dict(point) for point in axis]


def product(*axes: Axis) -> Iterator[Point]:
    """Each point of an axis with each of the others; an axis is {field: values} or an iterable of points."""
    for combination in itertools.product(*map(_points, axes)):
        yield functools.reduce(lambda one, other: one | other, combination, {})


def zipped(*axes: Axis) -> Iterator[Point]:
    """First point with first point, second with second; raises ValueError where their numbers differ."""
    for combination in zip(*map(_points, axes), strict=True):
        yield functools.reduce(lambda one, other: one | other, combination, {})


def chain(*axes: Axis) -> Iterator[Point]:
    """The points of one axis after those of another."""
    for axis in axes:
        yield from _points(axis)


def sized(layers: int, width: int, mlp_width: int, steps: int) -> Point:
    """Fields of a model of two heads that share its width, and of a run of so many steps, a twentieth of it warm-up."""
    return {
        "model.layers": layers,
        "model.width": width,
        "model.head_dim": width // 2,
        "model.mlp_width": mlp_width,
        "steps": steps,
        "optimizer.warmup_steps": steps // 20,
    }


def seeded(number: int) -> Point:
    """Fields that repeat a run with other luck: initial weights, order, poison and placement, but not what is asked."""
    return {f"seeds.{name}": 10 * number + i for i, name in enumerate(("init", "order", "poison", "placement"))}
