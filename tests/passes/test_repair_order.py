"""Which operators are repaired, in which order, and which of them where time is short."""

from __future__ import annotations

import numpy as np
import pytest
from residual_nets import run
from stacked_model import WIDTH, stacked

from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.passes.compensate import Compensation, compensate
from lamina.passes.drop_branch import apply_drops
from lamina.passes.repair_order import Pace, distances
from lamina.passes.repair_sites import RepairSite


def _site(name: str) -> RepairSite:
    return RepairSite(name, "reader", None, "", "", "", 1, None)


def _taken(ranks: list[int], seconds: float, each: float) -> list[int]:
    pace, spent, taken = Pace(ranks), 0.0, []
    for number in range(len(ranks)):
        if pace.takes(number, spent, seconds - spent):
            taken.append(number)
            spent += each
    return taken


def test_with_time_enough_every_wave_is_visited() -> None:
    assert _taken([0, 1, 2, 0, 1], float("inf"), 1.0) == [0, 1, 2, 3, 4]
    assert _taken([0, 1, 2, 0, 1], 5.5, 1.0) == [0, 1, 2, 3, 4]


def test_where_time_is_short_what_is_nearest_behind_a_change_is_visited() -> None:
    assert _taken([0, 1, 2, 0, 1, 2], 2.5, 1.0) == [0, 3]
    assert _taken([0, 1, 2, 3, 0, 1, 2, 3], 4.5, 1.0) == [0, 1, 4, 5]


def test_without_time_nothing_is_visited() -> None:
    assert _taken([0, 1, 2], 0.0, 1.0) == []


def test_waves_are_counted_from_the_last_change_before_them() -> None:
    program = stacked(4)
    branches = find_branches(program).branches
    dropped = [branches[0], branches[2]]
    changed = apply_drops(program, [b.name for b in dropped])
    stands_for = {b.skip: b.output for b in dropped}
    names = ["up1", "down1", "up3", "down3"]
    found = distances(program, changed, [[_site(n)] for n in names], stands_for)
    assert found == [0, 1, 0, 1]


@pytest.mark.parametrize("seconds", [0.0, float("inf")])
def test_time_decides_how_much_is_repaired(seconds: float) -> None:
    program = stacked(3)
    branch = find_branches(program).branches[0]
    changed = apply_drops(program, [branch.name])
    x = np.random.default_rng(0).normal(size=(64, 6, WIDTH)).astype(np.float32)
    data = Dataset({"x": x}, {}, 8)
    made = compensate(
        program, changed, data, stands_for={branch.skip: branch.output}, threads=1, seconds=seconds
    )
    assert bool(made.repairs) == (seconds > 0)


def test_long_rows_are_not_run_for_tokens_nobody_looks_at() -> None:
    """Of 64 rows of 64 tokens, 32 rows hold twice the 1,024 tokens that are looked at."""
    program = stacked(2)
    branch = find_branches(program).branches[0]
    changed = apply_drops(program, [branch.name])
    x = np.random.default_rng(0).normal(size=(64, 64, WIDTH)).astype(np.float32)
    few = Dataset({"x": x[1::2]}, {}, 4)  # the middles of 32 equal parts
    made = [
        compensate(
            program,
            changed,
            data,
            stands_for={branch.skip: branch.output},
            how=Compensation(tokens=1024),
            threads=1,
        )
        for data in (Dataset({"x": x}, {}, 4), few)
    ]
    assert made[0].fitted
    assert [r.array for r in made[0].repairs] == [r.array for r in made[1].repairs]
    feeds = {"x": x}
    assert np.array_equal(run(made[0].program, feeds)[0], run(made[1].program, feeds)[0])
