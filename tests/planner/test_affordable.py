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
    slower = Relative(1.2, 1.1, 1.3, {"1": Ratio(1.2, 1.1, 1.3)})
    assert allowed(budget, slower) is holds


@pytest.mark.parametrize(
    ("median", "low", "holds"), [(1.2, 1.1, False), (1.01, 0.995, True), (1.1, 0.97, True), (0.9, 0.8, True)]
)
def test_what_shall_not_be_slower_may_be_as_fast(median, low, holds):
    """A plan of forms that change no time measures a little above 1 as often as below."""
    case = Relative(median, low, 1.3, {"1": Ratio(median, low, 1.3)})
    assert allowed("flops<=1x, drop<=1%", case, not_slower=True) is holds


def allowed(budget: str, relative: Relative, *, not_slower: bool = False) -> bool:
    parsed = Budget.parse(budget)
    finalist = SimpleNamespace(
        relative=relative,
        realized=SimpleNamespace(program=SimpleNamespace(model=None)),
        candidate=SimpleNamespace(predicted={"flops": 1.0}),
    )
    builder = SimpleNamespace(
        original_latency_s=1.0, prepared=SimpleNamespace(original_cost=SimpleNamespace(flops=1.0))
    )
    request = SimpleNamespace(budget=parsed, minimize=parsed.objective(), not_slower=not_slower)
    return affordable(request, builder, finalist)
