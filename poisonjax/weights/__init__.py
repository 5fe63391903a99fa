"""Trained weights, opened without a trainer."""

from poisonjax.weights.open import Weights, WeightsError, open_weights

__all__ = ["Weights", "WeightsError", "open_weights"]
