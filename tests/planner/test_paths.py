"""Low-rank paths in a plan: kept where they lower the damage and every bound still holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stacked_model import WIDTH, stacked

from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.backends.measure import Ratio
from lamina.budget import Budget
from lamina.data import Dataset
from lamina.ir.io import serialized_size
from lamina.passes.low_rank_path import apply_paths
from lamina.passes.pass_ import Site
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.builder import Finalist
from lamina.planner.evaluator import Score
from lamina.planner.mend import standing
from lamina.planner.paths import best_paths, with_paths
from lamina.planner.plan import Move, Plan
from lamina.planner.realize import Realized
from lamina.planner.search import Candidate, Goal
from lamina.planner.selection import Selection
from lamina.planner.timing import Relative
from lamina.quality import get_metric
from lamina.workload import parse_workload

TARGET = Target.parse("ort:cpu?threads=1")


def _data(seed: int) -> Dataset:
    x = np.random.default_rng(seed).normal(size=(64, 6, WIDTH)).astype(np.float32)
    return Dataset({"x": x}, {}, 8)


class _Scene:
    """A plan of four-bit weights, a budget, and a stopwatch that says what the test says."""

    def __init__(self, budget: str, *, allowed: float = float("inf"), latency: float = 0.9) -> None:
        self.program, transform = stacked(2), Quantize()
        sites = [s for s in transform.sites(self.program) if isinstance(s, Site)]
        moves = []
        for site in sites:
            options = transform.options(site, self.program, Statistics(0), TARGET)
            moves.append(Move(site, next(o for o in options if o.name == "w4")))
        changed = apply_moves(self.program, moves)
        self.stands_for = standing(moves, changed)
        relative = Relative(latency, latency, latency, {"1x6": Ratio(latency, latency, latency)})
        size = serialized_size(changed.model)
        predicted = {"latency": 0.8, "size": float(size), "flops": 1e6}
        candidate = Candidate((1,), predicted, 0.1, Score(0.1, 0.1, 0.0, 64))
        self.finalist = Finalist(candidate, Realized(changed, Plan("f", moves=tuple(moves))), relative)
        splits = SimpleNamespace(calibration=_data(1), selection=_data(2))
        self.request: Any = SimpleNamespace(
            budget=Budget.parse(budget),
            minimize="damage" if allowed == float("inf") else "latency",
            splits=splits,
            metric=get_metric(None, self.program),
            backend=get_backend(TARGET),
            draft=TARGET,
            program=self.program,
            workload=parse_workload("1x6", self.program, splits.selection),
            not_slower=False,
            synthetic_data=False,
        )
        self.forgotten: list[Any] = []
        self.builder: Any = SimpleNamespace(
            prepared=SimpleNamespace(
                folded=SimpleNamespace(program=self.program),
                undone=[],
                original_cost=SimpleNamespace(flops=1e9),
            ),
            stopwatch=SimpleNamespace(compare=lambda models, seconds: [relative for _ in models]),
            selection=Selection(self.request),
            original_size=size,
            original_latency_s=1.0,
            forget_memory=self.forgotten.append,
        )
        self.goal = Goal(self.request.minimize, {}, allowed)
        self.before = self.builder.selection.outcome(changed).damage

    def paths(self) -> Finalist | None:
        return with_paths(
            self.request,
            self.builder,
            self.finalist,
            self.goal,
            self.before,
            self.stands_for,
            seconds=float("inf"),
        )


def test_where_damage_is_minimized_paths_lower_it_and_are_priced() -> None:
    scene = _Scene("size<=9x, latency<=1x")
    found = scene.paths()
    assert found is not None
    plain, program = scene.finalist.realized.program, found.realized.program
    after = scene.builder.selection.outcome(program).damage
    assert after == found.candidate.score.damage
    assert after < 0.1 * scene.before
    grown = serialized_size(program.model) - serialized_size(plain.model)
    assert found.candidate.predicted["size"] - scene.finalist.candidate.predicted["size"] == grown > 0
    tokens = 6 * len(found.realized.plan.paths)
    added = found.candidate.predicted["flops"] - scene.finalist.candidate.predicted["flops"]
    assert added >= 2 * tokens * 16 * 2 * WIDTH
    assert found.candidate.predicted["latency"] == 0.9
    assert scene.forgotten == [(1,)]


def test_the_plan_carries_the_paths() -> None:
    scene = _Scene("size<=9x, latency<=1x")
    found = scene.paths()
    assert found is not None
    again = Plan.from_json(found.realized.plan.to_json())
    assert again.paths == found.realized.plan.paths
    program = apply_paths(scene.finalist.realized.program, again.paths)
    assert scene.builder.selection.outcome(program).damage == found.candidate.score.damage


@pytest.mark.parametrize(
    ("budget", "latency"),
    [("size<=1x", 0.9), ("size<=9x, latency<=0.85x", 0.9), ("size<=9x, latency<=1x", 1.2)],
)
def test_paths_that_would_break_a_bound_are_refused(budget: str, latency: float) -> None:
    assert _Scene(budget, latency=latency).paths() is None


def test_where_damage_is_bounded_the_lowest_rank_that_holds_it_is_taken() -> None:
    loose = _Scene("latency<=1x, drop<=1%")
    before = loose.before
    few = _Scene("latency<=1x, drop<=1%", allowed=0.9 * before).paths()
    many = _Scene("latency<=1x, drop<=1%", allowed=0.05 * before).paths()
    assert few is not None
    assert many is not None
    ranks = [max(p.down["shape"][-1] for p in f.realized.plan.paths) for f in (few, many)]
    assert ranks == [4, 16]
    assert _Scene("latency<=1x, drop<=1%", allowed=1e-9 * before).paths() is None


def test_the_best_paths_gain_most_a_byte() -> None:
    fitted: Any = [SimpleNamespace(gain=g, weight_bytes=b) for g, b in ((3, 3), (4, 1), (2, 1), (1, 9))]
    assert best_paths(fitted, 0.5) == fitted[1:3]
    assert best_paths(fitted, 1.0) == fitted
    assert best_paths(fitted, 0.01) == fitted[1:2]
