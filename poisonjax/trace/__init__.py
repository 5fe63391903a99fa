"""Which documents put a behaviour there: replay without them, to the bit; hints beside it."""

from poisonjax.trace.behaviour import TraceError
from poisonjax.trace.exposures import exposures
from poisonjax.trace.hints import HINTS
from poisonjax.trace.trace import Named, Trace, ranked, suspects, trace

__all__ = ["HINTS", "Named", "Trace", "TraceError", "exposures", "ranked", "suspects", "trace"]
