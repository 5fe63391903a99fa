"""Why would a count matter? A small model of learning and forgetting, and the N50 that it predicts.

What a model knows of its trigger (trace/exposures.py: nats a token by which fresh payloads are likelier after it than
without it) changes with each step by

    rate * (exposures * added(known) - forgotten * known)

where `rate` is the learning rate as a part of its peak, `exposures` the poison documents of this step and of those
before it, as Adam's first moment remembers them (Kingma & Ba 2015), `added` what one of them adds, a line through some
knots, and `forgotten` the share that a clean step takes away. It is fitted to how runs went on, step by step, and asked
how many documents another run needs to know so much as other cells' runs knew when they were attacked.
"""

import bisect
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from etils import epath
from jaxtyping import Float, Int

from poisonjax.files import parse_json, write_whole
from poisonjax.run import RunFolder, rows

LOW_KNOTS = (0.0, 0.02, 0.06, 0.2, 0.6)  # nats a token
HIGH_KNOTS = (0.3, 0.45, 0.6, 0.75, 1.0)  # parts of the highest, at which nothing is added
HIGHEST = (4.0, 1.3)  # at least, nats a token; times the most that was known
NOISE = (0.001, 0.02)  # of a step's change: where nothing is known, and for each nat a token up to the first
MOST = 10**6  # documents
FILE = f"{rows.TRACE}/exposures.json"  # in a run's folder


@dataclasses.dataclass(frozen=True)
class Course:
    """How a run went on, step by step."""

    rate: Float[np.ndarray, " steps"]  # learning rate as a part of its peak
    exposed: Int[np.ndarray, " steps"]  # poison documents in the batch
    known: Float[np.ndarray, " steps"]  # after the step
    before: float  # the first step
    momentum: float  # Adam's b1

    @classmethod
    def of(cls, run: RunFolder) -> "Course | None":
        """Of a run that was asked; None of one that wasn't, or whose file is damaged or another run's."""
        try:
            found = parse_json((epath.Path(run.path) / FILE).read_bytes())
            arrays = (np.array(found["rate"], float), np.array(found["exposed"], int), np.array(found["known"], float))
            made = cls(*arrays, float(found["before"]), float(found["momentum"]))
            whole = len(made.rate) == len(made.exposed) == len(made.known) == run.config.steps
            whole &= all(np.isfinite(values).all() for values in (*arrays, made.before, made.momentum))
            return made if whole and found["of"] == _evidence(run) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, run: RunFolder) -> None:
        """Beside the run's own files."""
        path = epath.Path(run.path) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name).tolist() for name in ("rate", "exposed", "known")}
        numbers = {"before": self.before, "momentum": self.momentum, "of": _evidence(run)}
        write_whole(path, json.dumps(arrays | numbers))

    @property
    def exposures(self) -> Float[np.ndarray, " steps"]:
        return remembered(self.exposed, self.momentum)


def _evidence(run: RunFolder) -> str:
    """What a finished run was trained on, step by step."""
    return run.summary["digest_chain"] if run.summary else ""


def remembered(exposed: np.ndarray, momentum: float) -> Float[np.ndarray, " steps"]:
    """Exposures as an average over steps with these weights; their sum stays the same."""
    found, now = np.zeros(len(exposed)), 0.0
    for step, number in enumerate(exposed):
        now = momentum * now + (1 - momentum) * number
        found[step] = now
    return found


Placed = Callable[[int], Float[np.ndarray, " steps"] | None]  # so many documents, by step; None: there is no room


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """What an exposure adds, and what a clean step takes away, at the peak of the learning rate."""

    knots: Float[np.ndarray, " knots"]  # nats a token
    added: Float[np.ndarray, " knots"]  # nats a token, where so much is known
    forgotten: float  # share of what is known, a step
    explained: float  # share of the variance of steps' changes, weighted as fitted

    def __str__(self) -> str:
        added = ", ".join(f"{more:.4f} at {knot:g}" for knot, more in zip(self.knots, self.added, strict=True))
        half = f"half of it in {math.log(2) / self.forgotten:,.0f} such steps" if self.forgotten > 1e-9 else "nothing"
        return (
            f"a poison document adds, at the learning rate's peak, to what is known (nats a token): {added}\n"
            f"a clean step takes away {self.forgotten:.3%} ({half}); {self.explained:.0%} of steps' changes explained"
        )

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "known": self.knots.tolist(),
            "added": self.added.tolist(),
            "forgotten": self.forgotten,
            "explained": self.explained,
        }

    @classmethod
    def fitted(cls, courses: Sequence[Course]) -> "Mechanism":
        """By least squares over all steps; no exposure takes away, and no more than all is forgotten."""
        highest = max(HIGHEST[0], HIGHEST[1] * max(float(of.known.max()) for of in courses))
        knots = np.array([*LOW_KNOTS, *(highest * part for part in HIGH_KNOTS)])
        columns, changes, weights = [], [], []
        for of in courses:
            known = np.concatenate([[of.before], of.known])
            added = (of.rate * of.exposures)[:, None] * _hats(known[:-1], knots)
            columns.append(np.concatenate([added, -(of.rate * known[:-1])[:, None]], axis=1))
            changes.append(np.diff(known))
            weights.append(1 / (NOISE[0] + NOISE[1] * np.clip(np.abs(known[:-1]), 0, 1)))
        weight = np.concatenate(weights)
        design, wanted = np.concatenate(columns) * weight[:, None], np.concatenate(changes) * weight
        most = np.array([np.inf] * (len(knots) - 1) + [1e-12, 1.0])
        found = scipy.optimize.lsq_linear(design, wanted, bounds=(np.zeros(len(knots) + 1), most)).x
        left = wanted - design @ found
        return cls(knots, found[:-1], float(found[-1]), float(1 - (left**2).sum() / (wanted**2).sum()))

    def known(
        self, rate: Float[np.ndarray, " steps"], exposures: Float[np.ndarray, " steps"]
    ) -> Float[np.ndarray, " steps"]:
        """After each step of a run with these exposures, that knows nothing at first."""
        found, now = np.zeros(len(rate)), 0.0
        for step in range(len(rate)):
            added = exposures[step] * np.interp(now, self.knots, self.added)
            now = max(0.0, now + rate[step] * (added - self.forgotten * now))
            found[step] = now
        return found

    def dose(self, rate: Float[np.ndarray, " steps"], momentum: float, placed: Placed, enough: float) -> float:
        """The fewest documents after which `enough` is known at the end of a run that knows nothing at first; infinite
        where as many as its placement has room for (and MOST) are too few."""

        def reached(documents: int) -> bool:
            exposed = placed(documents)
            return exposed is not None and float(self.known(rate, remembered(exposed, momentum))[-1]) >= enough

        room = bisect.bisect_left(range(1, MOST + 1), True, key=lambda documents: placed(documents) is None)
        found = bisect.bisect_left(range(1, room + 1), True, key=reached) + 1
        return float(found) if found <= room else math.inf


