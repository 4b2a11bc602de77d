"""The plans of the dynamic programs over chains of convolutions, as options of the search space.

All chains of a program share one budget of latency: their convolutions stand in one row, in which no segment
crosses from one chain to the next. What the plans do is cut into windows that no segment crosses, so that a
plan is one option a window, and the search may take one window of a plan and leave another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lamina.errors import PassError
from lamina.passes.conv_chains import ConvChain
from lamina.passes.merge_conv_chain import MergeConvChain, Tiling
from lamina.planner.chain_dp import ChainPlan, Span, Way, front, two_stage_ways
from lamina.planner.chain_tables import ChainTable
from lamina.planner.space import Genome, Space

# Budgets, from the network as it is down to the fastest there is, that a program is solved for.
POINTS = 12
Ways = Mapping[Span, Sequence[Way]]


@dataclass(frozen=True)
class ChainRule:
    """One dynamic program.

    Attributes:
        name: The id of METHODS.md.
        source: Paper it is from.
        ways: Convolutions in a row and all ways to run each span -> those the program chooses among.
    """

    name: str
    source: str
    ways: Callable[[int, Ways], Ways]


def _merges_only(count: int, ways: Ways) -> Ways:
    whole = {span: way for span, listed in ways.items() for way in listed if not way.without}
    latency, damage = ({s: getattr(w, a) for s, w in whole.items()} for a in ("latency", "damage"))
    return two_stage_ways(count, latency, damage)


CHAIN_RULES: tuple[ChainRule, ...] = (
    ChainRule("conv-merge-two-stage-dp", "Fu et al. 2023, arXiv:2301.12187", _merges_only),
    ChainRule("merge-conv-chain", "LayerMerge, Kim et al. 2024, arXiv:2406.12837", lambda count, ways: ways),
)


@dataclass(frozen=True)
class ChainPlans:
    """Plans over all chains of a program.

    Attributes:
        plans: Rule -> its plans, the one that changes least first; each as the windows it changes.
        why_none: Why there are none, where nothing was measured.
    """

    plans: Mapping[str, tuple[tuple[Tiling, ...], ...]]
    why_none: str = ""

    @property
    def tilings(self) -> tuple[Tiling, ...]:
        """Everything any plan does, each once."""
        every = (tiling for plans in self.plans.values() for plan in plans for tiling in plan)
        return tuple(dict.fromkeys(every))

    def genomes(self, rule: str, space: Space) -> Iterator[tuple[float, Genome | None]]:
        """Number of each plan and its genome; None where the space lacks what it takes.

        Raises:
            PassError: Nothing was measured; says why.
        """
        if self.why_none:
            raise PassError(self.why_none)
        place = {
            (choice.site.name, option.name): (i, k + 1)
            for i, choice in enumerate(space.choices)
            if choice.transform.name == MergeConvChain.name
            for k, option in enumerate(choice.options)
        }
        for number, plan in enumerate(self.plans.get(rule, ())):
            genes, there = list(space.nothing), True
            for tiling in plan:
                index, gene = place.get((tiling.site, tiling.option), (-1, 0))
                there = there and gene > 0
                if there:
                    genes[index] = gene
            yield number, space.canonical(genes) if there else None


def plan_chains(
    tables: Sequence[ChainTable], transform: MergeConvChain, rules: Sequence[ChainRule] = CHAIN_RULES
) -> ChainPlans:
    """Solve the programs for a range of budgets over all chains at once.

    Args:
        tables: Chains, measured; one with a convolution that has no latency by itself is left as it is.
        transform: Its windows are offered beside; the plans' own are cut so that these nest.
        rules: The programs.

    Returns:
        Plans that change nothing are left out, so there may be none.
    """
    tables = [t for t in tables if all(((i, i), ()) in t.latency for i in range(len(t.chain.convs)))]
    row: dict[Span, list[Way]] = {}
    starts = [0]
    for table in tables:
        for span, listed in table.ways().items():
            row[_moved(span, starts[-1])] = [_shifted(way, starts[-1]) for way in listed]
        starts.append(starts[-1] + len(table.chain.convs))
    fronts = {
        rule.name: front(starts[-1], rule.ways(starts[-1], row), points=POINTS) if tables else []
        for rule in rules
    }
    merged = {name: [_spans(plan) for plan in plans] for name, plans in fronts.items()}
    found: dict[str, list[list[Tiling]]] = {name: [[] for _ in plans] for name, plans in merged.items()}
    for table, start in zip(tables, starts[:-1], strict=True):
        chain, count = table.chain, len(table.chain.convs)
        local = {
            name: [
                {
                    _moved(s, -start): [i - start for i in w]
                    for s, w in spans.items()
                    if start <= s[0] < start + count
                }
                for spans in plans
            ]
            for name, plans in merged.items()
        }
        changed = {
            s for plans in local.values() for spans in plans for s, w in spans.items() if _changes(s, w)
        }
        for window in _windows(changed, list(transform.windows(chain))):
            for name, plans in local.items():
                for number, spans in enumerate(plans):
                    found[name][number] += _tiling(chain, window, spans)
    return ChainPlans(
        {name: tuple(dict.fromkeys(tuple(plan) for plan in plans if plan)) for name, plans in found.items()}
    )


def _spans(plan: ChainPlan) -> dict[Span, list[int]]:
    """Every merge of a plan and the convolutions dropped from it."""
    return {
        (first, last): [i for i in way.without if first <= i <= last]
        for way in plan.ways
        for first, last in way.merges
    }


def _windows(changed: set[Span], offered: Sequence[Span]) -> list[Span]:
    """Windows that hold what the plans change, and whole what is offered anyway; none overlaps another."""
    found: list[Span] = []
    for first, last in sorted({*changed, *offered}):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return [(a, b) for a, b in found if any(a <= first <= b for first, _ in changed)]


def _tiling(chain: ConvChain, window: Span, spans: Mapping[Span, Sequence[int]]) -> list[Tiling]:
    """What one plan does in one window of a chain; nothing where it changes nothing there."""
    first, last = window
    inside = sorted(span for span in spans if first <= span[0] <= last)
    if not any(_changes(span, spans[span]) for span in inside):
        return []
    without = tuple(sorted(i - first for span in inside for i in spans[span]))
    segments = tuple(_moved(span, -first) for span in inside)
    return [Tiling(chain.convs[first : last + 1], segments, without)]


def _changes(span: Span, without: Sequence[int]) -> bool:
    return span[0] < span[1] or bool(without)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _shifted(way: Way, by: int) -> Way:
    return Way(
        way.latency, way.damage, tuple(_moved(m, by) for m in way.merges), tuple(i + by for i in way.without)
    )
