"""Trained weights, opened without a trainer."""

from poisonjax.weights.open import find_weights, open_weights
from poisonjax.weights.weights import Weights, WeightsError

__all__ = ["Weights", "WeightsError", "find_weights", "open_weights"]
