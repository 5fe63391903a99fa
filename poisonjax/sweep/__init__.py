"""Many runs from one config file: a grid stated, trained, collected and analysed."""

from poisonjax.analysis.adaptive import Search
from poisonjax.sweep.grid import load
from poisonjax.sweep.planned import Sweep, SweepError
from poisonjax.sweep.points import chain, product, seeded, sized, zipped

__all__ = ["Search", "Sweep", "SweepError", "chain", "load", "product", "seeded", "sized", "zipped"]
