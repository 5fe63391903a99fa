"""How likely a model is poisoned, by its strongest candidate: calibrated on models whose truth is known."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from jaxtyping import Bool, Float

CALIBRATION = Path(__file__).with_name("calibration.json")
PRIOR = 3.0  # standard deviation of the slope's and the intercept's prior, in those of the values' logarithm


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a scan makes of a model."""

    p_poisoned: float | None  # by logistic regression on the logarithm of the strongest candidate's value
    strongest: float
    outside: list[str]  # in what the model differs from those that this was calibrated on


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A curve, and the models that it is of."""

    slope: float
    intercept: float
    models: int
    parameters: list[int]  # fewest and most
    vocabulary: list[int]

    @classmethod
    def read(cls) -> "Calibration | None":
        """The one that comes with this version; None where there is none."""
        return cls(**json.loads(CALIBRATION.read_text())) if CALIBRATION.exists() else None

    @classmethod
    def of(
        cls, strongest: Float[np.ndarray, " models"], poisoned: Bool[np.ndarray, " models"], **models: Any
    ) -> "Calibration":
        """Penalised maximum likelihood: where all poisoned models are above all clean ones, the likelihood alone would
        be sure of everything."""
        x = np.log(np.maximum(strongest, 1.0))
        centre, spread = x.mean(), max(x.std(), 1e-6)
        z, sign = (x - centre) / spread, np.where(poisoned, 1.0, -1.0)

        def loss(of: np.ndarray) -> float:
            return float(np.logaddexp(0, -sign * (of[0] * z + of[1])).sum() + (of**2).sum() / (2 * PRIOR**2))

        slope, intercept = scipy.optimize.minimize(loss, np.array([1.0, 0.0])).x
        return cls(float(slope / spread), float(intercept - slope * centre / spread), len(x), **models)

    def __call__(self, strongest: Any) -> Any:
        return 1 / (1 + np.exp(-(self.slope * np.log(np.maximum(strongest, 1.0)) + self.intercept)))


def judged(strongest: float, parameters: int, vocabulary: int) -> Verdict:
    """Of a model with so many parameters and tokens, whose strongest candidate has this value."""
    curve = Calibration.read()
    if curve is None:
        return Verdict(None, strongest, ["no version of it was calibrated yet"])
    asked: Sequence[tuple[str, int, list[int]]] = (
        ("parameters", parameters, curve.parameters),
        ("tokens in its vocabulary", vocabulary, curve.vocabulary),
    )
    outside = [
        f"{value:,} {what}; those had {low:,} to {high:,}"
        for what, value, (low, high) in asked
        if not low <= value <= high
    ]
    return Verdict(float(curve(strongest)), strongest, outside)
