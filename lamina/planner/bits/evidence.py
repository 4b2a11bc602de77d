"""What allocators of bits go by: prices and damages of every form, its width, and more on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lamina.budget import FOOTPRINT
from lamina.passes.pass_ import Option, Site
from lamina.planner.costs import Costs
from lamina.planner.search import Goal
from lamina.planner.space import Genome, Space

# The transform whose options are forms of a weight.
QUANTIZE = "quantize"
# Widths that forms are grouped by, bits a weight; 32 is the operator as it is.
LEVELS = (2, 3, 4, 8, 16)
FLOAT = 32
# Damage that stands for "never".
NEVER = 1e9


@dataclass(frozen=True)
class BitEvidence:
    """All that an allocator may read. What costs runs is a callable, asked only by those that need it.

    Attributes:
        costs: Space and prices.
        damage: Output divergence of every option alone; :data:`NEVER` where an option is not to be taken:
            it belongs to another transform, or its outputs are not finite.
        widths: Level of every option, of :data:`LEVELS`; None: it stores no weight (a carrier of int8).
        noise: Relative squared error of the site's own output under every option, run by itself on what it
            reads; NaN where it cannot be run.
        modification: Choice -> LIM of the residual branch it lies in; choices in none are left out.
        outliers: Choice -> ZD of its weight.
        entropy: Choice -> entropy in nats of what it reads.
        divergence: Genomes -> output divergence from the original.
    """

    costs: Costs
    damage: Sequence[Sequence[float]]
    widths: Sequence[Sequence[int | None]]
    noise: Callable[[], Sequence[Sequence[float]]] = field(default=lambda: ())
    modification: Callable[[], Mapping[int, float]] = dict
    outliers: Callable[[], Mapping[int, float]] = dict
    entropy: Callable[[], Mapping[int, float]] = dict
    divergence: Callable[[Sequence[Genome]], Sequence[float]] = field(default=lambda genomes: ())

    @property
    def space(self) -> Space:
        """The choices."""
        return self.costs.space

    @property
    def weighted(self) -> tuple[int, ...]:
        """Choices with a form that stores a weight in fewer bits, in graph order."""
        return tuple(i for i, row in enumerate(self.widths) if any(w is not None for w in row))

    @property
    def carriers(self) -> tuple[int, ...]:
        """Choices that only carry int8 on."""
        found = (i for i, c in enumerate(self.space.choices) if c.transform.name == QUANTIZE)
        return tuple(i for i in found if all(w is None for w in self.widths[i]))

    def genes(self, index: int) -> list[int]:
        """Options of a choice that may be taken, as genes."""
        return [k + 1 for k, harm in enumerate(self.damage[index]) if harm < NEVER]

    def levels(self) -> tuple[int, ...]:
        """Every width on offer, the widest first; 32 leads."""
        found = {w for i in self.weighted for g in self.genes(i) if (w := self.widths[i][g - 1]) is not None}
        return (FLOAT, *sorted(found, reverse=True))

    def at(self, index: int, level: int, axis: str) -> int:
        """The gene of a choice at a level: of the forms that wide the cheapest, then the gentlest.

        Cheapest on ``axis``. A choice without such a form takes the next wider one it has; 0, the operator as
        it is, at worst.
        """
        widths = self.widths[index]
        wide = [w for g in self.genes(index) if (w := widths[g - 1]) is not None and w >= level]
        if level >= FLOAT or not wide:
            return 0
        genes = [g for g in self.genes(index) if widths[g - 1] == min(wide)]
        return min(genes, key=lambda g: (self.cost(index, g, axis), self.damage[index][g - 1]))

    def cost(self, index: int, gene: int, axis: str) -> float:
        """What an option changes on an axis, conversions left out; 0 for gene 0."""
        if not gene:
            return 0.0
        if axis == FOOTPRINT:
            size = self.cost(index, gene, "size") / max(self.costs.base["size"], 1.0)
            return self.cost(index, gene, "latency") + size
        if axis == "latency":
            return self.costs.latency_delta(index, gene)
        return float(self.costs.delta[axis][index][gene - 1])

    def genome(self, picks: Mapping[int, int]) -> Genome:
        """The genome with these genes, and carriers wherever they are predicted to save conversions."""
        genes = list(self.space.nothing)
        for index, gene in picks.items():
            genes[index] = gene
        for _ in range(2):  # a carrier behind a carrier saves only once the other one is taken
            for index in self.carriers:
                genes[index] = self._carrying(genes, index)
        return self.space.canonical(genes)

    def _carrying(self, genes: Sequence[int], index: int) -> int:
        def latency(gene: int) -> float:
            other = [*genes[:index], gene, *genes[index + 1 :]]
            added = self.costs.latency_delta(index, gene) if gene else 0.0
            return added + self.costs.conversions(tuple(other))

        return min((0, *self.genes(index)), key=latency)


def axis_of(goal: Goal) -> str:
    """The cost an allocator trades damage for: what is minimized, or else what is bounded, size first."""
    if goal.minimize != "damage":
        return goal.minimize
    return next((a for a in ("size", "latency", "flops") if a in goal.bounds), "size")


def widths_of(costs: Costs) -> list[list[int | None]]:
    """The level of every option of a space; None where it stores no weight or is no form of one."""
    found: list[list[int | None]] = []
    for index, choice in enumerate(costs.space.choices):
        if choice.transform.name != QUANTIZE or not choice.site.weights:
            found.append([None] * len(choice.options))
            continue
        held = weight_bytes(costs.space, choice.site)
        sizes = costs.delta["size"][index]
        found.append(
            [width_of(o, 1.0 + s / max(held, 1.0)) for o, s in zip(choice.options, sizes, strict=True)]
        )
    return found


def width_of(option: Option, share: float) -> int:
    """The level of one option: the width it states, or the one nearest to the share of bytes it keeps.

    Args:
        option: A form of a weight.
        share: Bytes it stores, scales and all, over bytes of the float32 weight.
    """
    stated = option.parameters.get("weight_bits")
    if isinstance(stated, (int, float)):
        return next((level for level in LEVELS if level >= stated), LEVELS[-1])
    return min(LEVELS, key=lambda level: abs(np.log(level / max(FLOAT * share, 1.0))))


def weight_bytes(space: Space, site: Site) -> float:
    """Bytes of a site's constants."""
    values = (space.program.graph.initializers.get(name) for name in site.weights)
    tensors = (v.const_value for v in values if v is not None)
    return float(sum(t.nbytes for t in tensors if t is not None))


