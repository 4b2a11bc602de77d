"""The dynamic programs find the optimum of their surrogate, as exhaustive enumeration does, and are fast."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import PassError
from lamina.passes.merge_conv_chain import partitions
from lamina.planner.chain_dp import Way, cheapest_merges, front, joint, two_stage


def spans(count: int):
    return [(i, j) for i in range(count) for j in range(i, count)]


@st.composite
def tables(draw):
    """Integer latencies, so that ticks of 1 are exact; some spans cannot be merged, some not be judged."""
    count = draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    latency = {s: float(random.integers(1, 20)) for s in spans(count)}
    damage = {s: float(random.integers(0, 50)) for s in spans(count)}
    for s in spans(count):
        if s[0] < s[1] and random.random() < 0.25:
            del latency[s]
        if random.random() < 0.2:
            del damage[s]
    return count, latency, damage, float(draw(st.integers(1, 60)))


@settings(deadline=None, max_examples=200)
@given(tables())
def test_two_stage_is_the_best_of_all_tilings_of_tilings(table):
    count, latency, damage, budget = table
    best = np.inf
    for segments in partitions(count):  # activations that stay
        harm = sum(0.0 if i == j else damage.get((i, j), np.inf) for i, j in segments)
        fastest = 0.0
        for i, j in segments:  # how each segment is merged
            inner = [sum(latency.get((i + a, i + b), np.inf) for a, b in p) for p in partitions(j - i + 1)]
            fastest += min(inner)
        if fastest <= budget:
            best = min(best, harm)
    plan = two_stage(count, latency, damage, budget, resolution=1.0)
    assert (plan is None) == (not np.isfinite(best))
    if plan is not None:
        assert plan.damage == best
        assert plan.latency <= budget
        merges = [m for w in plan.ways for m in w.merges]
        assert plan.latency == sum(latency[m] for m in merges)
        assert [x for a, b in merges for x in range(a, b + 1)] == list(range(count))
        assert [x for a, b in plan.segments for x in range(a, b + 1)] == list(range(count))
        assert plan.damage == sum(damage[s] for s in plan.segments if s[0] < s[1])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(0, 2**31), st.integers(1, 60))
def test_joint_is_the_best_of_all_tilings_and_ways(count, seed, budget):
    random = np.random.default_rng(seed)
    ways = {
        s: [
            Way(float(random.integers(0, 20)), float(random.integers(0, 50)), (s,))
            for _ in range(random.integers(0, 4))
        ]
        for s in spans(count)
    }
    best = (np.inf, np.inf)
    for segments in partitions(count):
        for chosen in itertools.product(*(ways[s] for s in segments)):
            seconds, harm = sum(w.latency for w in chosen), sum(w.damage for w in chosen)
            if seconds <= budget:
                best = min(best, (harm, seconds))
    plan = joint(count, ways, float(budget), resolution=1.0)
    assert (plan is None) == (not np.isfinite(best[0]))
    if plan is not None:
        assert (plan.damage, plan.latency) == best


def test_merges_that_cost_more_than_their_parts_are_not_taken():
    latency = {(0, 0): 1.0, (1, 1): 1.0, (2, 2): 1.0, (0, 1): 5.0, (1, 2): 1.5, (0, 2): 3.0}
    best = cheapest_merges(3, latency)
    assert best[0, 1] == (2.0, ((0, 0), (1, 1)))
    assert best[0, 2] == (2.5, ((0, 0), (1, 2)))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_rounding_to_ticks_never_breaks_the_budget(seed):
    random = np.random.default_rng(seed)
    latency = {s: float(random.uniform(0.1, 1) * (s[1] - s[0] + 1) ** 0.5) for s in spans(8)}
    damage = {s: float(random.uniform()) for s in spans(8)}
    budget = 0.7 * sum(latency[i, i] for i in range(8))
    coarse = two_stage(8, latency, damage, budget, resolution=budget / 50)
    fine = two_stage(8, latency, damage, budget)
    assert fine is not None
    assert fine.latency <= budget
    assert coarse is None or coarse.latency <= budget
    assert coarse is None or fine.damage <= coarse.damage + 1e-12


def test_a_front_goes_from_untouched_to_fastest():
    random = np.random.default_rng(0)
    latency = {s: 1.0 + 0.3 * (s[1] - s[0]) for s in spans(6)}
    ways = {s: [Way(latency[s], random.uniform() * (s[1] - s[0]), (s,))] for s in spans(6)}
    plans = front(6, ways, points=12)
    assert plans[0].damage == 0
    assert [p.damage for p in plans] == sorted(p.damage for p in plans)
    assert [p.latency for p in plans] == sorted((p.latency for p in plans), reverse=True)
    assert len(plans) > 3


def test_a_chain_as_long_as_mobilenet_v2_is_solved():
    """52 convolutions, every span, four ways each, at the default resolution."""
    random = np.random.default_rng(0)
    latency = {s: float(random.uniform(0.5, 1.5) * (s[1] - s[0] + 1) ** 0.7) for s in spans(52)}
    damage = {s: float(random.uniform() * (s[1] - s[0])) for s in spans(52)}
    best = cheapest_merges(52, latency)
    ways = {
        s: [Way(best[s][0] * f, damage[s] + 1 / f - 1, best[s][1]) for f in (1.0, 0.9, 0.8, 0.7)]
        for s in spans(52)
    }
    budget = 0.6 * sum(latency[i, i] for i in range(52))
    one = two_stage(52, latency, damage, budget)
    two = joint(52, ways, budget)
    assert one is not None
    assert two is not None
    assert two.damage <= one.damage + 1e-9


def test_what_cannot_be():
    with pytest.raises(PassError, match="convolution 1 alone"):
        two_stage(2, {(0, 0): 1.0}, {}, 3.0)
    with pytest.raises(PassError, match="positive"):
        joint(1, {}, 0.0)
    assert joint(1, {(0, 0): [Way(5.0, 0.0, ((0, 0),))]}, 1.0) is None
