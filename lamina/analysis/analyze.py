"""What a program is made of and how redundant its parts look, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np

from lamina.analysis.cost import CostResult, cost
from lamina.analysis.instrument import feeds_of
from lamina.analysis.metrics import FORWARD_METRICS
from lamina.analysis.needs import union
from lamina.analysis.profile import ProfileResult, profile
from lamina.analysis.statistics import BranchProbe, Statistics, collect
from lamina.backends.backend import Target, Workload
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
        latency_s: Seconds a run in ONNX Runtime's profiler; None where not timed.
        metrics: Metric name -> value; empty without data.
        members: Branches of a block, nodes of a branch.
    """

    name: str
    kind: str
    parameters: int
    flops: int
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
    by_name = {o.name: o for o in costs.operators}
    operators = [
        _part(
            o.name,
            o.kind,
            o.parameters,
            o.flops,
            _time(times, [o.name]),
            rated.get(("operator", o.name), {}),
            [],
        )
        for o in costs.operators
    ]
    branches = [_branch(b, {n: by_name[n].flops for n in b.nodes}, times, rated) for b in found.branches]
    parts = {part["name"]: part for part in branches}
    blocks = [_block(b, [parts[n] for n in b.branches], rated) for b in found.blocks]
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


def _branch(
    branch: Branch, flops: Mapping[str, int], times: ProfileResult | None, rated: _Rated
) -> PartResult:
    return _part(
        branch.name,
        branch.kind,
        branch.parameters,
        sum(flops.values()),
        _time(times, branch.nodes),
        rated.get(("depth", branch.name), {}) | rated.get(("branch", branch.name), {}),
        list(branch.nodes),
    )


def _block(block: Block, parts: list[PartResult], rated: _Rated) -> PartResult:
    seconds = [p["latency_s"] for p in parts if p["latency_s"] is not None]
    return _part(
        block.name,
        "block",
        sum(p["parameters"] for p in parts),
        sum(p["flops"] for p in parts),
        sum(seconds) if seconds else None,
        rated.get(("branch", _block_key(block)), {}),
        list(block.branches),
    )


def _part(
    name: str,
    kind: str,
    parameters: int,
    flops: int,
    latency_s: float | None,
    metrics: dict[str, float],
    members: list[str],
) -> PartResult:
    return PartResult(
        name=name,
        kind=kind,
        parameters=parameters,
        flops=flops,
        latency_s=latency_s,
        metrics=metrics,
        members=members,
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
        "parameters": costs.parameters,
        "weight_bytes": costs.weight_bytes,
        "peak_activation_bytes": costs.peak_activation_bytes,
    }
    if times is not None:
        totals["operators_latency_s"] = sum(times.operators.values())
        totals["other_latency_s"] = sum(times.other.values())
    return totals
