"""Measure the chains of convolutions of a program and solve the dynamic programs over them, within a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.ir.program import Program
from lamina.passes.conv_chains import conv_chains
from lamina.passes.merge_conv_chain import MergeConvChain
from lamina.passes.pass_ import Transform
from lamina.planner.blame import Undone, reason_of
from lamina.planner.chain_plans import ChainPlans, ChainRule, plan_chains
from lamina.planner.chain_tables import chain_tables, span_keys
from lamina.planner.prices import Prices
from lamina.planner.request import Request
from lamina.planner.shortlist import effort
from lamina.quality import get_metric

# Longest spans that are measured, tried in turn until they fit the time.
LONGEST = (4, 3, 2)


def with_chain_plans(
    request: Request,
    program: Program,
    transforms: Sequence[Transform],
    rules: Sequence[ChainRule],
    told: list[Undone],
) -> tuple[list[Transform], ChainPlans]:
    """The transforms, merges planned over whole chains among their options; and the plans.

    Args:
        request: What was asked for.
        program: The folded program.
        transforms: Transforms to use.
        rules: The programs to solve; without any, or without merge-conv-chain, nothing is measured.
        told: Receives what went wrong, if anything.
    """
    merge = next((t for t in transforms if isinstance(t, MergeConvChain)), None)
    if merge is None or not rules:
        return list(transforms), ChainPlans({})
    try:
        plans = measured_plans(request, program, merge, rules)
    except Exception as error:  # a bug in a transform costs its moves, not the run
        reason = reason_of(error)
        told.append({"pass": merge.name, "where": "plans over whole chains", "reason": reason})
        return list(transforms), ChainPlans({}, reason)
    planned = replace(merge, planned=plans.tilings)
    return [planned if t is merge else t for t in transforms], plans


def measured_plans(
    request: Request, program: Program, transform: MergeConvChain, rules: Sequence[ChainRule]
) -> ChainPlans:
    """The plans of dynamic programs over latencies measured on the target and divergences on selection data.

    As for single options (:mod:`lamina.planner.shortlist`), divergences get a share of the search's time:
    samples go first, then the length of the spans that may be merged.

    Args:
        request: What was asked for.
        program: The folded program.
        transform: Its windows are offered beside the plans' own.
        rules: The programs.

    Raises:
        DataError: The data does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    chains, _ = conv_chains(program)
    if not chains:
        return ChainPlans({}, "no two convolutions follow each other with nothing but activations between")
    if not request.backend.capabilities(request.target)["operator_prices"]:
        return ChainPlans({}, f"target '{request.target}' prices no operators")
    selection = request.splits.selection
    batch = max(1, selection.batch_size // selection.group)
    per_sample = _seconds(request, program) / batch
    for longest in LONGEST:
        count = sum(1 for chain in chains for _ in span_keys(chain, longest))
        planned = effort(request.seconds, per_sample, count, batch, fixed=bool(selection.fixed_batch))
        if planned.options >= count:
            break
    else:
        return ChainPlans({}, f"{count} merges are too many to measure in the time")
    data = selection.rows(slice(0, planned.samples))
    metric = get_metric(request.metric.divergence, program)
    prices = Prices(request.target, request.backend)
    tables = chain_tables(program, chains, prices, request.workload, data, metric, longest=longest)
    return plan_chains(tables, transform, rules)


def _seconds(request: Request, program: Program) -> float:
    """Of one run of the program on a batch of selection samples."""
    every_core = Target.parse("ort:cpu")
    run = get_backend(every_core).compile(program.model, every_core).run
    feeds = next(request.splits.selection.batches()).inputs
    run(feeds)
    start = time.perf_counter()
    run(feeds)
    return time.perf_counter() - start
