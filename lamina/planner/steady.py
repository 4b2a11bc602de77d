"""Of plans that the samples cannot tell apart, the one that changes the outputs least.

Where damage is minimized, the best of many plans on a few hundred samples is partly the luckiest one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.planner.search import Candidate
from lamina.planner.space import Space


def steadied(candidates: Sequence[Candidate], space: Space) -> list[Candidate]:
    """The candidates, those first whose damage is within a standard error of the first one's.

    Among these the least sum of single-site divergences comes first: it is the same kind of evidence on other
    data. Only plans that use the same transforms are compared by it; sums mislead where kinds mix.

    Args:
        candidates: The best as measured first.
        space: The choices.

    Source: the one-standard-error rule of Breiman et al. 1984, "Classification and Regression Trees", sec.
    3.4.3. Deviates: the error is that of the plan's damage, and simpler means a smaller divergence.
    """
    if not candidates:
        return []
    first = candidates[0]
    most = first.score.damage + first.score.error
    kinds = _transforms(first, space)
    near = [c for c in candidates if c.score.damage <= most and _transforms(c, space) == kinds]
    near.sort(key=lambda c: c.surrogate)
    kept = {c.genome for c in near}
    return [*near, *(c for c in candidates if c.genome not in kept)]


def _transforms(candidate: Candidate, space: Space) -> frozenset[str]:
    pairs = zip(space.choices, candidate.genome, strict=True)
    return frozenset(choice.transform.name for choice, gene in pairs if gene)
