"""lamina.fold and `lamina fold`: the same kind out, proven by execution, nothing overwritten by accident."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import lamina
from lamina.cli import main
from lamina.errors import CaptureError, DataError, OutputError, PassError
from lamina.folding import run_fold
from lamina.ir import verify
from lamina.ir.rewriter import Rewriter
from lamina.passes.fold import catalog, pipeline
from lamina.passes.pass_ import Exact, Fold


def messy() -> onnx.ModelProto:
    """Identities, a computed constant, a shape read at run time, an equal subexpression."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["x"], ["i"], name="identity"),
        helper.make_node("MatMul", ["i", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="second"),
        helper.make_node("Add", ["one", "one"], ["two"], name="constant"),
        helper.make_node("Mul", ["a", "two"], ["c"], name="scale"),
        helper.make_node("Relu", ["c"], ["d"], name="relu"),
        helper.make_node("Add", ["d", "b"], ["e"], name="sum"),
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Reshape", ["e", "s"], ["y"], name="reshape"),
    ]
    graph = helper.make_graph(
        nodes,
        "messy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(8, np.float32), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


def test_a_proto_in_is_a_proto_out_and_stays_as_it_was():
    before = messy()
    kept = before.SerializeToString()
    after = lamina.fold(before)
    assert isinstance(after, onnx.ModelProto)
    assert before.SerializeToString() == kept
    assert len(after.graph.node) < len(before.graph.node)
    np.testing.assert_allclose(run(after, X), run(before, X), rtol=1e-5, atol=1e-5)


def test_an_ir_model_in_is_an_ir_model_out_and_stays_as_it_was():
    before = ir.from_proto(messy())
    text = str(before)
    after = lamina.fold(before)
    assert isinstance(after, ir.Model)
    assert str(before) == text
    assert len(after.graph) < len(before.graph)


def test_a_path_in_is_a_path_out(tmp_path: Path):
    onnx.save(messy(), tmp_path / "in.onnx")
    kept = (tmp_path / "in.onnx").read_bytes()
    written = lamina.fold(tmp_path / "in.onnx", output=tmp_path / "out.onnx")
    assert written == tmp_path / "out.onnx"
    assert (tmp_path / "in.onnx").read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]
    np.testing.assert_allclose(run(written, X), run(messy(), X), rtol=1e-5, atol=1e-5)


def test_a_path_without_output_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(OutputError, match=r"folding '.*none\.onnx' needs the name of the file to write"):
        lamina.fold(tmp_path / "none.onnx")


