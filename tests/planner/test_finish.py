"""When finished plans are slower than predicted, slower than the bound allows, faster ones are looked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lamina.budget import Budget
from lamina.planner.finish import correct_latency, correct_size
from lamina.planner.goal import AIM
from lamina.planner.search import Goal


class Candidate(SimpleNamespace):
    def feasible(self, goal: Goal) -> bool:
        return goal.affords(self.predicted)

    def objective(self, goal: Goal) -> float:
        return self.surrogate


def candidate(genome: str, predicted: float, damage: float = 0.0, axis: str = "latency") -> Candidate:
    return Candidate(genome=genome, predicted={axis: predicted}, surrogate=damage)


def finished(genome: str, predicted: float, measured: float, damage: float = 0.0) -> Any:
    relative = SimpleNamespace(ratio=measured)
    return SimpleNamespace(candidate=candidate(genome, predicted, damage), relative=relative)


class Search(SimpleNamespace):
    def run(self) -> None:
        self.archive = {**self.archive, **{c.genome: c for c in self.new}}


def corrected(done: list[Any], new: list[Candidate], limit: str = "latency<=0.7x") -> tuple[bool, float]:
    builder: Any = SimpleNamespace(done={f.candidate.genome: f for f in done}, original_latency_s=2.0)
    goal = Goal("damage", {"latency": AIM * 0.7})
    search: Any = Search(goal=goal, archive={f.candidate.genome: f.candidate for f in done}, new=new)
    request: Any = SimpleNamespace(budget=Budget.parse(limit))
    return correct_latency(request, builder, search), search.goal.bounds["latency"]


def test_the_bound_is_tightened_by_what_the_nearest_plan_took_beyond_its_prediction() -> None:
    slow = [finished("a", 0.6, 0.8), finished("b", 0.65, 0.78)]
    found, bound = corrected(slow, [candidate("c", 0.5)])
    assert found
    assert bound == pytest.approx(AIM * 0.7 * 0.65 / 0.78)
    # a plan that is still predicted to be too slow is no news
    assert not corrected(slow, [candidate("c", 0.6)])[0]
    # 1.4 s of 2 s are the same bound
    assert corrected(slow, [candidate("c", 0.5)], "latency<=1400ms") == (True, pytest.approx(bound))


def test_a_worse_plan_that_fits_is_no_reason_not_to_look_for_a_better_one() -> None:
    done = [finished("a", 0.6, 0.8, 0.1), finished("b", 0.6, 0.65, 0.5)]
    found, bound = corrected(done, [candidate("c", 0.5)])
    assert found
    assert bound == pytest.approx(AIM * 0.7 * 0.6 / 0.8)


def test_files_larger_than_predicted_tighten_the_bound_though_a_worse_plan_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"a": 1_020, "b": 700}
    monkeypatch.setattr("lamina.planner.finish.serialized_size", lambda name: sizes[name])

    def file(name: str, predicted: float, damage: float) -> Any:
        realized = SimpleNamespace(program=SimpleNamespace(model=name))
        return SimpleNamespace(candidate=candidate(name, predicted, damage, "size"), realized=realized)

    done = [file("a", 990.0, 0.1), file("b", 690.0, 0.5)]
    builder: Any = SimpleNamespace(done={f.candidate.genome: f for f in done}, original_size=4_000.0)
    goal = Goal("damage", {"size": 1_000.0})
    search: Any = Search(goal=goal, archive={f.candidate.genome: f.candidate for f in done}, new=[])
    request: Any = SimpleNamespace(budget=Budget.parse("size<=1000B"))
    assert correct_size(request, builder, search)
    assert search.goal.bounds["size"] == 1_000.0 - 30.0
    sizes["a"] = 999
    search.goal = goal
    assert not correct_size(request, builder, search)


def test_plans_of_other_searches_do_not_count() -> None:
    builder: Any = SimpleNamespace(done={"a": finished("a", 0.6, 0.8), "x": finished("x", 0.5, 0.6)})
    search: Any = Search(
        goal=Goal("damage", {"latency": AIM * 0.7}),
        archive={"a": candidate("a", 0.6)},
        new=[candidate("c", 0.4)],
    )
    request: Any = SimpleNamespace(budget=Budget.parse("latency<=0.7x"))
    assert correct_latency(request, builder, search)


@pytest.mark.parametrize(
    ("done", "limit"),
    [
        ([finished("a", 0.6, 0.8, 0.5), finished("b", 0.6, 0.65, 0.1)], "latency<=0.7x"),  # the best is fast
        ([], "latency<=0.7x"),
        ([finished("a", 0.6, 0.8)], "size<=0.5x"),
    ],
)
def test_otherwise_the_search_is_left_alone(done: list[Any], limit: str) -> None:
    found, bound = corrected(done, [candidate("c", 0.1)], limit)
    assert not found
    assert bound == AIM * 0.7
