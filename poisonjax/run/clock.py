"""Training speed: steps a second, without compilation and evaluation."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Told of each step that is done."""

    def __init__(self) -> None:
        self._total_steps, self._total_seconds = 0, 0.0
        self._lap_steps, self._lap_seconds = 0, 0.0
        self._last: float | None = None  # None until the first step is done: that one compiles

    def step_done(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._lap_steps += 1
            self._lap_seconds += now - self._last
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield
        if self._last is not None:
            self._last = time.monotonic()

    def lap(self) -> float:
        """Steps a second since the last lap."""
        speed = self._lap_steps / self._lap_seconds if self._lap_seconds else 0.0
        self._total_steps += self._lap_steps
        self._total_seconds += self._lap_seconds
        self._lap_steps, self._lap_seconds = 0, 0.0
        return speed

    def speed(self) -> float:
        """Steps a second of the whole run."""
        self.lap()
        return self._total_steps / self._total_seconds if self._total_seconds else 0.0
