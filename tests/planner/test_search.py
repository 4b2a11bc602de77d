"""The search finds what exhaustive enumeration finds, on a measured damage that is not additive."""

from __future__ import annotations

import itertools

import pytest
from toy import plain_choice, random_costs, toy_program, toy_space

from lamina.planner.evaluator import Score
from lamina.planner.search import Goal, Search
from lamina.planner.space import Genome, Space


class Judge:
    """Stands in for the evaluator: damage is known exactly and has an interaction term."""

    def __init__(self, space: Space, damage: list[list[float]]) -> None:
        self.space, self.damage = space, damage
        self.batches = [None] * 4

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        taken = [self.damage[i][g - 1] for i, g in enumerate(genome) if g]
        total = sum(taken) + 0.2 * max(len(taken) - 1, 0)
        return Score(1 - total, total, 0.0, 100)


def every(space: Space) -> set[Genome]:
    genes = [range(len(c.options) + 1) for c in space.choices]
    return {space.canonical(g) for g in itertools.product(*genes)}


@pytest.mark.parametrize("seed", range(5))
def test_least_latency_under_a_damage_bound(seed: int) -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, seed)
    judge = Judge(space, damage)
    goal = Goal("latency", {}, 1.2)
    found = Search(costs, damage, judge, goal, seconds=20, seed=seed).run()[0]  # type: ignore[arg-type]
    assert found.score.damage <= 1.2
    fits = [g for g in every(space) if judge.score(g).damage <= 1.2]
    best = min(costs.predict(g)["latency"] for g in fits)
    assert found.predicted["latency"] <= best + 0.01


@pytest.mark.parametrize("seed", range(5))
def test_least_damage_under_a_cost_bound(seed: int) -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, seed)
    judge = Judge(space, damage)
    goal = Goal("damage", {"latency": 0.9}, float("inf"))
    found = Search(costs, damage, judge, goal, seconds=20, seed=seed).run()[0]  # type: ignore[arg-type]
    assert found.predicted["latency"] <= 0.9 + 1e-9
    fits = [g for g in every(space) if costs.predict(g)["latency"] <= 0.9]
    assert found.score.damage <= min(judge.score(g).damage for g in fits) + 0.05


class Deceived(Judge):
    """Drops alone do what they are said to; beside them everything else does ten times as much."""

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        taken = [
            (self.space.choices[i].transform.name, self.damage[i][g - 1]) for i, g in enumerate(genome) if g
        ]
        mixed = len({name for name, _ in taken}) > 1
        total = sum(d * (10 if mixed else 1) for _, d in taken)
        return Score(1 - total, total, 0.0, 100)


@pytest.mark.parametrize("seed", range(5))
def test_without_time_to_look_the_best_of_one_transform_is_known(seed: int) -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, seed)
    judge, goal = Deceived(space, damage), Goal("damage", {"latency": 0.7}, float("inf"))
    found = Search(costs, damage, judge, goal, seconds=0, seed=seed).run()[0]  # type: ignore[arg-type]
    names = {c.transform.name for c in space.choices}
    for name in names:
        alone = [
            g
            for g in every(space)
            if costs.predict(g)["latency"] <= 0.7
            and {space.choices[i].transform.name for i, k in enumerate(g) if k} == {name}
        ]
        if alone:
            assert found.score.damage <= min(judge.score(g).damage for g in alone) + 1e-6


class Sociable(Judge):
    """One option does no harm where all that can take it do, and much harm anywhere else."""

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        total = 0.0 if genome in (self.space.nothing, self.space.uniform("o0")) else 5.0
        return Score(1 - total, total, 0.0, 100)


def test_one_option_everywhere_is_looked_at_and_timed() -> None:
    forms = [("int8", "int8"), ("float", "float")]
    space = Space(toy_program(), tuple(plain_choice(i, forms) for i in range(8)))
    costs, damage = random_costs(space, 0)
    costs.delta["latency"][:] = [[-0.02, -0.03]] * 8  # type: ignore[index]
    search = Search(costs, damage, Sociable(space, damage), Goal("latency", {}, 1.0), seconds=20)  # type: ignore[arg-type]
    assert search.run()[0].genome == space.uniform("o0")
    assert search.favourites == {space.uniform("o0")}


def test_an_impossible_bound_leaves_nothing_feasible() -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, 0)
    goal = Goal("damage", {"latency": -5.0}, float("inf"))
    found = Search(costs, damage, Judge(space, damage), goal, seconds=5).run()  # type: ignore[arg-type]
    assert not found[0].feasible(goal)
    cheapest = min(costs.predict(g)["latency"] for g in every(space))
    assert min(c.predicted["latency"] for c in found) <= cheapest + 1e-3


def test_the_same_seed_finds_the_same_plan() -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, 2)
    goal = Goal("latency", {}, 1.0)
    runs = [Search(costs, damage, Judge(space, damage), goal, seconds=20, seed=7).run()[0] for _ in range(2)]  # type: ignore[arg-type]
    assert runs[0].genome == runs[1].genome
