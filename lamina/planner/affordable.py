"""Whether a finished model keeps every cost bound, as measured."""

from __future__ import annotations

from lamina.ir.io import serialized_size
from lamina.planner.builder import Builder, Finalist
from lamina.planner.request import Request

# A latency bound must hold when somebody measures again: 1.5 % is what repeated medians differ by here.
MARGIN = 0.985


def affordable(
    request: Request,
    builder: Builder,
    finalist: Finalist,
    *,
    original_s: float | None = None,
    margin: float = MARGIN,
) -> bool:
    """Whether every cost bound holds as measured on the finished model.

    A model slower than the original on some case is never affordable where latency is bounded or all there
    is to gain. Who bounds another cost gets the fastest plan that keeps to it, even if nothing that does is
    as fast as the original.

    Args:
        request: The budget.
        builder: Knows what the original costs.
        finalist: A finished model with its measured latency.
        original_s: Latency of the original measured beside it; that of the beginning when omitted.
        margin: Share of a latency bound that may be used.
    """
    budget, relative = request.budget, finalist.relative
    model = finalist.realized.program.model
    only_gain = request.minimize == "latency" and not budget.costs
    if (only_gain or budget.latency is not None) and relative.slower_somewhere:
        return False
    for bound in budget.costs:
        if bound.axis == "latency":
            scale = 1.0 if bound.relative else 1.0 / (original_s or builder.original_latency_s)
            if relative.ratio > bound.value * scale * margin:
                return False
        elif bound.axis == "size":
            if serialized_size(model) > bound.limit(builder.original_size):
                return False
        elif bound.axis == "memory":
            if builder.memory(finalist) > bound.limit(builder.original_memory()):
                return False
        elif finalist.candidate.predicted["flops"] > bound.limit(builder.prepared.original_cost.flops):
            return False
    return True
