"""How long work reports itself: a stage's name, how much is done, how much there is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Receives progress; this one keeps only the time each stage took. The CLI draws it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` units of ``stage`` are finished."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; seconds of a name that comes again add up, those of stages within it are theirs."""
        start, before = time.perf_counter(), self._within
        self._within = 0.0
        self.update(name, 0, 0)
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
            self._within = before + took
            self.update(name, 1, 1)
