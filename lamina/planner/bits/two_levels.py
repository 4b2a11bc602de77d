"""``ordered-two-level-bits``: the more important share of the layers at high bits, the rest at low."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from lamina.planner.bits.evidence import BitEvidence, axis_of
from lamina.planner.bits.ladder import Ladder, Plans
from lamina.planner.search import Goal
from lamina.planner.space import Genome


def ordered_two_level_bits(evidence: BitEvidence, goal: Goal) -> Plans:
    """Layers in the order of LIM, then of ZD; of two neighbouring widths the share at the lower is swept.

    LIM: what a branch changes of its input least of all goes down first; operators outside branches never do.
    ZD: operators with the largest share of weights beyond one standard deviation go down first. Where even
    all layers at the lower width are not enough, or do no harm, the next two widths are tried. Dumitru et al.
    2024, arXiv:2406.17415.
    """
    axis = axis_of(goal)
    for order in orders(evidence):
        for high, low in pairwise(evidence.levels()):
            ladder = _swept(evidence, order, high, low, axis)
            best = yield ladder
            if best is not None and best != ladder[len(ladder) - 1]:
                break


def orders(evidence: BitEvidence) -> Iterator[list[list[int]]]:
    """Layers by LIM and by ZD, the least important first; an order that rates nothing is left out."""
    for values, sign in ((evidence.modification(), 1.0), (evidence.outliers(), -1.0)):
        layers = _layers(values, sign)
        if layers:
            yield layers


def _layers(values: Mapping[int, float], sign: float) -> list[list[int]]:
    """Choices of one value are one layer."""
    ordered = sorted(values, key=lambda i: (sign * values[i], i))
    return [list(group) for _, group in groupby(ordered, key=lambda i: values[i])]


def _swept(evidence: BitEvidence, order: Sequence[Sequence[int]], high: int, low: int, axis: str) -> Ladder:
    def make(count: int) -> Genome:
        picks = {i: evidence.at(i, high, axis) for i in evidence.weighted}
        picks |= {i: evidence.at(i, low, axis) for layer in order[:count] for i in layer}
        return evidence.genome(picks)

    return Ladder(len(order) + 1, make)
