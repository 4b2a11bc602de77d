"""Turn a budget into what the search minimizes and stays under."""

from __future__ import annotations

from lamina.planner.builder import Builder
from lamina.planner.request import Request
from lamina.planner.search import Goal

# Predictions are not measurements: the search aims a little below a cost bound.
AIM = 0.97
# Predicted latency of what shall not be slower: prices of forms that change none add up to some noise.
NOT_SLOWER = 1.05


def make_goal(request: Request, builder: Builder, original_score: float) -> Goal:
    """Bounds in the units of the cost model; memory becomes a bound on size, as weights are what moves.

    Args:
        request: The budget and the metric.
        builder: Knows what the original costs.
        original_score: The original's metric on selection data.
    """
    bounds: dict[str, float] = {}
    for bound in request.budget.costs:
        if bound.axis == "latency":
            limit = bound.value if bound.relative else bound.value / builder.original_latency_s
            bounds["latency"] = AIM * limit
        elif bound.axis == "size":
            bounds["size"] = min(bounds.get("size", float("inf")), bound.limit(builder.original_size))
        elif bound.axis == "memory":
            original = builder.original_memory()
            room = bound.limit(original) - (original - builder.original_size)
            bounds["size"] = min(bounds.get("size", float("inf")), room)
        else:
            bounds["flops"] = bound.limit(builder.prepared.original_cost.flops)
    if request.not_slower:
        bounds.setdefault("latency", NOT_SLOWER * max(1.0, builder.prepared.costs.base["latency"]))
    minimize = "size" if request.minimize == "memory" else request.minimize
    allowed = request.budget.allowed_damage(request.metric, original_score)
    return Goal(minimize, bounds, allowed)
