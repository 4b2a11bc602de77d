"""``entropy-partition-ptq``: blocks of operators whose errors depend on each other, searched jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from lamina.planner.bits.evidence import BitEvidence, axis_of
from lamina.planner.bits.front import front
from lamina.planner.bits.ladder import Ladder, Plans
from lamina.planner.search import Goal
from lamina.planner.space import Genome

# Operators of a block, forms of each that are combined, and combinations of a block that are measured.
MOST_OPERATORS, _FORMS, _MEASURED = 3, 4, 8


def entropy_partition_ptq(evidence: BitEvidence, goal: Goal) -> Plans:
    """Cut the operators into blocks where activations carry least entropy; choose forms jointly inside each.

    Entropy of an activation stands for how much the error behind it depends on the error before it. Of every
    block the combinations that are best by the sum of damages are measured together, and a dynamic program
    over the blocks adds those up. Q-VLM, Wang et al. 2024, arXiv:2410.08119. Deviates: it searches rounding
    functions of one width, here the forms are searched; block ends are at the least entropies, not at a
    threshold on it; no encoder is tuned.
    """
    axis = axis_of(goal)
    found = blocks(evidence.weighted, evidence.entropy())
    rows = [_combinations(evidence, block, axis) for block in found]
    genomes = [_plan(evidence, b, genes) for b, row in zip(found, rows, strict=True) for genes in row]
    values = iter(evidence.divergence(genomes))
    damages = [[next(values) for _ in row] for row in rows]
    joint = front(
        [
            [sum(evidence.cost(i, g, axis) for i, g in zip(b, genes, strict=True)) for genes in row]
            for b, row in zip(found, rows, strict=True)
        ],
        damages,
    )

    def make(index: int) -> Genome:
        picks: dict[int, int] = {}
        for block, row, pick in zip(found, rows, joint.picks(index), strict=True):
            picks |= dict(zip(block, row[pick], strict=True))
        return evidence.genome(picks)

    yield Ladder(len(joint), make)


def blocks(operators: Sequence[int], entropy: Mapping[int, float]) -> list[list[int]]:
    """Runs of at most :data:`MOST_OPERATORS`, cut again and again where what is read has least entropy.

    Args:
        operators: In graph order.
        entropy: Operator -> entropy of what it reads; unknown ones are the first to be cut at.
    """
    if len(operators) <= MOST_OPERATORS:
        return [list(operators)] if operators else []
    cut = min(range(1, len(operators)), key=lambda at: entropy.get(operators[at], -np.inf))
    return blocks(operators[:cut], entropy) + blocks(operators[cut:], entropy)


def _combinations(evidence: BitEvidence, block: Sequence[int], axis: str) -> list[tuple[int, ...]]:
    """Genes of a block's operators: none, and an even choice of what no other sum of damages beats."""
    choices = [_forms(evidence, index, axis) for index in block]
    rated = [
        (
            sum(evidence.cost(i, g, axis) for i, g in zip(block, genes, strict=True)),
            sum(evidence.damage[i][g - 1] for i, g in zip(block, genes, strict=True) if g),
            genes,
        )
        for genes in product(*choices)
    ]
    kept = [genes for _, _, genes in _nondominated(rated) if any(genes)]
    places = np.linspace(0, len(kept) - 1, min(_MEASURED, len(kept)))
    return [(0,) * len(block), *dict.fromkeys(kept[round(p)] for p in places)]


def _forms(evidence: BitEvidence, index: int, axis: str) -> list[int]:
    """The operator as it is, and forms that no other beats, evenly chosen from gentle to cheap."""
    rated = [
        (evidence.cost(index, g, axis), evidence.damage[index][g - 1], (g,)) for g in evidence.genes(index)
    ]
    kept = [genes[0] for _, _, genes in _nondominated(rated)]
    places = np.linspace(0, len(kept) - 1, min(_FORMS - 1, len(kept)))
    return [0, *dict.fromkeys(kept[round(p)] for p in places)]


def _nondominated(
    rated: Sequence[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    """By falling cost."""
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for one in sorted(rated):
        if not kept or one[1] < kept[-1][1]:
            kept.append(one)
    return kept[::-1]


def _plan(evidence: BitEvidence, block: Sequence[int], genes: Sequence[int]) -> Genome:
    picks = dict(zip(block, genes, strict=True))
    return tuple(picks.get(i, 0) for i in range(len(evidence.space.choices)))
