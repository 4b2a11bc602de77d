"""In which order operators are repaired, and which of them where time is short."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from lamina.ir.program import Program
from lamina.passes.repair_sites import RepairSite

Wave = list[RepairSite]


def waves(program: Program, sites: Sequence[RepairSite]) -> Iterator[Wave]:
    """Sites in execution order, in runs of which none lies behind another."""
    place = {s.node: i for i, s in enumerate(sites)}
    behind: dict[ir.Value, int] = {}
    ends: dict[str, int] = {}
    for node in program.graph:
        seen = 0
        for value in node.inputs:
            seen |= behind.get(value, 0) if value is not None else 0
        if (index := place.get(node.name or "")) is not None:
            seen |= 1 << index
        for value in node.outputs:
            behind[value] = seen
            ends[value.name or ""] = seen
    wave: Wave = []
    held = 0
    for site in sites:
        own = 1 << place[site.node]
        # trap: two writers of one sum would both make up for all that is missing
        if (ends.get(site.read, 0) | ends.get(site.value, 0)) & held & ~own:
            yield wave
            wave, held = [], 0
        wave.append(site)
        held |= own
    if wave:
        yield wave


def distances(
    original: Program, program: Program, found: Sequence[Wave], stands_for: Mapping[str, str]
) -> list[int]:
    """How many waves lie between each wave and the nearest change before it in execution order.

    A change is where a value begins to stand for another one, and a node the original does not have.
    """
    there = {n.name for n in original.graph}
    first = {wave[0].node: number for number, wave in enumerate(found)}
    last, rank = 0, [0] * len(found)
    number = 0
    for node in program.graph:
        if node.name not in there or any(v is not None and v.name in stands_for for v in node.inputs):
            last = number
        if node.name in first:
            number = first[node.name] + 1
            rank[number - 1] = number - 1 - min(last, number - 1)
    return rank


class Pace:
    """Says which waves are visited so that a time limit is kept: those nearest behind a change.

    Waves are offered in execution order, so that every fit still sees all repairs before it; the mean time
    of those visited says how many of the rest can be.

    Args:
        ranks: Of each wave, lower first; of equal ranks the later one, whose trials are cheaper.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks, self._visited = list(ranks), 0

    def takes(self, number: int, spent: float, left: float) -> bool:
        """Whether wave ``number`` is visited, ``spent`` seconds having gone to waves and ``left`` to go."""
        if left <= 0:
            return False
        if self._visited and left != float("inf"):
            count = int(left / max(spent / self._visited, 1e-9))
            if number not in self._nearest(range(number, len(self._ranks)), count):
                return False
        self._visited += 1
        return True

    def _nearest(self, numbers: Collection[int], count: int) -> list[int]:
        return sorted(numbers, key=lambda i: (self._ranks[i], -i))[:count]
