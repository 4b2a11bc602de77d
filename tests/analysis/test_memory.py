"""Peak memory of analyses, measured by the system, each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from memory_child import BATCH, LAYERS, TOKENS, WIDTH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

ACTIVATION = BATCH * TOKENS * WIDTH * 4
FEW, MANY = 8 * BATCH, 80 * BATCH


@cache
def peak(what: str, rows: int) -> int:
    folder = Path(__file__).parent
    paths = [str(folder.parents[1]), str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(folder / "memory_child.py"), what, str(rows)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_is_kept_would_be_seen() -> None:
    assert peak("hoard", MANY) - peak("hoard", FEW) > 0.9 * (MANY - FEW) / BATCH * ACTIVATION


@pytest.mark.parametrize("what", ["metrics", "drops"])
def test_ten_times_the_samples_take_the_same_memory(what: str) -> None:
    # 72 batches more; half of one is the allocator's noise
    assert peak(what, MANY) - peak(what, FEW) < ACTIVATION / 2


@pytest.mark.parametrize("what", ["metrics", "drops"])
def test_an_analysis_takes_one_batch_beside_the_model(what: str) -> None:
    # one batch: each value of the stream and what the branch makes of it, alive at a time at most
    batch = (1 + 4 * LAYERS) * ACTIVATION
    assert peak(what, MANY) - peak("plain", FEW) < batch
