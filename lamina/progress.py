"""How long work reports itself: a stage's name, how much is done, how much there is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Receives progress; this one keeps only the time each stage took. The CLI draws it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` units of ``stage`` are finished."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; seconds of a name that comes again add up."""
        start = time.perf_counter()
        self.update(name, 0, 0)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.update(name, 1, 1)