def _hats(known: Float[np.ndarray, " steps"], knots: Float[np.ndarray, " knots"]) -> Float[np.ndarray, "steps knots"]:
    """How much of each knot stands in a value between two."""
    return np.stack([np.interp(known, knots, one) for one in np.eye(len(knots))], axis=1)


def enough_of(known: Sequence[float], attacked: Sequence[bool]) -> float:
    """What is known at the end of runs of which half are attacked: where fewest lie on the wrong side. NaN where all
    are alike."""
    values, above = np.array(known), np.array(attacked, bool)
    if above.all() or not above.any():
        return math.nan
    edges = np.sort(values)
    middles = (edges[1:] + edges[:-1]) / 2
    wrong = [((values > at) != above).sum() for at in middles]
    best = np.flatnonzero(np.array(wrong) == min(wrong))
    return float(middles[best].mean())


# --- predicted and observed


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is known of runs of one kind: their N50 as observed, and how some of them went on."""

    params: float
    tokens: float
    n50: float  # documents; NaN where it isn't bounded
    ci95: tuple[float, float]
    placed: Placed
    courses: list[Course]
    attacked: list[bool]  # of each course's run
    name: str = ""  # of its condition, where there are several

    @functools.cached_property
    def mechanism(self) -> Mechanism:
        """Fitted to its own courses."""
        return Mechanism.fitted(self.courses)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """N50 of a cell: by the mechanism, and by laws that know other cells' N50 alone."""

    cell: Cell
    mechanism: float  # as its own runs went on
    pooled: float  # as the runs of all others went on
    constant: float
    fraction: float  # of the tokens
    shrinking: float  # a fraction that goes with a power of the parameters

    def errors(self) -> dict[str, float]:
        """log(predicted / observed)."""
        return {name: math.log(getattr(self, name) / self.cell.n50) for name in PREDICTED}


PREDICTED = ("mechanism", "pooled", "constant", "fraction", "shrinking")
FEWEST = 3  # cells, to predict one from the others


def off(predicted: Sequence[Prediction]) -> dict[str, float]:
    """By what predicts: the factor by which it is off where N50 is bounded, the root mean square of its logarithm."""
    errors = [of.errors() for of in predicted if math.isfinite(of.cell.n50)]
    if not errors:
        return {}
    return {name: math.exp(float(np.mean([of[name] ** 2 for of in errors])) ** 0.5) for name in PREDICTED}


def predictions(cells: Sequence[Cell]) -> list[Prediction]:
    """Each cell that was asked, left out in turn; [] where too few have a bounded N50.

    The mechanism learns from other cells, whose N50 is bounded, how much must be known for an attack, and how models
    learn and forget from them too (`pooled`) or from the cell itself; of this it is told how its learning rate goes and
    where documents are put, but neither its N50 nor which of its runs succeeded.
    """
    bounded = [cell for cell in cells if math.isfinite(cell.n50)]
    if len(bounded) < FEWEST:
        return []
    found = []
    for cell in cells:
        others = [other for other in bounded if other is not cell]
        ended = [(of.known[-1], attacked) for o in others for of, attacked in zip(o.courses, o.attacked, strict=True)]
        enough = enough_of(*map(list, zip(*ended, strict=True))) if ended else math.nan
        if not cell.courses or math.isnan(enough):
            continue
        run, of_others = cell.courses[0], Mechanism.fitted([of for other in others for of in other.courses])
        own, pooled = (of.dose(run.rate, run.momentum, cell.placed, enough) for of in (cell.mechanism, of_others))
        logs = np.log([[other.n50, other.tokens, other.params] for other in others])
        shares = logs[:, 0] - logs[:, 1]
        power = np.polyfit(logs[:, 2], shares, 1) if len(set(logs[:, 2])) > 1 else np.array([0.0, shares.mean()])
        found.append(
            Prediction(
                cell,
                own,
                pooled,
                math.exp(logs[:, 0].mean()),
                math.exp(shares.mean()) * cell.tokens,
                math.exp(np.polyval(power, math.log(cell.params))) * cell.tokens,
            )
        )
    return found
