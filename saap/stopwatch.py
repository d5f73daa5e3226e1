"""Seconds that each stage of a run took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall-clock seconds by stage, in the order in which stages began."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._running: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with``; a stage entered again adds to its time."""
        self.seconds.setdefault(stage, 0.0)
        self._running[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - self._running.pop(stage)

    def so_far(self) -> dict[str, float]:
        """Seconds by stage, the stage that is running included."""
        now = time.perf_counter()
        return self.seconds | {stage: self.seconds[stage] + now - start for stage, start in self._running.items()}
