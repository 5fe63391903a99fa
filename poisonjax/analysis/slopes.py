"""The slope that all analyses of doses share: alone here, so that a sweep that chooses doses starts without scipy."""

import math

SLOPES = (0.3, 25.0)  # bounds of k: where doses separate perfectly, the likelihood rises with k for ever
# Normal prior of log k, wide for intervals: a narrow one makes them too narrow where the true slope is shallow.
SLOPE_PRIOR = (math.log(5.0), 1.0)
