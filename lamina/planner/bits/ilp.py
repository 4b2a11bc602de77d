"""``bits-ilp``: the least sum of measured damages under every cost bound, an integer program."""

from __future__ import annotations

import numpy as np

from lamina.planner.bits.evidence import NEVER, BitEvidence, axis_of
from lamina.planner.bits.ladder import Ladder, Plans
from lamina.planner.knapsack import solve
from lamina.planner.search import Goal
from lamina.planner.space import Genome

# Sums of damages that are solved for where a drop bounds: bisection looks at the logarithm of their number.
_RUNGS = 48
# Where costs bound: shares of the bounds, as the sum of damages and the prices are both predictions.
_SLACKS = (1.0, 0.98, 0.95, 0.9)


def bits_ilp(evidence: BitEvidence, goal: Goal) -> Plans:
    """``min sum x_ib d_ib s.t. sum_b x_ib <= 1, costs <= bounds``; d the damage of form b at i alone.

    d is measured. Where a cost is minimized: least cost for each of many sums of damages, from the smallest
    that changes anything. The program knows what conversions between float and int8 cost. MC-MoE, Huang et
    al. 2024, arXiv:2410.06270, sec. 3.2. Deviates: its error is a layer's, times how often an
    expert is chosen; ours is that of the model's output, which holds both.
    """
    if goal.minimize == "damage":
        yield Ladder(len(_SLACKS) + 1, lambda i: _least_harm(evidence, goal, i))
        return
    every = [d for row in evidence.damage for d in row if 0 < d < NEVER]
    if not every:
        return
    most = sum(max((d for d in row if d < NEVER), default=0.0) for row in evidence.damage)
    sums = np.geomspace(min(every) / 2, max(most, min(every)) * 1.01, _RUNGS)
    yield Ladder(_RUNGS, lambda i: _least_cost(evidence, goal, float(sums[i])))


def _least_harm(evidence: BitEvidence, goal: Goal, rung: int) -> Genome | None:
    """The least damage within one of the slacks; behind them the least cost there is."""
    if rung == len(_SLACKS):
        axis, short_of = axis_of(goal), NEVER / 2
        cheapest = solve(evidence.costs, evidence.damage, minimize=axis, allowed_damage=short_of)
        return _clean(evidence, cheapest)
    slack = _SLACKS[rung]
    bounds = {
        axis: bound - (1.0 - slack) * abs(evidence.costs.base[axis] - bound)
        for axis, bound in goal.bounds.items()
    }
    return _clean(evidence, solve(evidence.costs, evidence.damage, minimize="damage", bounds=bounds))


def _least_cost(evidence: BitEvidence, goal: Goal, allowed: float) -> Genome | None:
    costs, damage = evidence.costs, evidence.damage
    found = solve(costs, damage, minimize=goal.minimize, allowed_damage=allowed, bounds=goal.bounds)
    return _clean(evidence, found)


def _clean(evidence: BitEvidence, genome: Genome | None) -> Genome | None:
    """None where the bounds could be met only with what may never be taken."""
    if genome is None or any(g and evidence.damage[i][g - 1] >= NEVER for i, g in enumerate(genome)):
        return None
    return genome
