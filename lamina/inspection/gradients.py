"""Gradient metrics, written to the parts they rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.analysis.analyze import AnalysisResult
from lamina.analysis.gradients import GRADIENT_METRICS, GradientResult, gradient_metrics
from lamina.data import Dataset
from lamina.inspection.wanted import GRADIENT_TRACE, Wanted
from lamina.ir.program import Program
from lamina.passes.single_drops import drop_variants
from lamina.progress import Progress


def rate_gradients(
    program: Program,
    few: Dataset | None,
    found: AnalysisResult,
    wanted: Wanted,
    bits: Sequence[int],
    progress: Progress,
) -> dict[str, Any]:
    """Put gradient metrics into the parts; what was done to get them."""
    if few is None or not wanted.gradients:
        return {}
    told: dict[str, Any] = {"standard_errors": {}}
    names = [name for name in wanted.gradients if name in GRADIENT_METRICS]
    if names:
        with progress.stage("gradients"):
            result = gradient_metrics(
                program,
                few,
                names,
                bits,
                samples=few.samples,
                progress=lambda done, total: progress.update("gradients", done, total),
            )
        facts = ("loss", "curvature", "samples", "draws", "seconds")
        told |= {name: getattr(result, name) for name in facts}
        told["standard_errors"] = _rate(found, result)
    if GRADIENT_TRACE in wanted.gradients:
        with progress.stage("traces"):
            _rate_traces(program, few, found, progress)
    return told


def _rate(found: AnalysisResult, result: GradientResult) -> dict[str, dict[str, float]]:
    """Of an operator with two weights: hawq-trace adds up, fisher-diagonal is the mean over all elements."""
    parts = {part["name"]: part for part in found["operators"]}
    errors: dict[str, dict[str, float]] = {}
    elements: dict[str, int] = {}
    for entry in result.operators:
        name = entry.operator.name
        before, known, error = elements.get(name, 0), parts[name]["metrics"], errors.setdefault(name, {})
        elements[name] = before + entry.parameters
        for width, estimate in entry.hawq.items():
            key = f"hawq-trace-w{width}"
            known[key] = known.get(key, 0.0) + estimate.mean
            error[key] = (error.get(key, 0.0) ** 2 + estimate.standard_error**2) ** 0.5
        if entry.fisher is not None:
            key, share = "fisher-diagonal", entry.parameters / elements[name]
            known[key] = known.get(key, 0.0) * (1 - share) + entry.fisher.mean * share
            parts_of = (error.get(key, 0.0) * (1 - share), entry.fisher.standard_error * share)
            error[key] = (parts_of[0] ** 2 + parts_of[1] ** 2) ** 0.5
    return errors


def _rate_traces(program: Program, few: Dataset, found: AnalysisResult, progress: Progress) -> None:
    """``gradient-trace`` of the program without each branch: how alike its gradients still are."""
    from lamina.analysis.gradient_trace import gradient_trace

    parts = {part["name"]: part for part in found["branches"]}
    variants = drop_variants(program)
    for number, (name, variant) in enumerate(variants.items(), start=1):
        trace = gradient_trace(program, variant, few, samples=few.samples)
        parts[name]["metrics"][GRADIENT_TRACE] = trace.score
        progress.update("traces", number, len(variants))
