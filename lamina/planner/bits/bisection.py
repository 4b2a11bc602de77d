"""``bisection-by-order``: operators in the order of their sensitivity, the cut found by measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from lamina.planner.bits.evidence import NEVER, BitEvidence, axis_of
from lamina.planner.bits.ladder import Ladder, Plans
from lamina.planner.search import Goal
from lamina.planner.space import Genome


def bisection_by_order(evidence: BitEvidence, goal: Goal) -> Plans:
    """The least sensitive operators go to a width, as many as the measured quality allows; then to the next.

    Sensitivity: damage of the width at one operator alone, and half the interaction with the operators before
    and behind it, ``loss(l and m) - loss(l) - loss(m)``. Each width starts from what the one before it found
    and takes only operators that went down there. O(log n) evaluations a width and n pairs. Schaefer et al.
    2023, arXiv:2306.04879. Deviates: the order is of measured damages, theirs of Hessian traces.
    """
    axis = axis_of(goal)
    base: dict[int, int] = {}
    moved: Sequence[int] = evidence.weighted
    for level in evidence.levels()[1:]:
        genes = {i: g for i in moved if (g := evidence.at(i, level, axis)) and g != base.get(i, 0)}
        if not genes:
            continue
        order = by_sensitivity(evidence, genes)
        ladder = _prefixes(evidence, base, genes, order)
        best = yield ladder
        if best is None and goal.minimize != "damage":
            return
        found = ladder[len(ladder) - 1] if best is None else best
        assert found is not None
        moved = [i for i in order if found[i] == genes[i]]
        base = {i: found[i] for i in evidence.weighted if found[i]}


def by_sensitivity(evidence: BitEvidence, genes: Mapping[int, int]) -> list[int]:
    """Choices by damage of these genes alone and half of what each does together with its neighbours."""
    single = {i: evidence.damage[i][g - 1] for i, g in genes.items()}
    pairs = list(pairwise(sorted(genes)))
    both = evidence.divergence([_only(evidence, {i: genes[i], j: genes[j]}) for i, j in pairs])
    total = dict(single)
    for (i, j), value in zip(pairs, both, strict=False):
        extra = (value if np.isfinite(value) else NEVER) - single[i] - single[j]
        total[i] += extra / 2
        total[j] += extra / 2
    return sorted(total, key=lambda i: (total[i], i))


def _only(evidence: BitEvidence, picks: Mapping[int, int]) -> Genome:
    return tuple(picks.get(i, 0) for i in range(len(evidence.space.choices)))


def _prefixes(
    evidence: BitEvidence, base: Mapping[int, int], genes: Mapping[int, int], order: Sequence[int]
) -> Ladder:
    def make(count: int) -> Genome:
        return evidence.genome({**base, **{i: genes[i] for i in order[:count]}})

    return Ladder(len(order) + 1, make)
