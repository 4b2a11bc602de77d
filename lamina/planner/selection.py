"""Damage of finished programs on selection data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.backends.backend import run_of
from lamina.ir.program import Program
from lamina.planner.builder import Builder
from lamina.planner.request import Request
from lamina.quality import evaluate


def damages(request: Request, builder: Builder, programs: Sequence[Program]) -> list[float]:
    """How much worse each program is than the original, in the metric's damage unit.

    The original is scored once a run; where the metric compares with its outputs it runs beside each program.
    """
    metric, data = request.metric, request.splits.selection
    original = request.backend.compile(request.program.model, request.draft).run
    reference = original if metric.kind == "divergence" else None
    if builder.selection_score is None:
        found = evaluate(original, data, metric, reference_run=reference)
        builder.selection_score = metric.score(found)
    before = builder.selection_score

    def score(program: Program) -> float:
        run = run_of(request.backend.compile(program.model, request.draft))
        return metric.score(evaluate(run, data, metric, reference_run=reference))

    return [metric.damage(before, score(program)) for program in programs]


def few_samples(request: Request) -> Mapping[str, np.ndarray]:
    """Inputs a user gave (or that were made up where none were given), as few as the model takes."""
    selection = request.splits.selection
    return next(selection.rows(slice(0, selection.fixed_batch or 2)).batches()).inputs
