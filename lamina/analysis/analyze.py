"""What a program is made of and how redundant its parts look, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from lamina.analysis.cost import CostResult, cost
from lamina.analysis.instrument import feeds_of
from lamina.analysis.metrics import FORWARD_METRICS
from lamina.analysis.needs import union
from lamina.analysis.profile import ProfileResult, profile
from lamina.analysis.roofline import crossing_bytes, intensity, position, roof_share
from lamina.analysis.statistics import BranchProbe, Statistics, collect
from lamina.backends.backend import Target, Workload
from lamina.backends.roof import Roof, roof
from lamina.data import Dataset
from lamina.ir.branches import Block, Branch, BranchesResult, find_branches
from lamina.ir.program import Program

_Rated = dict[tuple[str, str], dict[str, float]]


class PartResult(TypedDict):
    """A block, a branch or an operator.

    Attributes:
        name: What it is called.
        kind: What it is: ``attention``, ``mlp``, ``conv``, ...; ``block``; an operator type.
        parameters: Weight elements of its own.
        flops: Operations for the inputs looked at.
        macs: Multiply-adds among them.
        bytes_moved: Sum over its operators of what each reads and writes, weights included.
        bytes_crossing: What crosses its border: the least it moves if all of it is fused.
        intensity: FLOP/byte, of what its operators move; None where nothing moves.
        bound: ``compute`` or ``memory``, under the target's measured roof; None without a target.
        roof_share: Attainable over measured time (:func:`lamina.analysis.roofline.roof_share`); None where
            not timed.
        latency_s: Seconds a run in ONNX Runtime's profiler; None where not timed.
        metrics: Metric name -> value; empty without data.
        members: Branches of a block, nodes of a branch.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    macs: int
    bytes_moved: int
    bytes_crossing: int
    intensity: float | None
    bound: str | None
    roof_share: float | None
    latency_s: float | None
    metrics: dict[str, float]
    members: list[str]


class AnalysisResult(TypedDict):
    """JSON-able facts about a program.

    Attributes:
        blocks: Repeating runs of branches.
        branches: Residual branches, in execution order.
        operators: Nodes, in execution order.
        totals: Flops, macs, parameters, bytes and peak activation memory of the whole.
        shapes: Input name -> shape that flops and latencies are for.
        skipped: Part -> why it has no metrics.
        refusals: Sums that are nearly a residual branch -> why they are not one.
    """

    blocks: list[PartResult]
    branches: list[PartResult]
    operators: list[PartResult]
    totals: dict[str, float]
    shapes: dict[str, list[int]]
    skipped: dict[str, str]
    refusals: dict[str, str]


def analyze(
    program: Program,
    dataset: Dataset | None = None,
    *,
    target: Target | None = None,
    workload: Workload | None = None,
) -> AnalysisResult:
    """Say what each block, branch and operator costs and how redundant it looks.

    Args:
        program: Left unchanged.
        dataset: Samples for :data:`lamina.analysis.metrics.FORWARD_METRICS`; without them there are none.
        target: An ONNX Runtime target times operators with its threads; any other leaves ``latency_s`` None.
        workload: Its weightiest case gives the shapes for flops and latencies; else one sample of the data,
            else the program's example inputs.

    Raises:
        DataError: The data does not fit the program.
        BackendError: ONNX Runtime refuses the program or the inputs.
        UnsupportedOperator: An input or output is not a tensor.
    """
    program.require_tensors()
    feeds = _feeds(program, dataset, workload)
    found = find_branches(program)
    costs = cost(program, feeds)
    timed = target is not None and target.backend == "ort"
    times = profile(program, feeds, threads=target.threads) if target is not None and timed else None
    statistics = Statistics(0)
    if dataset is not None:
        statistics = collect(program, dataset, branches=_probes(found), needs=union(FORWARD_METRICS))
    rated = _rated(program, statistics)
    parts = _Parts(program, costs, times, roof(target) if target is not None and timed else None)
    operators = [
        parts.part(o.name, o.kind, o.parameters, [o.name], rated.get(("operator", o.name), {}), [])
        for o in costs.operators
    ]
    branches = [_branch(b, parts, rated) for b in found.branches]
    by_name = {b.name: (b, part) for b, part in zip(found.branches, branches, strict=True)}
    blocks = [_block(b, [by_name[n] for n in b.branches], parts, rated) for b in found.blocks]
    totals = _totals(costs, times)
    return AnalysisResult(
        blocks=blocks,
        branches=branches,
        operators=operators,
        totals=totals,
        shapes={name: list(array.shape) for name, array in feeds.items()},
        skipped=dict(statistics.skipped),
        refusals={r.where: r.reason for r in found.refusals},
    )