def allowed_damages(costs: Costs, damage: Sequence[Sequence[float]]) -> list[list[float]]:
    """Damages with :data:`NEVER` for options that are no forms of a weight, or broken."""
    return [
        [float(d) if c.transform.name == QUANTIZE and np.isfinite(d) and d < NEVER else NEVER for d in row]
        for c, row in zip(costs.space.choices, damage, strict=True)
    ]


def mean_width(evidence: BitEvidence, genome: Genome) -> float:
    """Mean level over the weights of a genome, weighted by their bytes in float32."""
    total = bits = 0.0
    for index in evidence.weighted:
        held = weight_bytes(evidence.space, evidence.space.choices[index].site)
        gene = genome[index]
        level = evidence.widths[index][gene - 1] if gene else FLOAT
        total, bits = total + held, bits + held * float(level or FLOAT)
    return bits / total if total else float(FLOAT)


def counts(evidence: BitEvidence, genome: Genome) -> dict[int, int]:
    """Level -> weighted operators that have it."""
    levels: Iterable[int] = (
        evidence.widths[i][genome[i] - 1] or FLOAT if genome[i] else FLOAT for i in evidence.weighted
    )
    found: dict[int, int] = {}
    for level in levels:
        found[level] = found.get(level, 0) + 1
    return dict(sorted(found.items()))
