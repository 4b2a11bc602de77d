"""The registry is documented: in docstrings, on the page, and each metric has its definition test."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lamina.analysis import gradient_trace, gradients, redundancy, sensitivity, weight_error
from lamina.analysis.descriptions import DESCRIPTIONS, GRADIENT_DESCRIPTIONS, SAMPLING
from lamina.analysis.metrics import METRICS, Metric
from lamina.analysis.needs import Need

# Metric -> the test that computes it in float64 from its definition.
DEFINITIONS = {
    "block-influence": "metrics::a_branch_metric_is_its_definition",
    "branch-similarity": "metrics::a_branch_metric_is_its_definition",
    "relative-contribution": "metrics::a_branch_metric_is_its_definition",
    "angular-distance": "metrics::a_branch_metric_is_its_definition",
    "layer-input-modification": "metrics::a_branch_metric_is_its_definition",
    "void-rate": "residual::voids_are_short_lengthenings_of_their_token",
    "entropy-increase": "metrics::entropy_increase_is_its_definition",
    "direct-matching": "metrics::direct_matching_is_the_residual_of_least_squares",
    "linear-cka": "metrics::linear_cka_is_its_definition",
    "representation-quality": "metrics::representation_quality_is_the_entropy_of_the_token_gram",
    "attention-rank": "attention::the_rank_is_that_of_the_map",
    "outlier-weight-count": "inputs::outlier_weight_count_is_its_definition",
    "quantization-error-w8": "inputs::the_output_error_of_a_rounded_kernel_is_that_of_running_it",
    "quantization-error-w4": "inputs::the_output_error_of_a_rounded_kernel_is_that_of_running_it",
    "lieq-diagnostics": "metrics::lieq_adds_normalised_terms",
    "output-kl": "single_drops::damages_are_those_of_the_dropped_programs",
    "skip-effect": "single_drops::skip_effect_is_its_definition_at_every_later_depth",
    "hessian-interlayer": "single_drops::interactions_are_what_the_sum_of_damages_misses",
    "residual-norm-risk": "metrics::residual_norm_risk_is_the_rank_correlation_with_the_losses",
    "hawq-trace": "gradients::hawq_is_trace_over_elements_times_quantization_error",
    "fisher-diagonal": "gradients::fisher_is_the_mean_of_squared_sample_gradients",
    "gradient-trace": "gradients::gradient_trace_is_the_correlation_of_gradients",
}


def test_every_metric_is_described() -> None:
    names = [m.name for m in METRICS]
    assert sorted(DESCRIPTIONS) == sorted(names)
    assert set(GRADIENT_DESCRIPTIONS) == {*gradients.GRADIENT_METRICS, "gradient-trace"}
    assert set(SAMPLING) == set(Need)
    for text in (*DESCRIPTIONS.values(), *GRADIENT_DESCRIPTIONS.values()):
        assert text.what and text.formula and text.range and text.cost  # noqa: PT018
        assert "|" not in text.what + text.formula + text.range + text.cost


def test_the_page_is_what_the_registry_says() -> None:
    from tools.metrics_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.metrics_page"


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_a_docstring_gives_formula_shapes_range_direction_and_paper(metric: Metric) -> None:
    name = metric.name.replace("-", "_")
    function = getattr(redundancy, name, None) or getattr(sensitivity, name, None)
    if metric.name.startswith("quantization-error"):
        function = weight_error.output_error_at
    text = inspect.getdoc(function)
    assert text
    assert re.search(r"``[^`]*[(=/-][^`]*``", text), "formula"
    assert re.search(r"\[[a-z, ]+\]", text), "shapes"
    assert re.search(r"[Rr]ange:? ", text), "range"
    assert re.search(r"(higher|lower|LOWER|[Ff]ar from 0) =", text), "direction"
    assert re.search(r"arXiv:\d{4}\.\d{5}|[Ss]tandard definition", text), "paper"
    cited = re.search(r"arXiv:\d{4}\.\d{5}", metric.source)
    assert cited is None or cited.group() in text


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *GRADIENT_DESCRIPTIONS])
def test_a_metric_is_tested_against_its_definition(name: str) -> None:
    module, test = DEFINITIONS[name].split("::")
    folder = Path(__file__).parents[1] / ("passes" if module == "single_drops" else "analysis")
    text = (folder / f"test_{module}.py").read_text(encoding="utf-8")
    assert f"\ndef test_{test}(" in text


def test_gradient_docstrings_give_direction_and_paper() -> None:
    for text in (gradients.gradient_metrics.__doc__, gradient_trace.gradient_trace.__doc__):
        assert text
        assert "igher =" in text
        assert "Source:" in text
