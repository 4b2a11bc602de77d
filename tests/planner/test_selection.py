"""Finished programs on selection data: what is told, and how often anything runs for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stacked_model import WIDTH, stacked

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.planner import selection as module
from lamina.planner.selection import Selection
from lamina.quality import evaluate, get_metric

TARGET = Target.parse("ort:cpu?threads=1")
ORIGINAL = stacked(2)


def altered() -> Program:
    program = stacked(2)
    for value in program.graph.initializers.values():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.ndim == 2:
            value.const_value = type(value.const_value)(array * np.float32(1.02), name=value.name)  # type: ignore[misc]
    return program


class _Counting:
    """The real backend, and how often each model ran."""

    def __init__(self) -> None:
        self.runs: dict[int, int] = {}

    def compile(self, model: Any, target: Target) -> Any:
        real, runs = get_backend(TARGET).compile(model, target), self.runs

        def run(feeds: Any) -> Any:
            runs[id(model)] = runs.get(id(model), 0) + 1
            return real.run(feeds)

        return SimpleNamespace(run=run, input_names=real.input_names)


def scene(metric: Any = None) -> tuple[Selection, _Counting, Dataset]:
    x = np.random.default_rng(3).normal(size=(64, 6, WIDTH)).astype(np.float32)
    data, backend = Dataset({"x": x}, {}, 16), _Counting()
    request: Any = SimpleNamespace(
        splits=SimpleNamespace(selection=data),
        metric=get_metric(metric, ORIGINAL),
        backend=backend,
        draft=TARGET,
        program=ORIGINAL,
    )
    return Selection(request), backend, data


def size(outputs: dict[str, np.ndarray], data: Dataset) -> float:
    return float(np.abs(next(iter(outputs.values()))).mean())


@pytest.mark.parametrize("metric", [None, size])
def test_each_program_runs_once_and_scores_are_those_of_a_plain_evaluation(metric: Any) -> None:
    selection, backend, data = scene(metric)
    changed, same = altered(), ORIGINAL.clone()
    found = [selection.outcome(p) for p in (changed, same, changed)]
    assert {backend.runs[id(p.model)] for p in (ORIGINAL, changed, same)} == {4}
    assert found[0] == found[2]
    run, plain = (get_backend(TARGET).compile(p.model, TARGET).run for p in (changed, ORIGINAL))
    apart, task = get_metric(get_metric(metric, ORIGINAL).divergence, ORIGINAL), get_metric(metric, ORIGINAL)
    divergence = apart.score(evaluate(run, data, apart, reference_run=plain))
    scores = [task.score(evaluate(r, data, task, reference_run=plain)) for r in (plain, run)]
    assert found[0].divergence == pytest.approx(divergence, rel=1e-5)
    assert found[0].damage == pytest.approx(task.damage(*scores), rel=1e-5)
    assert abs(found[0].damage) > 1e-4
    assert found[1].divergence == pytest.approx(0, abs=1e-9)
    assert found[1].damage == pytest.approx(0, abs=1e-9)


def test_answers_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = scene()[0].outcome(altered())
    monkeypatch.setattr(module, "_KEPT", 2 * 16 * 6 * WIDTH * 4)  # two of four batches
    selection, backend, _ = scene()
    assert selection.outcome(altered()) == kept
    before = backend.runs[id(ORIGINAL.model)]
    selection.outcome(altered())
    assert backend.runs[id(ORIGINAL.model)] - before == 2