def test_the_output_may_name_the_input(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(messy(), path)
    lamina.fold(str(path), output=str(path))
    assert len(onnx.load(path).graph.node) < len(messy().graph.node)
    np.testing.assert_allclose(run(path, X), run(messy(), X), rtol=1e-5, atol=1e-5)


def test_the_result_is_the_same_every_time_and_folding_it_again_does_nothing():
    first, second = lamina.fold(messy()), lamina.fold(messy())
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    assert run_fold(first).names == ()


def test_dynamic_dims_stay_dynamic_and_fixed_ones_fold_the_shape_arithmetic():
    free = run_fold(messy())
    fixed = run_fold(messy(), shapes={"b": 3})
    assert free.program.inputs[0].shape == ("b", 8)
    assert fixed.program.inputs[0].shape == (3, 8)
    assert fixed.program.outputs[0].shape == (3, 8)
    assert {n.op_type for n in fixed.program.graph}.isdisjoint({"Shape"})
    assert fixed.check.equal
    np.testing.assert_allclose(
        run(ir.to_proto(fixed.program.model), X), run(messy(), X), rtol=1e-5, atol=1e-5
    )
    by_input = run_fold(messy(), shapes={"x": [3, None]})
    assert by_input.program.fingerprint == fixed.program.fingerprint


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"nope": 3}, "'nope' is no input and no dynamic dim"),
        ({"x": [3]}, "input 'x' has 2 dims, 1 were given"),
        ({"x": [3, 9]}, "dim 1 of input 'x' is 8, 9 was given"),
        ({"b": 0}, "'b' was given the size 0"),
        ({"x": [3, 8], "b": 4}, "dynamic dim 'b' was given as 3 and as 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        lamina.fold(messy(), shapes=shapes)


def test_only_the_named_folds_run():
    found = run_fold(messy(), only=["eliminate-identities"])
    assert found.names == ("eliminate_identities",)
    with pytest.raises(PassError, match="no fold is called 'nonsense'"):
        lamina.fold(messy(), only=["nonsense"])


class Wrong(Fold):
    """Turn every Relu into a Tanh: whole, valid, and another function."""

    name = "wrong"
    effect: ClassVar[Any] = Exact()

    def idle(self, model: ir.Model) -> bool:
        return not any(n.op_type == "Relu" for n in model.graph)

    def apply(self, rewriter: Rewriter) -> None:
        for node in list(rewriter.graph):
            if node.op_type == "Relu":
                old = node.outputs[0]
                new = rewriter.at(node).op("Tanh", [node.inputs[0]], dtype=old.dtype, shape=old.shape)
                rewriter.replace_uses(old, new)
                rewriter.remove([node])
                rewriter.record("wrong", node.name or "", "Relu became Tanh")


@pytest.fixture
def wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog whose third fold is wrong."""
    real = catalog.load

    def load(name: str) -> Fold:
        return Wrong() if name == "drop_redundant_relu" else real(name)

    for module in (pipeline, catalog, lamina.folding):
        monkeypatch.setattr(module, "load", load)


@pytest.mark.usefixtures("wrong_pass")
def test_a_pass_that_changes_the_function_is_named_and_left_out():
    found = run_fold(messy())
    assert found.check.equal
    assert [entry["pass"] for entry in found.undone] == ["wrong"]
    assert "differs by" in found.undone[0]["reason"]
    assert "drop_redundant_relu" not in found.names
    assert "fold_constants" in found.names
    operators = {n.op_type for n in found.program.graph}
    assert "Relu" in operators
    assert "Tanh" not in operators


@pytest.mark.usefixtures("wrong_pass")
def test_a_file_is_read_again_after_a_pass_that_spoiled_the_first_reading(tmp_path: Path):
    path = tmp_path / "in.onnx"
    onnx.save(messy(), path)
    before = path.read_bytes()
    found = run_fold(path)
    found.save(path)  # the same file
    assert [entry["pass"] for entry in found.undone] == ["wrong"]
    assert lamina.compare(messy(), path).equal
    assert path.read_bytes() == found.message
    assert found.report()["bytes"] == {"before": len(before), "after": path.stat().st_size}


@pytest.mark.usefixtures("wrong_pass")
def test_a_file_that_changes_while_it_is_folded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "in.onnx"
    onnx.save(messy(), path)

    class Meddling(Wrong):
        def apply(self, rewriter: Rewriter) -> None:
            super().apply(rewriter)
            path.write_bytes(path.read_bytes() + b"\0")

    monkeypatch.setitem(globals(), "Wrong", Meddling)
    with pytest.raises(CaptureError, match="was changed"):
        run_fold(path)


@pytest.mark.parametrize("kind", ["path", "proto", "ir"])
def test_what_was_given_is_not_changed(kind: str, tmp_path: Path):
    path = tmp_path / "in.onnx"
    onnx.save(messy(), path)
    given: Any = {"path": path, "proto": messy(), "ir": ir.from_proto(messy())}[kind]
    found = run_fold(given, shapes={"b": 3})
    assert found.report()["nodes"] == {"before": 9, "after": len(list(found.program.graph))}
    whole = onnx.load(path) if kind == "path" else given if kind == "proto" else ir.to_proto(given)
    assert [n.SerializeToString() for n in whole.graph.node] == [
        n.SerializeToString() for n in messy().graph.node
    ]


class Misshaped(Wrong):
    """A pass that keeps the function and states a shape that is not there."""

    def apply(self, rewriter: Rewriter) -> None:
        for node in list(rewriter.graph):
            inner = [v for v in node.outputs if not v.is_graph_output() and v.shape is not None]
            if inner:
                inner[0].shape = ir.Shape([7, *inner[0].shape])
                rewriter.record("wrong", node.name or "", "a shape too long")
                return


@pytest.mark.usefixtures("wrong_pass")
def test_a_pass_that_states_a_wrong_shape_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Wrong", Misshaped)
    found = run_fold(messy())
    assert found.check.equal
    assert [entry["pass"] for entry in found.undone] == ["wrong"]
    assert "has shape [7" in found.undone[0]["reason"]
    verify.check(found.program)  # does not raise


def test_random_operators_are_not_compared():
    model = messy()
    model.graph.node.extend(
        [
            helper.make_node("RandomNormal", [], ["r"], name="random", shape=[8], seed=1.0),
            helper.make_node("Add", ["y0", "r"], ["y"], name="noise"),
        ]
    )
    model.graph.node[8].output[0] = "y0"
    found = run_fold(model)
    assert found.check.equal is None
    assert found.check.reason == "RandomNormal 'random' draws random numbers"


def test_the_command_writes_the_model_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    onnx.save(messy(), tmp_path / "in.onnx")
    main_ok(["fold", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["nodes"]["before"] == 9
    assert said["nodes"]["after"] == len(onnx.load(tmp_path / "out.onnx").graph.node)
    assert said["operators"]["Identity"] == [1, 0]
    assert said["check"]["equal"] is True
    assert said["undone"] == []
    assert said["changes"]["eliminate-identities"] >= 1
    assert said["files"] == [str(tmp_path / "out.onnx")]


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    onnx.save(messy(), tmp_path / "in.onnx")
    main_ok(["fold", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--shape", "x=3x8"])
    said = capsys.readouterr().out
    for word in ("nodes", "Identity", "eliminate-identities", "wrote", "equal"):
        assert word in said


@pytest.mark.parametrize("shape", ["x", "x=", "x=3xy", "=3"])
def test_a_shape_that_cannot_be_read_is_one_message(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    onnx.save(messy(), tmp_path / "in.onnx")
    with pytest.raises(SystemExit) as stop:
        main(["fold", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--shape", shape])
    assert stop.value.code == 2
    assert "is not understood" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_a_target_chooses_forms_by_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lamina.planner.timing import Stopwatch

    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    compare = Stopwatch.compare
    monkeypatch.setattr(
        Stopwatch, "compare", lambda self, models, seconds: compare(self, models, seconds=0.1)
    )
    found = run_fold(messy(), target="ort:cpu?threads=1", forms=[])
    assert found.target == "ort:cpu?threads=1"
    assert found.relative is not None
    assert found.relative.ratio > 0
    assert found.forms[0]["form"] == "folds"
    assert found.check.equal


def test_a_remembered_choice_starts_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lamina.planner import forms
    from lamina.planner.timing import Stopwatch

    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    monkeypatch.setattr(forms, "machine_load", lambda: SimpleNamespace(quiet=True))
    compare = Stopwatch.compare
    monkeypatch.setattr(
        Stopwatch, "compare", lambda self, models, seconds: compare(self, models, seconds=0.1)
    )
    first = run_fold(messy(), target="ort:cpu?threads=1", forms=[])
    monkeypatch.setattr(lamina.folding, "Stopwatch", None)
    again = run_fold(messy(), target="ort:cpu?threads=1", forms=[])
    assert again.remembered
    assert (again.names, again.relative, again.changes) == (first.names, first.relative, first.changes)


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code in (0, None)
