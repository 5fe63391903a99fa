"""Which documents put a behaviour there: replay without them, to the bit."""

from poisonjax.trace.behaviour import TraceError
from poisonjax.trace.trace import Named, Trace, trace

__all__ = ["Named", "Trace", "TraceError", "trace"]
