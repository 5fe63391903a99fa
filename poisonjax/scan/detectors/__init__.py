"""Detectors by name; a new one is a line in `cheap_detectors`."""

from poisonjax.scan.background import Background
from poisonjax.scan.detectors import characters, words
from poisonjax.scan.detectors.compression import Compression
from poisonjax.scan.detectors.detector import Detector, Score, Windowed

__all__ = ["Detector", "Score", "cheap_detectors"]


def cheap_detectors(background: Background) -> dict[str, Detector]:
    """Those that every document is given to, against the counts of the corpus that it stands in."""
    windowed = {
        "surprise": words.surprise,
        "rarity": words.rarity,
        "repetition": words.repetition,
        "letters": characters.letters,
        "symbols": characters.symbols,
    }
    found: dict[str, Detector] = {name: Windowed(name, of, background) for name, of in windowed.items()}
    return found | {"compression": Compression()}
