"""Dynamic programs that cut a chain of convolutions into segments to merge, over measured latencies.

Both find the least sum of damages of all tilings of the chain whose latencies sum to at most a budget. That
damages of segments add up is the surrogate's assumption; under it the result is the optimum, with latencies
counted in whole ticks, rounded up, so that the budget holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite

import numpy as np

from lamina.errors import PassError

Span = tuple[int, int]
# Ticks of the budget where no resolution is given: 52 convolutions round by 1.3 % of it at most.
_TICKS = 4096


@dataclass(frozen=True)
class Way:
    """One way to run convolutions i..j as one segment, no activation within.

    Attributes:
        latency: Seconds, or any unit.
        damage: What it costs in quality by itself.
        merges: Spans that become one convolution each, in order; they tile the segment.
        without: Convolutions that are dropped beforehand.
    """

    latency: float
    damage: float
    merges: tuple[Span, ...]
    without: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChainPlan:
    """A tiling.

    Attributes:
        segments: First and last convolution of each; the activations between segments stay.
        ways: How each is run.
        latency: Sum of latencies, unrounded.
        damage: Sum of damages.
    """

    segments: tuple[Span, ...]
    ways: tuple[Way, ...]
    latency: float
    damage: float


def cheapest_merges(count: int, latency: Mapping[Span, float]) -> dict[Span, tuple[float, tuple[Span, ...]]]:
    """First stage: the fastest way to run i..j without its inner activations, merging what pays.

    ``T_opt[i, j] = min(T[i, j], min_m T_opt[i, m] + T[m + 1, j])``.

    Args:
        count: Convolutions of the chain.
        latency: T: latency of i..j merged into one, i <= j; spans left out cannot be merged.

    Returns:
        T_opt and the merges it takes, for every i <= j that can be run.
    """
    best: dict[Span, tuple[float, tuple[Span, ...]]] = {}
    for i in range(count):
        for j in range(i, count):
            ways: list[tuple[float, tuple[Span, ...]]] = [(latency.get((i, j), inf), ((i, j),))]
            for m in range(i, j):
                if (i, m) in best and (m + 1, j) in latency:
                    before, merges = best[i, m]
                    ways.append((before + latency[m + 1, j], (*merges, (m + 1, j))))
            found = min(ways, key=lambda way: way[0])
            if isfinite(found[0]):
                best[i, j] = found
    return best


def two_stage(
    count: int,
    latency: Mapping[Span, float],
    damage: Mapping[Span, float],
    budget: float,
    *,
    resolution: float | None = None,
) -> ChainPlan | None:
    """Which activations to keep, over the fastest merges between them.

    Fu et al. 2023, arXiv:2301.12187: stage one is :func:`cheapest_merges`; stage two chooses the activations,
    ``D[t, j] = min_i D[t - T_opt[i, j], i - 1] + I[i, j]``. Deviates: least damage instead of most
    importance; the activation at a boundary stays as it is, so there is no table of boundary kinds.

    Args:
        count: Convolutions of the chain.
        latency: Of i..j merged into one; all (i, i) must be there.
        damage: Of dropping all activations within i..j; spans left out are not considered, (i, i) is 0.
        budget: Most latency of the whole chain.
        resolution: A tick; a 4096th of the budget where omitted.

    Returns:
        The plan of least damage, of least latency among equals; None where nothing meets the budget.
        O(count^3 + spans * ticks).

    Raises:
        PassError: A latency of a single convolution is missing; budget or resolution is not positive.
    """
    return joint(count, two_stage_ways(count, latency, damage), budget, resolution=resolution)


def two_stage_ways(
    count: int, latency: Mapping[Span, float], damage: Mapping[Span, float]
) -> dict[Span, list[Way]]:
    """What the second stage chooses among: each span run by the fastest merges of the first.

    Args:
        count: Convolutions of the chain.
        latency: Of i..j merged into one; all (i, i) must be there.
        damage: Of dropping all activations within i..j; spans left out are not considered, (i, i) is 0.

    Raises:
        PassError: A latency of a single convolution is missing.
    """
    missing = [i for i in range(count) if (i, i) not in latency]
    if missing:
        raise PassError(f"the latency of convolution {missing[0]} alone is not known")
    ways = {}
    for (i, j), (seconds, merges) in cheapest_merges(count, latency).items():
        harm = 0.0 if i == j else damage.get((i, j), inf)
        if isfinite(harm):
            ways[i, j] = [Way(seconds, harm, merges)]
    return ways


def joint(
    count: int,
    ways: Mapping[Span, Sequence[Way]],
    budget: float,
    *,
    resolution: float | None = None,
) -> ChainPlan | None:
    """Segments and the way to run each at once: merge them all, or drop some convolutions first.

    LayerMerge, Kim et al. 2024, arXiv:2406.12837: ``D[t, j] = min_{i, k} D[t - T[i, j, k], i - 1] +
    I[i, j, k]``, k the size of the merged kernel. Deviates: least damage; k is any :class:`Way`.

    Args:
        count: Convolutions of the chain.
        ways: Span -> ways to run it.
        budget: Most latency of the whole chain.
        resolution: A tick; a 4096th of the budget where omitted.

    Returns:
        The plan of least damage, of least latency among equals; None where nothing meets the budget.
        O(ways * ticks) time, O(count * ticks) memory.

    Raises:
        PassError: Budget or resolution is not positive.
    """
    tick = budget / _TICKS if resolution is None else resolution
    if not tick > 0 or not isfinite(budget):
        raise PassError("a chain's latency budget must be positive and finite")
    ticks = floor(budget / tick + 1e-9)
    least = np.full((count + 1, ticks + 1), np.inf)
    least[0, 0] = 0.0
    took = np.full((count + 1, ticks + 1), -1, np.int64)
    listed = [(span, way) for span in sorted(ways) for way in ways[span]]
    ending: list[list[int]] = [[] for _ in range(count)]
    for index, ((_, j), way) in enumerate(listed):
        if isfinite(way.latency) and isfinite(way.damage):
            ending[j].append(index)
    costs = [ceil(way.latency / tick - 1e-9) if isfinite(way.latency) else 0 for _, way in listed]
    for j in range(count):
        for index in ending[j]:
            (i, _), way = listed[index]
            cost = costs[index]
            if cost > ticks:
                continue
            reached = least[i, : ticks + 1 - cost] + way.damage
            better = reached < least[j + 1, cost:]
            least[j + 1, cost:][better] = reached[better]
            took[j + 1, cost:][better] = index
    at = int(np.argmin(least[count]))  # the first of equals: the least latency
    if not isfinite(least[count, at]):
        return None
    damage, chosen, place = float(least[count, at]), [], count
    while place:
        index = int(took[place, at])
        chosen.append(listed[index])
        place, at = listed[index][0][0], at - costs[index]
    chosen.reverse()
    return ChainPlan(
        tuple(span for span, _ in chosen),
        tuple(way for _, way in chosen),
        sum(way.latency for _, way in chosen),
        damage,
    )


def front(
    count: int, ways: Mapping[Span, Sequence[Way]], *, points: int = 16, resolution: float | None = None
) -> list[ChainPlan]:
    """Plans of least damage for budgets from the chain as it is down to the fastest there is."""
    untouched = sum(min(w.latency for w in ways[i, i] if not w.without) for i in range(count))
    untouched *= 1 + (count + 1) / _TICKS  # what rounding up adds must not shut the chain as it is out
    found: dict[tuple[tuple[tuple[Span, ...], tuple[int, ...]], ...], ChainPlan] = {}
    for share in np.linspace(1.0, 0.0, points, endpoint=False):
        plan = joint(count, ways, float(untouched * share), resolution=resolution)
        if plan is None:
            break
        found.setdefault(tuple((way.merges, way.without) for way in plan.ways), plan)
    return list(found.values())
