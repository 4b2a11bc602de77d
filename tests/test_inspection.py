from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stacked_model import WIDTH, stacked

from lamina.analysis.metrics import FORWARD_METRICS, METRICS
from lamina.data import Dataset, load_data
from lamina.errors import BudgetError, DataError, PassError
from lamina.inspection import analyze
from lamina.ir.fx import MissingTorch
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.passes.measured import rounded
from lamina.passes.single_bits import bit_damages
from lamina.progress import Progress
from lamina.quality import get_metric

DEPTH = 3
PART_KEYS = {"name", "kind", "parameters", "flops", "latency_s", "metrics", "members", "options"}


def samples(rows: int = 24) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(8).normal(size=(rows, 5, WIDTH)).astype(np.float32)}


def outputs(program: Program, data: Dataset) -> dict[str, np.ndarray]:
    from lamina.backends import get_backend
    from lamina.backends.backend import Target

    aim = Target()
    run = get_backend(aim).compile(program.model, aim).run
    return dict(run(data.inputs))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    found: Any = analyze(stacked(DEPTH), samples(), target="ort:cpu?threads=1", damages=True, samples=8)
    return dict(found)


def test_every_key_the_json_promises(whole: dict[str, Any]) -> None:
    for kind in ("blocks", "branches", "operators"):
        assert whole[kind]
        for part in whole[kind]:
            assert set(part) >= PART_KEYS
            assert part["parameters"] >= 0
            assert part["latency_s"] is None or part["latency_s"] > 0
    assert whole["samples"] == {"all": 24, "looked": 8}
    assert json.loads(json.dumps(whole)) == whole


def test_metrics_are_named_by_their_ids(whole: dict[str, Any]) -> None:
    ids = {m.name for m in METRICS} | {"output-kl-w8", "output-kl-w4"}
    for kind in ("blocks", "branches", "operators"):
        for part in whole[kind]:
            assert set(part["metrics"]) <= ids
    assert "output-kl" in whole["branches"][0]["metrics"]
    assert "output-kl-w4" in whole["operators"][0]["metrics"]


def test_drop_damage_is_that_of_really_dropping(whole: dict[str, Any]) -> None:
    program = stacked(DEPTH)
    metric = get_metric(None, program)
    data = load_data(samples(), program).rows(np.array([1, 4, 7, 10, 13, 16, 19, 22]))
    assert whole["damages"]["metric"] == metric.name
    before = outputs(program, data)
    for branch in whole["branches"]:
        after = outputs(apply_drops(program, [branch["name"]]), data)
        truth = metric.score(metric.features(after, data, before))
        assert branch["metrics"]["output-kl"] == pytest.approx(truth, rel=1e-4)
        assert whole["damages"]["drop"][branch["name"]]["mean"] == branch["metrics"]["output-kl"]


def test_bit_damage_is_that_of_really_rounding(whole: dict[str, Any]) -> None:
    program = stacked(DEPTH)
    metric = get_metric(None, program)
    data = load_data(samples(), program).rows(np.array([1, 4, 7, 10, 13, 16, 19, 22]))
    before = outputs(program, data)
    weighted = [o for o in whole["operators"] if o["parameters"]]
    assert len(weighted) == 2 * DEPTH
    for operator in weighted:
        for bits in (8, 4):
            after = outputs(rounded(program, bits, {operator["name"]}), data)
            truth = metric.score(metric.features(after, data, before))
            assert operator["metrics"][f"output-kl-w{bits}"] == pytest.approx(truth, rel=1e-3)
    table = whole["matrices"]["output-kl"]
    assert table["columns"] == ["8", "4"]
    assert table["values"][0] == [weighted[0]["metrics"][f"output-kl-w{b}"] for b in (8, 4)]


def test_rounding_one_operator_leaves_the_others() -> None:
    program = stacked(2)
    changed = rounded(program, 2, {"up1"})
    for name, value in program.graph.initializers.items():
        same = np.array_equal(value.const_value.numpy(), changed.graph.initializers[name].const_value.numpy())
        assert same == (name != "wa1")


