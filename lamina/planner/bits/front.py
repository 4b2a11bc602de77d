"""Exact dynamic program over independent choices: every total cost with the least damage that reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Points kept after each choice. Up to here the program is exact; beyond, of the totals in each of this many
# even intervals of cost the least harmful stays, with its own cost: a bound is never exceeded.
MOST_POINTS = 1 << 14


@dataclass(frozen=True)
class Front:
    """Totals that no other total beats on both counts, the gentlest first.

    Attributes:
        cost: float64 ``[n]``, falling.
        damage: float64 ``[n]``, rising.
        exact: Whether no point was left out for want of room.
    """

    cost: np.ndarray
    damage: np.ndarray
    exact: bool
    _steps: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __len__(self) -> int:
        return len(self.cost)

    def picks(self, index: int) -> list[int]:
        """The alternative each choice takes at a point."""
        found = []
        for parent, taken in reversed(self._steps):
            found.append(int(taken[index]))
            index = int(parent[index])
        return found[::-1]


def front(
    costs: Sequence[Sequence[float]], damages: Sequence[Sequence[float]], *, most: int = MOST_POINTS
) -> Front:
    """Minimize the sum of damages for every sum of costs, one alternative a choice.

    ``D_n(c) = min_o d_n(o) + D_{n-1}(c - c_n(o))`` (the recursion of L-GreCo and of Malinovskii et al. 2024,
    arXiv:2411.17525), on the totals that occur instead of on a grid of costs. O(n most k log(most k)).

    Args:
        costs: Of each choice, of each alternative; any sign.
        damages: Likewise; alternatives with an infinite one are never taken, and each choice has another.
        most: Points kept after each choice.
    """
    cost, damage = np.zeros(1), np.zeros(1)
    steps, exact = [], True
    for some, harm in zip(costs, damages, strict=True):
        usable = np.flatnonzero(np.isfinite(harm))
        totals = (cost[:, None] + np.asarray(some, np.float64)[usable]).ravel()
        harms = (damage[:, None] + np.asarray(harm, np.float64)[usable]).ravel()
        kept = _nondominated(totals, harms)
        if len(kept) > most:
            kept, exact = _thinned(kept, totals, most), False
        steps.append((kept // len(usable), usable[kept % len(usable)]))
        cost, damage = totals[kept], harms[kept]
    return Front(cost, damage, exact, tuple(steps))


def _nondominated(cost: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Indices of the points no other beats, by falling cost."""
    order = np.lexsort((damage, cost))
    least = np.minimum.accumulate(damage[order])
    better = np.concatenate([[True], damage[order][1:] < least[:-1]])
    kept: np.ndarray = order[better][::-1]
    return kept


def _thinned(kept: np.ndarray, cost: np.ndarray, most: int) -> np.ndarray:
    """Of each interval of cost its most expensive, so least harmful, point; the ends stay."""
    low, high = cost[kept[-1]], cost[kept[0]]
    place = np.floor((high - cost[kept]) / max(high - low, 1e-300) * (most - 1))
    first = np.concatenate([[True], place[1:] != place[:-1]])
    first[-1] = True
    thinned: np.ndarray = kept[first]
    return thinned
