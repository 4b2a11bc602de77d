"""The plans of allocators inside the search, each judged by the damage measured of the whole plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import LaminaError
from lamina.planner.bits.evidence import BitEvidence, counts, mean_width
from lamina.planner.bits.ladder import Allocator, Ladder
from lamina.planner.search import Candidate, Search
from lamina.planner.space import Genome

# Rungs next to the first that fits a cost bound that are measured too: damage does not only rise.
_NEXT = 3
# What a search that starts again, as files proved larger or slower than predicted, gets of its time; and the
# plans of each allocator that are measured however late it is.
_LEAST_SHARE, _OWED = 0.15, 1


@dataclass
class _Walk:
    """What became of one allocator."""

    allocator: Allocator
    measured: int = 0
    lately: int = 0  # since the search (re)started
    best: Candidate | None = None
    ended: str = ""


class BitSeeds:
    """Measures the plans of allocators; call it with a :class:`Search`.

    Where damage is minimized, of each ladder the gentlest rungs that keep every cost bound are measured;
    else the cheapest rung that meets the goal is found by bisection.

    Args:
        allocators: The allocators.
        evidence: What they go by.
        share: Share of the search's time after which no more is measured but one plan of each.
    """

    def __init__(self, allocators: Sequence[Allocator], evidence: BitEvidence, *, share: float) -> None:
        self.evidence, self.share = evidence, share
        self.walks = [_Walk(allocator) for allocator in allocators]
        self._until = float("inf")

    def __call__(self, search: Search) -> None:
        """Measure what the allocators propose for the search's goal."""
        self._until = max(search.seconds * self.share, search.elapsed() + search.seconds * _LEAST_SHARE)
        for walk in self.walks:
            walk.ended, walk.best, walk.lately = "", None, 0
            try:
                self._walk(walk, search)
            except LaminaError as error:  # an allocator that cannot work here costs its plans, not the run
                walk.ended = error.what
            if not walk.measured and not walk.ended:
                walk.ended = "it proposes nothing that fits the bounds"

    def report(self) -> list[dict[str, Any]]:
        """Per allocator: how many plans were measured, the best that met the goal, and why it ended."""
        return [
            {
                "rule": walk.allocator.name,
                "measured": walk.measured,
                "best": None if walk.best is None else self._told(walk.best),
                "ended": walk.ended,
            }
            for walk in self.walks
        ]

    def _told(self, best: Candidate) -> dict[str, Any]:
        return {
            "widths": {str(level): n for level, n in counts(self.evidence, best.genome).items()},
            "mean_bits": mean_width(self.evidence, best.genome),
            "predicted": dict(best.predicted),
            "damage": best.score.damage,
        }

    # -- one allocator ------------------------------------------------------------------------------

    def _walk(self, walk: _Walk, search: Search) -> None:
        plans = walk.allocator.plans(self.evidence, search.goal)
        ladder = next(plans, None)
        while ladder is not None and not self._late(walk, search):
            found = self._climb(walk, ladder, search)
            try:
                ladder = plans.send(found)
            except StopIteration:
                return

    def _climb(self, walk: _Walk, ladder: Ladder, search: Search) -> Genome | None:
        """The rung that serves the goal best, None where none meets it."""
        first = _first_affordable(ladder, search)
        if first == len(ladder) and (cheapest := ladder[first - 1]) is not None:
            search.measure(cheapest)  # what comes nearest belongs into the error
        if search.goal.minimize == "damage":
            rungs = range(first, min(first + _NEXT, len(ladder)))
            good = [r for r in rungs if self._measure(walk, ladder[r], search)]
            return ladder[good[0]] if good else None
        low, high = first - 1, len(ladder)
        while high - low > 1:
            middle = (low + high) // 2
            if self._measure(walk, ladder[middle], search):
                low = middle
            else:
                high = middle
        return ladder[low] if low >= first else None

    def _measure(self, walk: _Walk, genome: Genome | None, search: Search) -> bool:
        if genome is None or not search.affordable(genome):
            return False
        if genome not in search.archive and self._late(walk, search):
            return False
        candidate = search.measure(genome)
        walk.measured += 1
        walk.lately += 1
        if candidate is None or not candidate.feasible(search.goal):
            return False
        goal = search.goal
        if walk.best is None or candidate.objective(goal) < walk.best.objective(goal):
            walk.best = candidate
        return True

    def _late(self, walk: _Walk, search: Search) -> bool:
        if search.elapsed() > self._until and walk.lately >= _OWED:
            walk.ended = "out of time"
            return True
        return False


def _first_affordable(ladder: Ladder, search: Search) -> int:
    """The gentlest rung that keeps every cost bound, by bisection: cost falls along a ladder."""
    low, high = -1, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        genome = ladder[middle]
        if genome is not None and search.affordable(genome):
            high = middle
        else:
            low = middle
    return high
