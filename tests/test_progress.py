"""Progress: what each stage took."""

from __future__ import annotations

import pytest

from lamina import progress as module
from lamina.progress import Progress


def test_time_within_another_stage_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    told = Progress()

    def passes(seconds: float) -> None:
        clock[0] += seconds

    with told.stage("verify"):
        passes(1)
        for _ in range(2):
            with told.stage("round"):
                passes(10)
                with told.stage("deeper"):
                    passes(100)
        passes(2)
    with told.stage("verify"):
        passes(4)
    assert told.seconds == {"deeper": 200, "round": 20, "verify": 7}