def test_bit_damages_in_parts_are_the_same_and_progress_counts_all() -> None:
    program = stacked(DEPTH)
    data, metric = load_data(samples(), program), get_metric(None, program)
    once = bit_damages(program, data, metric, (8, 4))
    told: list[tuple[int, int]] = []
    parts = bit_damages(
        program, data, metric, (8, 4), most_bytes=3 * 4 * WIDTH**2, progress=lambda d, t: told.append((d, t))
    )
    assert {n: {b: d.mean for b, d in row.items()} for n, row in parts.items()} == {
        n: {b: pytest.approx(d.mean, rel=1e-6) for b, d in row.items()} for n, row in once.items()
    }
    assert told[-1] == (2 * DEPTH * 2, 2 * DEPTH * 2)
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}


def test_matrices_are_those_of_the_statistics(whole: dict[str, Any]) -> None:
    names = [b["name"] for b in whole["branches"]] + ["end"]
    for name in ("angular-distance", "linear-cka"):
        table = whole["matrices"][name]
        assert table["rows"] == table["columns"] == names
        values = np.array(table["values"], dtype=float)
        assert values.shape == (DEPTH + 1, DEPTH + 1)
        assert np.allclose(values, values.T)
        assert np.allclose(np.diag(values), float(name == "linear-cka"))
    steps = np.diag(np.array(whole["matrices"]["angular-distance"]["values"]), 1)
    assert steps == pytest.approx([b["metrics"]["angular-distance"] for b in whole["branches"]], rel=1e-3)
    errors = whole["matrices"]["quantization-error"]
    column = errors["columns"].index("4")
    for row, values in zip(errors["rows"], errors["values"], strict=True):
        part = next(o for o in whole["operators"] if o["name"] == row)
        assert values[column] == part["metrics"]["quantization-error-w4"]


def test_options_are_the_planners_and_stand_at_their_parts(whole: dict[str, Any]) -> None:
    offers = {(o["transform"], o["part"]): o for o in whole["offers"]}
    for branch in whole["branches"]:
        assert offers["drop", branch["name"]]["options"] == ["drop"]
        assert branch["options"][0] == "drop"
        assert "w8a8-dynamic" in branch["options"]
    for operator in whole["operators"]:
        assert bool(operator["options"]) == (operator["kind"] == "MatMul")
        assert "drop" not in operator["options"]
    assert set(whole["blocks"][0]["options"]) == set(whole["branches"][0]["options"])


def test_no_options_on_request() -> None:
    found = analyze(stacked(1), samples(), options=False)
    assert found["offers"] == []
    assert found["branches"][0]["options"] == []


def test_only_the_metrics_asked_for() -> None:
    found = analyze(
        stacked(2), samples(), metrics=["block-influence", "quantization-error-w4"], options=False
    )
    assert [set(b["metrics"]) for b in found["branches"]] == [{"block-influence"}] * 2
    assert set(found["operators"][0]["metrics"]) == {"quantization-error-w4"}
    assert set(found["matrices"]) == {"quantization-error", "activation-error"}


def test_metrics_of_changed_programs_bring_pairs_and_skips() -> None:
    names = ["skip-effect", "hessian-interlayer", "residual-norm-risk"]
    found = analyze(stacked(DEPTH), samples(), metrics=names, samples=6, options=False)
    assert {"skip-effect", "residual-norm-risk"} <= set(found["branches"][0]["metrics"])
    assert len(found["pairs"]) == DEPTH
    table = found["matrices"]["skip-effect"]
    assert table["rows"] == [b["name"] for b in found["branches"]]
    assert table["columns"][-1] == "end"
    assert table["values"][1][0] is None  # skipping the second branch cannot reach before it


def test_gradients_have_errors_and_trace_each_drop() -> None:
    pytest.importorskip("torch")
    found = analyze(
        stacked(2), samples(), metrics=["gradient-trace"], gradients=True, samples=8, options=False
    )
    for operator in (o for o in found["operators"] if o["parameters"]):
        assert {"hawq-trace-w8", "hawq-trace-w4", "fisher-diagonal"} <= set(operator["metrics"])
        assert operator["metrics"]["hawq-trace-w4"] > operator["metrics"]["hawq-trace-w8"] > 0
        assert set(found["gradients"]["standard_errors"][operator["name"]]) == {
            "hawq-trace-w8",
            "hawq-trace-w4",
            "fisher-diagonal",
        }
    assert found["gradients"]["samples"] == 8
    for branch in found["branches"]:
        assert -1 <= branch["metrics"]["gradient-trace"] <= 1


