"""The contest of the depth study: who may take what, and the page of what was measured."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stacked_model import WIDTH, stacked
from tiny import shorten_timing

from lamina.backends.backend import Target
from lamina.ir.io import save_model
from lamina.planner.timing import Stopwatch
from lamina.report.drawing import svg
from tools.bench.cases import Case
from tools.studies.depth.contest import MIX, asked, contest, made_ready
from tools.studies.depth.contest_page import decided, page, verdict
from tools.studies.depth.contest_plot import plot, points


def _plan(latency: float, damage: float, site: str, mended: float | None = None) -> dict[str, Any]:
    facts = {
        "latency": latency,
        "latency_spread": [latency - 0.01, latency + 0.01],
        "damage": damage,
        "damage_ci95": [damage - 0.01, damage + 0.01],
        "divergence": 0.5,
        "moves": {"drop": 1},
        "sites": [site],
    }
    repaired = {"damage": mended, "damage_ci95": [mended, mended]} if mended is not None else None
    return facts if repaired is None else facts | {"compensated": repaired}


def _model(minus: tuple[float, float, float]) -> dict[str, Any]:
    plans = [
        {
            "name": "balanced-skip",
            "plan": _plan(0.7, 0.05, "a", 0.02),
            "planner_minus": [-0.04, -0.05, -0.03],
        },
        {"name": "static-skip-map", "plan": _plan(0.69, 0.02, "b"), "planner_minus": list(minus)},
        {"name": "subgraph-drop", "plan": None},
        {"name": "planner", "plan": _plan(0.68, 0.01, "c", 0.005), "planner_minus": [0.0, 0.0, 0.0]},
    ]
    claim = {"first": "only attention", "second": "only mlp", "first_minus_second": [-0.02, -0.03, -0.01]}
    return {
        "model": "net",
        "metric": "top1",
        "divergence": "kl",
        "base_latency": 0.9,
        "original": {"report": 0.8},
        "n": {"calibration": 1, "selection": 2, "report": 3},
        "seconds": 5,
        "alone": {"attention": {"n": 2, "median": 0.2, "least": 0.1, "most": 0.3}},
        "levels": [{"share": 0.8, "level": 0.72, "plans": plans, "claims": [claim]}],
    }


@pytest.mark.parametrize(
    ("minus", "word"),
    [
        ((-0.01, -0.02, -0.001), "better"),
        ((0.0, -0.01, 0.01), "not told apart"),
        ((0.02, 0.01, 0.03), "**worse**"),
    ],
)
def test_the_planner_is_held_against_the_best_other_by_its_interval(minus, word):
    text = page([_model(minus)])
    (row,) = [line for line in text.splitlines() if line.startswith("| net | 0.8 | 0.680")]
    assert row.endswith(f"| {word} |")
    assert "| static-skip-map | 0.690 |" in row  # the one with least damage


def test_a_plan_that_a_rule_shares_with_the_planner_is_told_once():
    model = _model((0.0, 0.0, 0.0))
    plans = model["levels"][0]["plans"]
    plans[1]["plan"] = plans[3]["plan"]
    text = page([model])
    assert "| same plan |" in text
    assert "static-skip-map, planner" in text


@pytest.mark.parametrize(
    ("signs", "word"),
    [
        ([], "not testable"),
        ([0, 0], "not told apart"),
        ([-1, 0], "reproduced"),
        ([1, 0], "not reproduced"),
        ([1, -1], "not reproduced: depends on the model"),
    ],
)
def test_a_claim_is_reproduced_where_no_model_contradicts_it(signs, word):
    assert verdict(signs) == word


def test_an_interval_that_holds_zero_decides_nothing():
    assert [decided(i) for i in ([-1, -2, -0.5], [1, -1, 2], [1, 0.5, 2], None)] == [-1, 0, 1, 0]


def test_the_plot_has_a_line_a_contender_and_marks_what_was_compensated():
    model = _model((0.0, 0.0, 0.0))
    assert points(model)["planner"] == ([(0.68, 0.01)], [(0.68, 0.005)])
    assert "subgraph-drop" not in points(model)
    root = ElementTree.fromstring(svg(plot(model)))
    sides = [e.get("width") for e in root.iter() if e.tag.endswith("rect")]
    assert sides.count("6") == 6  # three plans and three names
    assert sides.count("3") == 2


def _rows(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(32, 6, WIDTH)).astype(np.float32)}


def test_a_contest_scores_every_contender_on_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    shorten_timing(monkeypatch)
    path = tmp_path / "stack.onnx"
    save_model(stacked(5).model, path)
    parts = {name: _rows(seed) for seed, name in enumerate(("calibration", "selection", "report"))}
    case = Case("stack", str(path), "relative-l2", lambda: dict(parts), "1x6", 16)
    request = asked(case, 0.5, ("drop", "direct-matching"))
    options = argparse.Namespace(shares=[0.7], mend=0.5, mended=8, timing=0.1)
    timed = request.backend, Target.parse("ort:cpu?threads=1"), request.workload, request.program.model
    with Stopwatch(*timed, tmp_path) as stopwatch:
        ready = made_ready(case, request, stopwatch, 24)
        # times of a model this small are noise: take whatever was built as fast enough
        monkeypatch.setattr("tools.studies.depth.contest.affordable", lambda *_: True)
        first, *_, found = contest(ready, options, lambda note: None)
    assert not any("compensated" in (p["plan"] or {}) for p in first["levels"][0]["plans"])
    (level,) = found["levels"]
    plans = {p["name"]: p for p in level["plans"]}
    assert {MIX, "drop alone", "direct-matching alone", "greedy-output-divergence"} <= set(plans)
    assert plans[MIX]["plan"] is not None
    assert plans[MIX]["planner_minus"][0] == 0
    for name, contender in plans.items():
        plan = contender["plan"]
        if plan is not None:
            cheap = " " not in name and not name.startswith("greedy")  # measured however short the time
            assert not cheap or plan["selection_damage"] >= plans[MIX]["plan"]["selection_damage"] - 1e-9
            assert plan["sites"]
    assert found["n"] == {"calibration": 32, "selection": 32, "report": 24}
    assert "| stack | 0.7 |" in page([found])
