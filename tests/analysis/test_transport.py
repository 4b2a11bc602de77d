"""Entropic transport plans against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from lamina.analysis.transport import transport_plan


def problem(seed: int = 0, d: int = 7, m: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows, columns = random.uniform(0.2, 1, d), random.uniform(0.2, 1, m)
    return random.uniform(0, 1, (d, m)), rows / rows.sum(), columns / columns.sum()


@pytest.mark.parametrize("entropy", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("balance", [0.0, 0.1, np.inf])
def test_rows_are_exact_and_nothing_is_negative(entropy: float, balance: float):
    cost, rows, columns = problem()
    plan = transport_plan(cost, rows, columns, entropy=entropy, balance=balance)
    np.testing.assert_allclose(plan.sum(axis=1), rows, rtol=1e-9)
    assert (plan >= 0).all()


def test_columns_are_exact_where_balanced():
    cost, rows, columns = problem(1)
    plan = transport_plan(cost, rows, columns, entropy=0.05, iterations=5000, tolerance=1e-9)
    np.testing.assert_allclose(plan.sum(axis=0), columns, atol=1e-6)


def test_with_little_entropy_it_costs_what_the_linear_program_does():
    cost, rows, columns = problem(2)
    plan = transport_plan(cost, rows, columns, entropy=2e-3, iterations=50000, tolerance=1e-6)
    d, m = cost.shape
    sums = np.vstack([np.kron(np.eye(d), np.ones(m)), np.kron(np.ones(d), np.eye(m))])
    best = linprog(cost.reshape(-1), A_eq=sums, b_eq=np.concatenate([rows, columns]))
    assert (plan * cost).sum() == pytest.approx(best.fun, abs=5e-3)
    assert (plan * cost).sum() >= best.fun - 1e-4


def test_free_columns_give_a_softmin():
    cost, rows, columns = problem(3)
    plan = transport_plan(cost, rows, columns, entropy=0.1, balance=0.0)
    weight = columns * np.exp(-cost / 0.1)
    np.testing.assert_allclose(plan, rows[:, None] * weight / weight.sum(axis=1, keepdims=True), rtol=1e-9)


def test_a_dearer_balance_brings_columns_nearer():
    cost, rows, columns = problem(4)
    away = [
        np.abs(transport_plan(cost, rows, columns, entropy=0.05, balance=b).sum(axis=0) - columns).sum()
        for b in (0.0, 0.1, 10.0, np.inf)
    ]
    assert away == sorted(away, reverse=True)
    assert away[0] > 10 * away[-1]


def test_unbalanced_plans_solve_their_problem():
    cost, rows, columns = problem(5)
    entropy, balance = 0.1, 0.2

    def price(plan: np.ndarray) -> float:
        reference, sums = rows[:, None] * columns, plan.sum(axis=0)
        kl = (plan * np.log(plan / reference)).sum()
        return float((plan * cost).sum() + entropy * kl + balance * (sums * np.log(sums / columns)).sum())

    plan = transport_plan(
        cost, rows, columns, entropy=entropy, balance=balance, iterations=5000, tolerance=1e-12
    )
    random = np.random.default_rng(0)
    for _ in range(50):
        other = plan * np.exp(0.02 * random.standard_normal(plan.shape))
        other *= (rows / other.sum(axis=1))[:, None]
        assert price(other) > price(plan)


def test_far_apart_points_do_not_overflow():
    cost, rows, columns = problem(6)
    plan = transport_plan(1e6 * cost, rows, columns, entropy=1e-3)
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(plan.sum(axis=1), rows, rtol=1e-9)
