"""``linearity-dp-bits``: damage linear in each operator's relative error squared, an exact program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamina.planner.bits.evidence import BitEvidence, axis_of
from lamina.planner.bits.front import front
from lamina.planner.bits.ladder import Ladder, Plans
from lamina.planner.search import Goal

# The theorem is about middling widths: below, errors are no longer small.
FLOOR = 3


def linearity_dp_bits(evidence: BitEvidence, goal: Goal) -> Plans:
    """``min sum_l a_l t_{l,b}^2`` for every total cost; t the relative error, a_l fitted on single operators.

    a_l is the least-squares slope of the measured damages of operator l alone over its t^2, through zero.
    Costs are bytes, or latency without conversions where that is minimized or bounded alone. Malinovskii et
    al. 2024, arXiv:2411.17525, theorem 1 and sec. 5. Deviates: t is the error of the operator's output on
    what it reads, which with white inputs is the paper's relative error of the weight, and holds the rounding
    of activations where a form has that; a_l is fitted on the operator's own forms instead of on noise.
    """
    axis, noise = axis_of(goal), evidence.noise()
    genes = [[0, *_usable(evidence, i, noise[i])] for i in evidence.weighted]
    slopes = {i: slope(evidence, i, g[1:], noise[i]) for i, g in zip(evidence.weighted, genes, strict=True)}
    found = front(
        [[evidence.cost(i, g, axis) for g in row] for i, row in zip(evidence.weighted, genes, strict=True)],
        [
            [slopes[i] * noise[i][g - 1] if g else 0.0 for g in row]
            for i, row in zip(evidence.weighted, genes, strict=True)
        ],
    )

    def make(index: int) -> tuple[int, ...]:
        taken = zip(evidence.weighted, genes, found.picks(index), strict=True)
        return evidence.genome({i: row[pick] for i, row, pick in taken})

    yield Ladder(len(found), make)


def _usable(evidence: BitEvidence, index: int, noise: Sequence[float]) -> list[int]:
    widths = evidence.widths[index]
    return [g for g in evidence.genes(index) if np.isfinite(noise[g - 1]) and (widths[g - 1] or 0) >= FLOOR]


def slope(evidence: BitEvidence, index: int, genes: Sequence[int], noise: Sequence[float]) -> float:
    """``a_l = sum d t^2 / sum t^4`` over an operator's forms; at least 0."""
    errors = np.array([noise[g - 1] for g in genes])
    harms = np.array([evidence.damage[index][g - 1] for g in genes])
    square = float(errors @ errors)
    return max(float(harms @ errors) / square, 0.0) if square > 0 else 0.0
