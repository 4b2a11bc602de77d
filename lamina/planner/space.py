"""The search space: every site with its options, nested, and genomes over it.

A genome is one small integer a choice: 0 leaves the site alone, k takes its k-th option. Sites nest (a weighted
operator inside a branch); a choice inside a dropped branch has no effect, so its gene is 0 in canonical form and
no two genomes mean the same program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lamina.analysis.statistics import Statistics
from lamina.backends.backend import Target
from lamina.ir.program import Program
from lamina.passes.pass_ import Option, Refusal, Site, Transform
from lamina.planner.plan import Move

Genome = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One decision: a site, the options that apply there, and the choice it is nested in.

    Attributes:
        transform: Who offers the options.
        site: Where.
        options: Options 1..k of a gene.
        span: Names of the nodes the choice governs: the site's own, and trailing ones pulled in so that
            choices nest (a Relu that another site owns together with the branch's Add).
        parent: Index of the innermost choice whose span holds this one, or None.
    """

    transform: Transform
    site: Site
    options: tuple[Option, ...]
    span: frozenset[str]
    parent: int | None = None

    @property
    def removes(self) -> bool:
        """Whether the options take the site's nodes out, so that nested choices lose their meaning."""
        return all(option.name == "drop" for option in self.options)


@dataclass(frozen=True)
class Space:
    """All choices of a program, outer ones before the ones nested in them.

    Attributes:
        program: The folded program the sites belong to.
        choices: Every decision the planner can make.
        refusals: Sites that nearly matched.
    """

    program: Program
    choices: tuple[Choice, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def nothing(self) -> Genome:
        """The genome that changes nothing."""
        return (0,) * len(self.choices)

    def canonical(self, genome: Sequence[int]) -> Genome:
        """Zero the genes that a dropped ancestor makes meaningless."""
        genes = list(genome)
        for i, choice in enumerate(self.choices):
            if choice.parent is not None and genes[choice.parent] > 0 and self.choices[choice.parent].removes:
                genes[i] = 0
            elif choice.parent is not None and self._gone(genes, choice.parent):
                genes[i] = 0
        return tuple(genes)

    def _gone(self, genes: Sequence[int], index: int | None) -> bool:
        while index is not None:
            if genes[index] and self.choices[index].removes:
                return True
            index = self.choices[index].parent
        return False

    def moves(self, genome: Sequence[int]) -> tuple[Move, ...]:
        """The moves of a genome, outer sites first."""
        return tuple(
            Move(choice.site, choice.options[gene - 1])
            for choice, gene in zip(self.choices, self.canonical(genome), strict=True)
            if gene
        )

    def uniform(self, wanted: Mapping[str, Sequence[str]] | None = None, *, option: str = "") -> Genome:
        """The genome that takes ``option`` wherever a choice offers it."""
        genes = []
        for choice in self.choices:
            names = [o.name for o in choice.options]
            genes.append(names.index(option) + 1 if option in names else 0)
        return self.canonical(genes)


def build_space(
    program: Program,
    transforms: Sequence[Transform],
    statistics: Statistics,
    target: Target,
) -> Space:
    """Ask every transform for its sites and options and nest them.

    Args:
        program: The folded program.
        transforms: Transforms to use, in any order.
        statistics: What the calibration run collected.
        target: Where the result will run; options are offered for it.
    """
    found: list[Choice] = []
    refusals: list[Refusal] = []
    for transform in transforms:
        for site in transform.sites(program):
            if isinstance(site, Refusal):
                refusals.append(site)
                continue
            options = tuple(transform.options(site, program, statistics, target))
            if options:
                found.append(Choice(transform, site, options, frozenset(site.nodes)))
    return Space(program, _nest(found), tuple(refusals))


def _nest(found: Iterable[Choice]) -> tuple[Choice, ...]:
    ordered = sorted(found, key=lambda c: -len(c.span))
    outer = [c for c in ordered if c.removes]
    inner = [c for c in ordered if not c.removes]
    for i, choice in enumerate(outer):
        span = set(choice.span)
        for other in inner:
            if span & other.span:
                span |= other.span
        outer[i] = replace(choice, span=frozenset(span))
    outer.sort(key=lambda c: -len(c.span))
    choices = outer + inner
    owner: dict[str, int] = {}
    nested: list[Choice] = []
    for i, choice in enumerate(choices):
        parent = owner.get(next(iter(choice.span)))
        if parent is not None and not choice.span <= choices[parent].span:
            continue  # overlaps partly without nesting: cannot be decided on its own
        nested.append(replace(choice, parent=parent))
        if choice.removes:
            owner.update(dict.fromkeys(choice.span, i))
    return _drop_gaps(choices, nested)


def _drop_gaps(choices: Sequence[Choice], nested: Sequence[Choice]) -> tuple[Choice, ...]:
    """Re-number parents after partly overlapping choices were left out."""
    position = {id(c.site): i for i, c in enumerate(nested)}
    renumbered = []
    for choice in nested:
        parent = None if choice.parent is None else position.get(id(choices[choice.parent].site))
        renumbered.append(replace(choice, parent=parent))
    return tuple(renumbered)