def _feeds(program: Program, dataset: Dataset | None, workload: Workload | None) -> Mapping[str, np.ndarray]:
    if workload:
        return max(workload, key=lambda case: case.weight).feeds
    if dataset is None or not len(dataset):
        return program.example
    return feeds_of(program, dataset.rows(slice(0, 1)), "the first sample")


def _probes(found: BranchesResult) -> list[BranchProbe]:
    """One probe a branch, and one over each block: from its first branch's skip to its last one's sum."""
    probes = [BranchProbe.of(branch) for branch in found.branches]
    by_name = {branch.name: probe for branch, probe in zip(found.branches, probes, strict=True)}
    for block in found.blocks:
        first, last = by_name[block.branches[0]], by_name[block.branches[-1]]
        whole = BranchProbe(_block_key(block), first.skip, None, last.output, first.axis, depth=False)
        probes.append(whole)
    return probes


def _block_key(block: Block) -> str:
    return f"block {block.name}"


class _Parts:
    """Puts together what is known of parts of one program."""

    def __init__(
        self, program: Program, costs: CostResult, times: ProfileResult | None, roof: Roof | None
    ) -> None:
        self._nodes = {n.name: n for n in program.graph if n.name}
        self._costs = {o.name: o for o in costs.operators}
        self._tensors, self._times, self._roof = costs.tensors, times, roof

    def part(
        self,
        name: str,
        kind: str,
        parameters: int,
        nodes: Sequence[str],
        metrics: dict[str, float],
        members: list[str],
        *,
        joins: Iterable[str] = (),
    ) -> PartResult:
        """One part made of ``nodes``; ``joins`` are sums between them that a fused kernel would hold too."""
        costs = [self._costs[n] for n in nodes]
        flops, moved = sum(c.flops for c in costs), sum(c.bytes_moved for c in costs)
        place = position([(c.flops, c.bytes_moved) for c in costs], self._roof) if self._roof else None
        latency = _time(self._times, nodes)
        return PartResult(
            name=name,
            kind=kind,
            parameters=parameters,
            flops=flops,
            macs=sum(c.macs for c in costs),
            bytes_moved=moved,
            bytes_crossing=crossing_bytes([self._nodes[n] for n in (*nodes, *joins)], self._tensors),
            intensity=intensity(flops, moved),
            bound=None if place is None else place.bound,
            roof_share=roof_share(place, latency),
            latency_s=latency,
            metrics=metrics,
            members=members,
        )


def _branch(branch: Branch, parts: _Parts, rated: _Rated) -> PartResult:
    metrics = rated.get(("depth", branch.name), {}) | rated.get(("branch", branch.name), {})
    return parts.part(branch.name, branch.kind, branch.parameters, branch.nodes, metrics, list(branch.nodes))


def _block(
    block: Block, branches: list[tuple[Branch, PartResult]], parts: _Parts, rated: _Rated
) -> PartResult:
    return parts.part(
        block.name,
        "block",
        sum(part["parameters"] for _, part in branches),
        [n for branch, _ in branches for n in branch.nodes],
        rated.get(("branch", _block_key(block)), {}),
        list(block.branches),
        joins=[branch.add for branch, _ in branches],
    )


def _rated(program: Program, statistics: Statistics) -> _Rated:
    """The metrics by what they are about and site."""
    found: _Rated = {}
    for metric in FORWARD_METRICS:
        for site, value in metric.rate(program, statistics).items():
            found.setdefault((metric.about, site), {})[metric.name] = value
    return found


def _time(times: ProfileResult | None, nodes: Iterable[str]) -> float | None:
    """Seconds of the kernels that carry these operators; None where no kernel is named for any of them."""
    if times is None:
        return None
    seconds = [times.operators[n] for n in nodes if n in times.operators]
    return sum(seconds) if seconds else None


def _totals(costs: CostResult, times: ProfileResult | None) -> dict[str, float]:
    totals: dict[str, float] = {
        "flops": costs.flops,
        "macs": costs.macs,
        "bytes_moved": costs.bytes_moved,
        "parameters": costs.parameters,
        "weight_bytes": costs.weight_bytes,
        "peak_activation_bytes": costs.peak_activation_bytes,
    }
    if times is not None:
        totals["operators_latency_s"] = sum(times.operators.values())
        totals["other_latency_s"] = sum(times.other.values())
    return totals
