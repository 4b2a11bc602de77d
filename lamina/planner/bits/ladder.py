"""Ladders: the plans of an allocator from the gentlest to the cheapest, made when they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from lamina.planner.bits.evidence import BitEvidence
from lamina.planner.search import Goal
from lamina.planner.space import Genome


@dataclass
class Ladder:
    """Rungs in the order of falling cost and rising damage.

    Attributes:
        count: How many there are.
        make: Number -> genome; None where there is none.
    """

    count: int
    make: Callable[[int], Genome | None]
    _made: dict[int, Genome | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Genome | None:
        if index not in self._made:
            self._made[index] = self.make(index)
        return self._made[index]


# An allocator yields ladders and is sent back the rung that was found best on each, None where none fits.
Plans = Generator[Ladder, Genome | None, None]


@dataclass(frozen=True)
class Allocator:
    """One way to give operators their bits.

    Attributes:
        name: The id of METHODS.md.
        source: Paper it is from.
        plans: Evidence and goal -> ladders.
    """

    name: str
    source: str
    plans: Callable[[BitEvidence, Goal], Plans]
