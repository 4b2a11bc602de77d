"""The search space: every site with its options, nested, and genomes over it.

A genome is one small integer a choice: 0 leaves the site alone, k takes its k-th option. Sites nest (a
weighted operator inside a branch); a choice inside a dropped branch has no effect, so its gene is 0 in
canonical form and no two genomes mean the same program.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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
        return self.transform.removes_site


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
        return tuple(0 if self.dropped(genome, i) else gene for i, gene in enumerate(genome))

    def dropped(self, genome: Sequence[int], index: int) -> bool:
        """Whether an ancestor of the choice is dropped."""
        parent = self.choices[index].parent
        while parent is not None:
            if genome[parent] and self.choices[parent].removes:
                return True
            parent = self.choices[parent].parent
        return False

    def moves(self, genome: Sequence[int]) -> tuple[Move, ...]:
        """The moves of a genome, outer sites first."""
        return tuple(
            Move(choice.site, choice.options[gene - 1])
            for choice, gene in zip(self.choices, self.canonical(genome), strict=True)
            if gene
        )

    def without(self, names: Collection[tuple[str, str, str]]) -> Space:
        """The space without some options, each given as transform, site and option name."""
        kept = []
        for choice in self.choices:
            site = choice.site
            options = tuple(o for o in choice.options if (site.transform, site.name, o.name) not in names)
            if options:
                kept.append(replace(choice, options=options, span=frozenset(site.nodes), parent=None))
        return Space(self.program, _nest(kept), self.refusals)

    def uniform(self, option: str, kinds: Iterable[str] | None = None) -> Genome:
        """The genome that takes ``option`` wherever it is offered (at sites of ``kinds``, when given)."""
        wanted = None if kinds is None else set(kinds)
        genes = []
        for choice in self.choices:
            names = [o.name for o in choice.options]
            fits = option in names and (wanted is None or choice.site.kind in wanted)
            genes.append(names.index(option) + 1 if fits else 0)
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
    owner: dict[str, int] = {}
    nested: list[Choice] = []
    for choice in outer + inner:
        parents = {owner.get(name) for name in choice.span}
        parent = next(iter(parents))
        if len(parents) > 1 or (parent is not None and not choice.span <= nested[parent].span):
            continue  # overlaps partly without nesting: cannot be decided on its own
        if choice.removes:
            owner.update(dict.fromkeys(choice.span, len(nested)))
        nested.append(replace(choice, parent=parent))
    return tuple(nested)
