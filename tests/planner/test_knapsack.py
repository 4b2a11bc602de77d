"""The knapsack returns the optimum of its model: checked against trying every genome."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from toy import plain_choice, random_costs, toy_program, toy_space

from lamina.planner.costs import fit_joints, fit_scales
from lamina.planner.knapsack import solve
from lamina.planner.space import Space


def every_genome(space: Space) -> set[tuple[int, ...]]:
    return {
        space.canonical(g) for g in itertools.product(*[range(len(c.options) + 1) for c in space.choices])
    }


def total_damage(damage: list[list[float]], genome: tuple[int, ...]) -> float:
    return sum(damage[i][g - 1] for i, g in enumerate(genome) if g)


@pytest.mark.parametrize("seed", range(6))
def test_nested_space_optimum(seed: int) -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, seed)
    allowed = 0.8
    found = solve(costs, damage, allowed_damage=allowed)
    assert found is not None
    assert total_damage(damage, found) <= allowed + 1e-9
    fits = [g for g in every_genome(space) if total_damage(damage, g) <= allowed]
    best = min(costs.predict(g)["latency"] for g in fits)
    assert costs.predict(found)["latency"] == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize("seed", range(6))
def test_optimum_with_conversion_borders(seed: int) -> None:
    forms = [("int8", "int8"), ("int8", "float"), ("float", "float")]
    space = Space(toy_program(), tuple(plain_choice(i, forms) for i in range(6)))
    costs, damage = random_costs(space, seed, borders=True)
    found = solve(costs, damage, allowed_damage=1.5)
    assert found is not None
    fits = [g for g in every_genome(space) if total_damage(damage, g) <= 1.5]
    best = min(costs.predict(g)["latency"] for g in fits)
    assert costs.predict(found)["latency"] == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bound", [800.0, 650.0])
def test_bytes_that_int8_neighbours_spare_each_other_count(seed: int, bound: float) -> None:
    forms = [("int8", "int8"), ("int8", "float"), ("float", "float")]
    space = Space(toy_program(), tuple(plain_choice(i, forms) for i in range(6)))
    costs, damage = random_costs(space, seed, borders=True)
    costs.joint_bytes = -60.0
    found = solve(costs, damage, bounds={"size": bound})
    fits = [g for g in every_genome(space) if costs.predict(g)["size"] <= bound]
    assert found is not None
    assert costs.predict(found)["size"] <= bound + 1e-6
    best = min(costs.predict(g)["latency"] for g in fits)
    assert costs.predict(found)["latency"] == pytest.approx(best, abs=2e-4)


def test_what_neighbours_spare_is_fitted_on_files() -> None:
    forms = [("int8", "int8"), ("float", "float")]
    space = Space(toy_program(), tuple(plain_choice(i, forms) for i in range(5)))
    costs, _ = random_costs(space, 0, borders=True)
    genomes = [(1, 1, 1, 1, 1), (1, 1, 0, 1, 1), (2, 2, 2, 2, 2)]
    assert [costs.joints(g) for g in genomes] == [4, 2, 0]
    real = {g: costs.predict(g)["size"] - 40.0 * costs.joints(g) for g in genomes}
    fit_joints(costs, {g: round(size) for g, size in real.items()})
    assert costs.joint_bytes == pytest.approx(-40.0, abs=0.5)
    for genome, size in real.items():
        assert costs.predict(genome)["size"] == pytest.approx(size, abs=2.0)
    fit_joints(costs, {genomes[0]: round(real[genomes[0]] + 1000.0)})
    assert costs.joint_bytes == 0.0  # neighbours never make a file larger


def test_size_bound_is_kept_and_impossible_bound_is_none() -> None:
    space = toy_space(toy_program())
    costs, damage = random_costs(space, 3)
    found = solve(costs, damage, minimize="damage", bounds={"size": 900.0})
    assert found is not None
    assert costs.predict(found)["size"] <= 900.0
    fits = [g for g in every_genome(space) if costs.predict(g)["size"] <= 900.0]
    assert total_damage(damage, found) == pytest.approx(min(total_damage(damage, g) for g in fits), abs=1e-3)
    assert solve(costs, damage, minimize="damage", bounds={"size": -1e6}) is None


def test_fitted_scales_reproduce_whole_model_latencies() -> None:
    space = toy_space(toy_program())
    costs, _ = random_costs(space, 1)
    truth = {costs.group(i, g): 0.5 + 0.3 * n for n, (i, g) in enumerate([(3, 1), (3, 2), (0, 1)])}
    genomes = [g for g in every_genome(space) if any(g)][:60]
    measured = {}
    for genome in genomes:
        moves = [(i, g) for i, g in enumerate(genome) if g]
        gain = sum(costs.latency_delta(i, g) * truth.get(costs.group(i, g), 1.0) for i, g in moves)
        measured[genome] = 1.0 + gain
    fit_scales(costs, measured)
    errors = [costs.predict(g)["latency"] - latency for g, latency in measured.items()]
    assert np.abs(errors).max() < 0.02


def test_restrict_keeps_what_can_help_only() -> None:
    forms = [("float", "float"), ("float", "float")]
    space = Space(toy_program(), tuple(plain_choice(i, forms) for i in range(2)))
    costs, _ = random_costs(space, 0)
    costs.delta["latency"][0][:] = [-0.2, 0.3]  # type: ignore[index]
    costs.delta["latency"][1][:] = [0.1, 0.2]  # type: ignore[index]
    kept = costs.restrict({"latency"})
    assert [[o.name for o in c.options] for c in kept.space.choices] == [["o0"]]
    assert kept.predict((1,))["latency"] == pytest.approx(0.8)


def test_restrict_hangs_choices_on_the_next_holder_that_stays() -> None:
    plain = [replace(plain_choice(i, [("float", "float")]), parent=i - 1 if i else None) for i in range(3)]
    costs, _ = random_costs(Space(toy_program(), tuple(plain)), 0)
    for index, change in enumerate((-0.2, 0.3, -0.1)):
        costs.delta["latency"][index][:] = [change]  # type: ignore[index]
    assert [c.parent for c in costs.restrict({"latency"}).space.choices] == [None, 0]
    costs.delta["latency"][0][:] = [0.3]  # type: ignore[index]
    assert [c.parent for c in costs.restrict({"latency"}).space.choices] == [None]
