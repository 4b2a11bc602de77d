"""Budgets: the grammar, what it refuses and how, objectives, and bounds held against measurements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.budget import AXES, EXAMPLE, Bound, Budget
from lamina.errors import BudgetError
from lamina.quality.divergence import KlDivergence
from lamina.quality.task import CrossEntropy, Perplexity, Top1


def one(text: str) -> Bound:
    (bound,) = Budget.parse(text).bounds
    return bound


@pytest.mark.parametrize(
    ("text", "axis", "value", "unit"),
    [
        ("latency<=0.5x", "latency", 0.5, "x"),
        ("latency<=4ms", "latency", 4e-3, "s"),
        ("latency<=400us", "latency", 4e-4, "s"),
        ("latency<=400µs", "latency", 4e-4, "s"),
        ("latency <= 1.5 s", "latency", 1.5, "s"),
        ("latency<4ms", "latency", 4e-3, "s"),
        ("latency=4ms", "latency", 4e-3, "s"),
        ("latency≤4ms", "latency", 4e-3, "s"),
        ("LATENCY<=.5X", "latency", 0.5, "x"),
        ("size<=0.3x", "size", 0.3, "x"),
        ("size<=10KB", "size", 1e4, "bytes"),
        ("size<=10MB", "size", 1e7, "bytes"),
        ("size<=10GB", "size", 1e10, "bytes"),
        ("size<=10KiB", "size", 10240, "bytes"),
        ("size<=10MiB", "size", 10 * 2**20, "bytes"),
        ("size<=1GiB", "size", 2**30, "bytes"),
        ("memory<=200MB", "memory", 2e8, "bytes"),
        ("flops<=0.5x", "flops", 0.5, "x"),
        ("flops<=2G", "flops", 2e9, "flops"),
        ("flops<=2GFLOPs", "flops", 2e9, "flops"),
        ("flops<=3e6", "flops", 3e6, "flops"),
        ("drop<=1%", "drop", 0.01, "%"),
        ("drop<=0.05", "drop", 0.05, "metric"),
    ],
)
def test_a_bound_is_read(text: str, axis: str, value: float, unit: str) -> None:
    bound = one(text)
    assert (bound.axis, bound.unit, bound.relative) == (axis, unit, unit == "x")
    assert bound.value == pytest.approx(value)


def test_all_axes_together_and_back() -> None:
    budget = Budget.parse(EXAMPLE)
    assert [b.axis for b in budget.bounds] == list(AXES)
    assert str(budget) == EXAMPLE
    assert Budget.parse(str(budget)) == budget


def test_keywords_text_and_constructor_are_alike() -> None:
    text = Budget.parse("latency<=0.5x, drop<=1%")
    assert Budget.parse(None, latency="0.5x", drop="1%") == text
    assert Budget.parse("latency<=0.5x", drop="1%") == text
    assert Budget(latency="0.5x", drop="1%") == text
    assert Budget.parse(text) == text
    assert Budget.parse(Budget(latency="0.5x"), drop="1%", size=None) == text


def test_numbers_are_keywords_where_they_have_a_unit() -> None:
    assert Budget.parse(drop=0.02).bound("drop") == Bound("drop", 0.02, "metric")
    with pytest.raises(BudgetError, match="the limit on latency has no unit"):
        Budget.parse(latency=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the budget is empty"),
        (" , ", "the budget is empty"),
        ("latency<=0x", "must be a positive number like 0.5x or 4ms, not '0x'"),
        ("latency<=-1ms", "must be a positive number like 0.5x or 4ms, not '-1ms'"),
        ("size<=nan", "must be a positive number like 0.3x or 10MB, not 'nan'"),
        ("size<=infMB", "must be a positive number"),
        ("size<=1e999MB", "must be a positive number"),
        ("drop<=", "must be a positive number like 1% or 0.05, not ''"),
        ("drop<=0%", "must be a positive number"),
        ("speed<=2x", "'speed' is not something a budget can limit"),
        ("latncy<=2x", "did you mean latency"),
        ("size<=10", "the limit on size has no unit: write 0.3x or 10MB"),
        ("latency<=4MB", "'MB' is not a unit of latency: write 0.5x or 4ms"),
        ("latency<=50%", "'%' is not a unit of latency"),
        ("drop<=0.5x", "'x' is not a unit of drop: write 1% or 0.05"),
        ("flops<=2parsecs", "'parsecs' is not a unit of flops"),
        ("latency>=0.5x", "a budget limits from above"),
        ("fast please", "'fast please' is not a limit"),
        ("latency<=0.5x, latency<=4ms", "latency is limited twice"),
    ],
)
def test_what_is_not_a_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert message in str(caught.value)
    assert "drop<=1%" in str(caught.value), "every refusal shows how to write one"


def test_a_refusal_says_what_was_understood() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("latency<=0.5x, size<=ten")
    assert str(caught.value) == (
        "the limit on size must be a positive number like 0.3x or 10MB, not 'ten'\n"
        "  at budget 'size<=ten'\n"
        f"  understood so far: latency<=0.5x; write it like '{EXAMPLE}'"
    )


def test_keyword_refusals() -> None:
    with pytest.raises(BudgetError, match="drop is limited twice"):
        Budget.parse("drop<=1%", drop="2%")
    with pytest.raises(BudgetError, match="'speed' is not something"):
        Budget.parse(speed="2x")
    with pytest.raises(BudgetError, match="the budget is empty"):
        Budget()
    with pytest.raises(BudgetError, match="a budget is text, not int"):
        Budget.parse(3)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="cannot be"):
        Budget(latency=Bound("size", 1.0, "bytes"))
    with pytest.raises(BudgetError, match="cannot be"):
        Budget(latency=Bound("latency", math.nan, "s"))


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_never_worse(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert Budget.parse(str(budget)) == budget


@given(st.floats(1e-6, 1e6), st.sampled_from(["x", "ms", "us", "s"]))
def test_written_bounds_survive(number: float, unit: str) -> None:
    budget = Budget.parse(f"latency<={number!r}{unit}")
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "minimize", "expected"),
    [
        ("latency<=0.5x", None, "damage"),
        ("latency<=0.5x, size<=1MB", None, "damage"),
        ("drop<=1%", None, "latency"),
        ("drop<=1%", "size", "size"),
        ("drop<=1%", "flops", "flops"),
        ("latency<=0.5x, drop<=1%", None, "latency"),
        ("latency<=0.5x, drop<=1%", "size", "size"),
        ("latency<=0.5x, drop<=1%", "damage", "damage"),
    ],
)
def test_objective(text: str, minimize: str | None, expected: str) -> None:
    assert Budget.parse(text).objective(minimize) == expected


@pytest.mark.parametrize(
    ("text", "minimize", "message"),
    [
        ("drop<=1%", "speed", "minimize='speed' is unknown"),
        ("drop<=1%", "damage", "needs a limit on a cost"),
        ("latency<=0.5x", "size", "needs a limit on the drop"),
    ],
)
def test_objectives_without_a_counterweight_are_refused(text: str, minimize: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text).objective(minimize)


@pytest.mark.parametrize(
    ("drop", "metric", "score", "allowed"),
    [
        ("1%", Top1("y"), 0.9, 0.01),
        ("0.02", Top1("y"), 0.9, 0.02),
        ("1%", CrossEntropy("y"), 1.5, 0.01),
        ("0.03", CrossEntropy("y"), 1.5, 0.02),
        ("0.09", Perplexity("y"), 4.5, 0.02),
        ("1%", None, 0.0, 0.01),
        ("0.02", None, 0.0, 0.02),
        ("1%", KlDivergence("y"), 0.0, 0.01),
        ("0.02", KlDivergence("y"), 0.0, 0.02),
    ],
)
def test_allowed_damage_is_in_the_unit_of_damage(
    drop: str, metric: Top1 | None, score: float, allowed: float
) -> None:
    assert Budget(drop=drop).allowed_damage(metric, score) == pytest.approx(allowed)


def test_a_bare_number_allows_exactly_that_much_loss() -> None:
    metric, original = CrossEntropy("y"), 1.5
    allowed = Budget(drop="0.03").allowed_damage(metric, original)
    assert metric.damage(original, 1.53) == pytest.approx(allowed)


def test_without_a_drop_bound_any_damage_is_allowed() -> None:
    assert Budget(latency="0.5x").allowed_damage(Top1("y"), 0.9) == math.inf


def test_met_compares_every_bound() -> None:
    budget = Budget.parse("latency<=0.5x, size<=10MB, memory<=0.5x, flops<=2G, drop<=1%")
    original = {"latency_s": 0.010, "size_bytes": 40e6, "peak_memory_bytes": 100, "flops": 4e9}
    optimized = {"latency_s": 0.004, "size_bytes": 11e6, "peak_memory_bytes": 50, "flops": 2.1e9}
    met = budget.met(original, optimized, 0.004)
    assert met["latency"] == (True, 0.004, 0.005)
    assert met["size"] == (False, 11e6, 10e6)
    assert met["memory"] == (True, 50, 50)
    assert met["flops"] == (False, 2.1e9, 2e9)
    assert met["drop"] == (True, 0.004, 0.01)
    assert [axis for axis, check in met.items() if not check.met] == ["size", "flops"]


def test_met_takes_axis_names_and_a_converted_drop() -> None:
    met = Budget.parse("latency<=3ms, drop<=0.03").met(
        {"latency": 1.0}, {"latency": np.float64(0.002)}, 0.021, allowed_damage=0.02
    )
    assert met["latency"].met
    assert met["drop"] == (False, 0.021, 0.02)


def test_what_was_not_measured_is_not_met() -> None:
    met = Budget.parse("latency<=0.5x, memory<=1GB").met({}, {"peak_memory_bytes": None}, 0.0)
    assert not met["latency"].met
    assert not met["memory"].met


def test_nan_damage_is_not_met() -> None:
    assert not Budget(drop="1%").met({}, {}, math.nan)["drop"].met
