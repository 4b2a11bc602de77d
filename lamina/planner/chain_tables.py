"""What the dynamic programs over a chain of convolutions read, measured; and their plans as moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

from lamina.analysis.single_site import damages
from lamina.backends.backend import Workload
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.conv_chains import ConvChain
from lamina.passes.merge_conv_chain import MergeConvChain, chain_option, chain_site
from lamina.passes.pass_ import Option, Site
from lamina.planner.apply import apply_moves
from lamina.planner.chain_dp import ChainPlan, Span, Way
from lamina.planner.plan import Move
from lamina.planner.prices import Prices
from lamina.quality.metric import Metric

# A span and the convolutions in it that are dropped before the others are merged.
Key = tuple[Span, tuple[int, ...]]
# The same behind the number of its chain.
_Numbered = tuple[int, Span, tuple[int, ...]]


@dataclass(frozen=True)
class ChainTable:
    """One chain, measured on a target and on data.

    Attributes:
        chain: The chain.
        latency: T[i, j, k]: weighted seconds of i..j as one convolution, activations aside, without some.
        damage: I[i, j, k]: output divergence with only that done; 0 for (i, i) as it is.
    """

    chain: ConvChain
    latency: dict[Key, float] = field(default_factory=dict)
    damage: dict[Key, float] = field(default_factory=dict)

    def merges(self) -> tuple[dict[Span, float], dict[Span, float]]:
        """Latency and damage of spans of which nothing is dropped: what the two stages read."""
        kept = [span for span, without in self.latency if not without]
        return {s: self.latency[s, ()] for s in kept}, {s: self.damage[s, ()] for s in kept}

    def ways(self) -> dict[Span, list[Way]]:
        """All of it: what the joint program reads."""
        found: dict[Span, list[Way]] = {}
        for (span, without), seconds in self.latency.items():
            way = Way(seconds, self.damage[span, without], (span,), without)
            found.setdefault(span, []).append(way)
        return found


def chain_tables(
    program: Program,
    chains: Sequence[ConvChain],
    prices: Prices,
    workload: Workload,
    dataset: Dataset,
    metric: Metric,
    *,
    longest: int = 4,
    growth: float = 2.0,
    drops: bool = True,
    threads: int | None = None,
) -> list[ChainTable]:
    """Measure every span of each chain: its latency merged, and the divergence that merging it causes.

    The divergence stands for the paper's importance without its training (LayerMerge, arXiv:2406.12837, and
    Fu et al., arXiv:2301.12187, fine-tune each merged network). Activations are not timed: runtimes fuse
    them.

    Args:
        program: The program the chains are of.
        chains: Of :func:`lamina.passes.conv_chains.conv_chains`.
        prices: Measures and keeps latencies.
        workload: The cases and their weights.
        dataset: Samples the divergence is taken on.
        metric: A divergence.
        longest: Convolutions a span.
        growth: Most multiply-adds of a merged span, in those of its parts; others are left out.
        drops: Whether convolutions that keep channels and size may be dropped from a span.
        threads: Threads of the runs for divergences.

    Raises:
        DataError: The data does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    moves = {
        (number, *key): chain_move(program, chain, *key)
        for number, chain in enumerate(chains)
        for key in span_keys(chain, longest, growth, drops=drops)
    }
    seconds = _latencies(program, moves, prices, workload)
    changed = {str(k): m for k, m in moves.items() if k[1][0] < k[1][1] or k[2]}
    variants = {name: apply_moves(program, [move]) for name, move in changed.items()}
    harm = damages(program, variants, dataset, metric, threads=threads) if variants else {}
    tables = [ChainTable(chain) for chain in chains]
    for key in moves:
        damage = harm[str(key)].mean if str(key) in harm else 0.0
        if isfinite(seconds[key]) and isfinite(damage):
            table, place = tables[key[0]], key[1:]
            table.latency[place], table.damage[place] = seconds[key], max(damage, 0.0)
    return tables


def _latencies(
    program: Program, moves: Mapping[_Numbered, Move], prices: Prices, workload: Workload
) -> dict[_Numbered, float]:
    """Weighted seconds of each; infinite where the runtime refuses it, 0 where nothing is left."""
    transform = MergeConvChain()
    offered: dict[Site, list[Option]] = {}
    for (_, (first, last), without), move in moves.items():
        options = offered.setdefault(move.site, [])
        if first < last and len(without) <= last - first:
            options.append(move.option)
    table = prices.price(program, [(s, transform, tuple(o)) for s, o in offered.items()], workload)
    found = {}
    for key, move in moves.items():
        _, (first, last), without = key
        name, total = move.option.name if first < last else "float", 0.0
        for case in workload if len(without) <= last - first else ():
            at = (transform.name, move.site.name, name, case.name)
            total += inf if at in prices.failures else case.weight * table[at]
        found[key] = total
    return found


def chain_move(program: Program, chain: ConvChain, span: Span, without: Sequence[int] = ()) -> Move:
    """The move that merges a span of a chain into one convolution.

    Args:
        program: The program the chain is of.
        chain: The chain.
        span: First and last convolution.
        without: Those of them that are dropped.
    """
    part = chain.part(*span)
    inner = [i - span[0] for i in without]
    option = chain_option(part, ((0, span[1] - span[0]),), inner)
    return Move(chain_site(part, {n.name: n for n in program.graph}), option)


def plan_moves(program: Program, chain: ConvChain, plan: ChainPlan) -> list[Move]:
    """The moves of a plan; convolutions that stay as they are need none."""
    moves = []
    for way in plan.ways:
        for first, last in way.merges:
            without = tuple(i for i in way.without if first <= i <= last)
            if first < last or without:
                moves.append(chain_move(program, chain, (first, last), without))
    return moves


def span_keys(
    chain: ConvChain, longest: int = 4, growth: float = 2.0, *, drops: bool = True
) -> Iterator[Key]:
    """What is measured of a chain; arguments as of :func:`chain_tables`."""
    count = len(chain.convs)
    for first in range(count):
        for last in range(first, min(first + longest, count)):
            able = [i for i in range(first, last + 1) if drops and chain.skippable(i)]
            subsets = dict.fromkeys([(), *((i,) for i in able), tuple(able)])
            for without in subsets:
                shape = chain.shape(first, last, without)
                now = sum(chain.forms[i].shape.taps for i in range(first, last + 1))
                if first == last or shape is None or shape.taps <= growth * now:
                    yield (first, last), without
