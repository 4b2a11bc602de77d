"""When a finished model that is slower than the original may be returned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lamina.backends.measure import Ratio
from lamina.budget import Budget
from lamina.planner.affordable import affordable
from lamina.planner.timing import Relative


@pytest.mark.parametrize(
    ("budget", "holds"),
    [("drop<=1%", False), ("latency<=2x, drop<=1%", False), ("flops<=1x, drop<=1%", True)],
)
def test_a_slower_model_is_for_those_who_bound_another_cost(budget, holds):
    parsed = Budget.parse(budget)
    slower = Relative(1.2, 1.1, 1.3, {"1": Ratio(1.2, 1.1, 1.3)})
    finalist = SimpleNamespace(
        relative=slower,
        realized=SimpleNamespace(program=SimpleNamespace(model=None)),
        candidate=SimpleNamespace(predicted={"flops": 1.0}),
    )
    builder = SimpleNamespace(
        original_latency_s=1.0, prepared=SimpleNamespace(original_cost=SimpleNamespace(flops=1.0))
    )
    request = SimpleNamespace(budget=parsed, minimize=parsed.objective())
    assert affordable(request, builder, finalist) is holds
