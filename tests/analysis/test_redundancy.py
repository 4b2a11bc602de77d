from __future__ import annotations

import numpy as np
import pytest
from residual_model import direct, residual_data, residual_program

from lamina.analysis.redundancy import METRICS, get_metric, rank, scores
from lamina.analysis.statistics import BranchProbe, BranchStatistics, Statistics, collect
from lamina.errors import PassError


def _definitions(x: np.ndarray, body: np.ndarray) -> dict[str, float]:
    """Each metric from its formula, token by token, in float64."""
    cosines, ratios, angles = [], [], []
    for sample_x, sample_body in zip(x, body, strict=True):
        for t, (a, f) in enumerate(zip(sample_x, sample_body, strict=True)):
            b = a + f
            cosine = float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b))
            cosines.append(cosine)
            ratios.append(float(np.sqrt(f @ f) / np.sqrt(a @ a)))
            if t == len(sample_x) - 1:
                angles.append(np.arccos(cosine) / np.pi)
    return {
        "block-influence": 1 - float(np.mean(cosines)),
        "branch-similarity": float(np.mean(cosines)),
        "relative-contribution": float(np.mean(ratios)),
        "angular-distance": float(np.mean(angles)),
    }


@pytest.mark.parametrize("metric", [m.name for m in METRICS])
def test_metric_is_its_definition(metric: str) -> None:
    program, data = residual_program(), residual_data(12)
    statistics = collect(program, data, branches=[BranchProbe("b", "x", "body", "sum")], threads=1)
    values = direct(program, data)
    expected = _definitions(values["x"], values["body"])
    assert scores(statistics, metric) == {"b": pytest.approx(expected[metric], rel=1e-5)}


def _three() -> Statistics:
    def branch(name: str, cosine: float, norm: float, angle: float) -> BranchStatistics:
        return BranchStatistics(name, 2, 10, 2, cosine, norm, angle)

    parts = [branch("a", 0.9, 0.3, 0.2), branch("b", 0.5, 1.0, 0.4), branch("c", 0.99, 0.1, 0.1)]
    return Statistics(2, branches={p.name: p for p in parts})


@pytest.mark.parametrize("metric", [m.name for m in METRICS])
def test_every_direction_ranks_the_least_change_first(metric: str) -> None:
    assert rank(_three(), metric) == ["c", "a", "b"]


def test_directions_are_stated() -> None:
    assert {m.name: m.direction for m in METRICS} == {
        "block-influence": "important",
        "branch-similarity": "redundant",
        "relative-contribution": "important",
        "angular-distance": "important",
    }


def test_an_unknown_metric_says_what_there_is() -> None:
    with pytest.raises(PassError) as error:
        get_metric("vibes")
    assert str(error.value) == (
        "redundancy metric 'vibes' is unknown\n"
        "  choose one of block-influence, branch-similarity, relative-contribution, angular-distance"
    )
