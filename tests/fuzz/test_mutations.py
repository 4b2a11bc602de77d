"""A few hundred damaged files: the bounded part of ``python -m tools.mutate``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2])]

mutate = pytest.importorskip("tools.mutate", reason="damaging files needs fork and limits on memory")

COUNT = 300
SECONDS = 20.0  # a slow machine damages fewer


@pytest.fixture(scope="module")
def tally() -> object:
    return mutate.run(0, COUNT, None, seconds=SECONDS)


def test_no_damaged_file_crashes_hangs_or_escapes(tally: mutate.Tally) -> None:
    assert tally.files >= 100
    assert tally.bad == []


def test_damage_is_mostly_found_and_sometimes_harmless(tally: mutate.Tally) -> None:
    assert tally.outcomes["refused with advice"] > tally.files / 4
    assert tally.outcomes["same result"] > tally.files / 50
    assert sum(tally.unforeseen.values()) < tally.files / 50


def test_damage_depends_on_the_seed_alone() -> None:
    from graphs import build, spec_of

    data = build(spec_of(3)).proto.SerializeToString(deterministic=True)
    versions = {mutate.damage(data, random.Random(seed)) for seed in range(100)}
    assert len(versions) > 80
    assert mutate.damage(data, random.Random(5)) == mutate.damage(data, random.Random(5))


def test_a_crash_a_hang_and_an_escape_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness itself: each kind of harm, done on purpose, is seen and does not stop the run."""
    import os
    import signal
    import time

    harms = {
        1: lambda: os.kill(os.getpid(), signal.SIGTERM),
        2: lambda: time.sleep(60),
        3: lambda: (tmp_path / "outside").write_text("x"),
        4: lambda: 1 / 0,
    }

    def harmful(path: Path, out: Path) -> dict[str, object]:
        harms.get(int(path.parent.name[4:]), lambda: None)()
        return {"outcome": "refused with advice"}

    monkeypatch.setattr(mutate, "_try", harmful)
    monkeypatch.setattr(mutate, "SECONDS", 1.0)
    monkeypatch.setattr(mutate, "BASES", 2)
    found = mutate.run(0, 6, None)
    assert dict(found.outcomes) == {
        "refused with advice": 2,
        "crash": 1,
        "hang": 1,
        "wrote elsewhere": 1,
        "traceback": 1,
    }