def test_gradients_without_torch_say_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingTorch, match="torch") as stopped:
        analyze("there is no such model.onnx", samples(), gradients=True)
    assert stopped.value.advice == "pip install 'lamina[torch]'"


def test_without_data_there_are_costs_and_options() -> None:
    found = analyze(stacked(2))
    assert found["samples"] == {"all": 0, "looked": 0}
    assert found["matrices"] == {}
    assert all(not p["metrics"] for p in (*found["branches"], *found["operators"]))
    assert "drop" in found["branches"][0]["options"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": ["block-influenc"]}, PassError, "is unknown, did you mean block-influence"),
        ({"metrics": ["block-influence"], "data": None}, DataError, "metrics need samples"),
        ({"damages": True, "data": None}, DataError, "metrics need samples"),
        ({"bits": [1]}, DataError, "1 is no bit width"),
        ({"bits": []}, DataError, "there are no bit widths"),
        ({"samples": 0}, DataError, "0 samples cannot be looked at"),
        ({"target": "gpu:0"}, BudgetError, "gpu"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_loads(options: dict, error: type, message: str) -> None:
    given = {"data": samples(), **options}
    with pytest.raises(error, match=message):
        analyze("there is no such model.onnx", given.pop("data"), **given)


def test_an_earlier_call_still_works() -> None:
    import lamina
    from lamina.analysis.analyze import analyze as parts

    program, data = stacked(2), load_data(samples(), stacked(2))
    found = lamina.analyze(program, data)
    plain = parts(program, data)
    assert [b["metrics"] for b in found["branches"]] == [b["metrics"] for b in plain["branches"]]
    assert {m for b in found["branches"] for m in b["metrics"]} <= {m.name for m in FORWARD_METRICS}


def test_the_task_metric_is_read_from_the_samples() -> None:
    program = stacked(1)
    labelled = replace(load_data(samples(), program), extras={"labels": np.zeros((24, 5), dtype=np.int64)})
    assert analyze(program, labelled, options=False)["metric"] == "top1"
    assert analyze(program, samples(), options=False)["metric"] is None


class _Heard(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, list[tuple[int, int]]] = {}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.stages.setdefault(stage, []).append((done, total))


def test_long_stages_say_how_far_they_are() -> None:
    pytest.importorskip("torch")
    heard = _Heard()
    analyze(stacked(2), samples(), damages=True, gradients=True, samples=8, progress=heard)
    assert list(heard.stages) == ["capture", "statistics", "drops", "bits", "costs", "options", "gradients"]
    for stage in ("statistics", "drops", "bits", "gradients", "options"):
        steps = [(done, total) for done, total in heard.stages[stage] if total]
        assert steps[-2][0] == steps[-2][1]
        assert [done for done, _ in steps[:-1]] == sorted(done for done, _ in steps[:-1])
    assert set(heard.seconds) == set(heard.stages)


def test_options_go_to_the_branch_with_the_same_nodes_where_branches_nest() -> None:
    from lamina.inspection.places import place_offers
    from lamina.planner.offers import Offer

    def part(name: str, members: list[str], parameters: int = 0) -> dict[str, Any]:
        return {"name": name, "members": members, "parameters": parameters, "options": []}

    found: Any = {
        "branches": [part("inner", ["b", "c"]), part("outer", ["a", "b", "c", "d"])],
        "operators": [part(n, [], 1) for n in "abcd"],
        "blocks": [],
    }
    given = [
        Offer("drop", "renamed", "mlp", ("b", "c", "new"), ("drop",), True),
        Offer("drop", "outer", "mlp", ("a", "b", "c", "d"), ("drop",), True),
        Offer("quantize", "c", "matmul", ("c",), ("w8",), False),
        Offer("quantize", "folded", "matmul", ("new",), ("w4",), False),
    ]
    assert place_offers(found, given) == ["inner", "outer", "c", None]
    assert [b["options"] for b in found["branches"]] == [["drop", "w8"], ["drop", "w8"]]
