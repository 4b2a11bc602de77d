"""What of the TVM backend works without TVM: refusals, shapes, rewrites, comparison, options."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lamina.backends import tvm_process
from lamina.backends.backend import Target
from lamina.backends.reference import run_reference
from lamina.backends.tvm import Tvm
from lamina.backends.tvm_import import Prepared, check_feeds, parse_shapes, prepare
from lamina.backends.tvm_library import feeds_to_check, relative_error
from lamina.backends.tvm_operators import plain_kernel
from lamina.errors import BackendError, BudgetError, DataError, LaminaError, UnsupportedOperator

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
Inputs = Mapping[str, tuple[int, list[Any]]]
X: Inputs = {"x": (FLOAT, [2, 4])}


def graph(
    nodes: list[onnx.NodeProto],
    inputs: Inputs,
    outputs: list[str],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 20,
) -> ir.Model:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, *v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=imports, ir_version=10))
    for value in model.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.dim.add().dim_param = "unknown"
    return ir.from_proto(model)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name="the_node", **attributes)


def f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


REFUSED: dict[str, tuple[onnx.NodeProto, Inputs, list[str], dict[str, np.ndarray], int]] = {
    "LSTM": (
        node("LSTM", "x w r", "y", hidden_size=2),
        {"x": (FLOAT, [3, 2, 4])},
        ["y"],
        {"w": np.ones((1, 8, 4), np.float32), "r": np.ones((1, 8, 2), np.float32)},
        20,
    ),
    "Attention": (node("Attention", "x x x"), {"x": (FLOAT, [1, 2, 3, 4])}, ["y"], {}, 23),
    "RotaryEmbedding": (
        node("RotaryEmbedding", "x c c"),
        {"x": (FLOAT, [1, 2, 3, 4]), "c": (FLOAT, [1, 3, 2])},
        ["y"],
        {},
        23,
    ),
    "OneHot": (
        node("OneHot", "i d v"),
        {"i": (INT, [3])},
        ["y"],
        {"d": np.array(9), "v": f(0, 1)},
        20,
    ),
    "BatchNormalization": (
        node("BatchNormalization", "x s s s s", "y m v", training_mode=1),
        X,
        ["y"],
        {"s": f(1, 2, 3, 4)},
        20,
    ),
    "DequantizeLinear": (
        node("DequantizeLinear", "q s", axis=1, block_size=2),
        {"s": (FLOAT, [2, 2])},
        ["y"],
        {"q": np.ones((2, 4), np.int8)},
        21,
    ),
    "Pow": (node("Pow", "x p"), X, ["y"], {"p": np.array(3)}, 20),
    "ReduceSum": (node("ReduceSum", "x a"), {**X, "a": (INT, [1])}, ["y"], {}, 20),
    "LayerNormalization": (node("LayerNormalization", "x s", "y m"), X, ["y", "m"], {"s": f(1, 2, 3, 4)}, 20),
    "Resize": (
        node("Resize", "x r s", mode="linear"),
        {"x": (FLOAT, [1, 1, 5, 5])},
        ["y"],
        {"r": f(), "s": f(1, 1, 0.5, 0.5)},
        20,
    ),
    "com.microsoft.MatMulNBits": (
        node("MatMulNBits", "x q s", K=32, N=4, bits=4, block_size=32, domain="com.microsoft"),
        {"x": (FLOAT, [2, 32])},
        ["y"],
        {"q": np.ones((4, 1, 16), np.uint8), "s": f(1, 1, 1, 1)},
        20,
    ),
}


@pytest.mark.parametrize("operator", REFUSED)
def test_refuses_by_node_and_operator(operator: str) -> None:
    proto, inputs, outputs, weights, opset = REFUSED[operator]
    with pytest.raises(UnsupportedOperator, match="TVM cannot import") as caught:
        prepare(graph([proto], inputs, outputs, weights, opset), {}, None)
    assert f"'the_node' ({operator})" in str(caught.value)
    assert "ort:cpu" in str(caught.value) or "shapes=" in str(caught.value)


def test_the_same_operators_in_forms_that_work_are_accepted() -> None:
    nodes = [
        node("LayerNormalization", "x s", "a"),
        node("Pow", "a p", "b"),
        node("ReduceSum", "b axes", "y"),
    ]
    weights = {"s": f(1, 2, 3, 4), "p": f(2).reshape(()), "axes": np.array([1])}
    assert prepare(graph(nodes, X, ["y"], weights), {}, None).outputs == ("y",)


def test_a_contrib_operator_is_not_taken_for_a_standard_one() -> None:
    proto = node("Relu", "x", domain="com.microsoft")
    with pytest.raises(LaminaError, match=r"Relu"):
        prepare(graph([proto], X, ["y"]), {}, None)


def test_an_operator_that_folds_away_is_no_reason_to_refuse() -> None:
    nodes = [node("OneHot", "i d v", "c"), node("Add", "x c")]
    weights = {"i": np.array([0, 3]), "d": np.array(4), "v": f(0, 1)}
    prepared = prepare(graph(nodes, X, ["y"], weights), {}, None)
    assert [n.op_type for n in prepared.model.graph] == ["Add"]


# -- shapes -----------------------------------------------------------------------------------------

TWO: Inputs = {"a.1": (FLOAT, ["batch", "n"]), "b": (FLOAT, ["batch", 3])}


def _reshaping() -> ir.Model:
    """[batch, n] flattened through Shape, Gather, Concat: dynamic until the shapes are known."""
    nodes = [
        helper.make_node("Shape", ["a.1"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n0"]),
        helper.make_node("Concat", ["n0", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["a.1", "target"], ["r"]),
        helper.make_node("ReduceSum", ["r", "one"], ["t"], keepdims=1),
        helper.make_node("Add", ["t", "b"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "minus": np.array([-1]), "one": np.array([1])}
    return graph(nodes, TWO, ["y"], weights)


def test_shapes_reach_every_input_and_fold_what_they_fix() -> None:
    prepared = prepare(_reshaping(), {"a.1": (2, 5)}, None)
    assert [port.shape for port in prepared.inputs] == [(2, 5), (2, 3)]
    assert not prepared.dynamic
    assert "Shape" not in [n.op_type for n in prepared.model.graph]
    feeds = {"a.1": np.random.default_rng(0).random((2, 5), np.float32), "b": np.ones((2, 3), np.float32)}
    assert (
        relative_error(run_reference(_reshaping(), feeds)["y"], run_reference(prepared.model, feeds)["y"])
        < 1e-6
    )


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"c": (2, 5)}, "not an input"),
        ({"a.1": (2, 5, 1)}, "a.1"),
        ({"b": (2, 4)}, "b"),
        ({"a.1": (2, 5), "b": (3, 3)}, "batch"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        prepare(_reshaping(), shapes, None)


def test_shapes_text() -> None:
    assert parse_shapes("a:b:1x128,c:4") == {"a:b": (1, 128), "c": (4,)}
    for bad in ("tokens", "tokens:1x", "tokens:0x3", ":3", "tokens:1xN"):
        with pytest.raises(BudgetError, match="shapes"):
            parse_shapes(bad)


# -- Range ------------------------------------------------------------------------------------------


def _positions(table: bool) -> ir.Model:
    """Positions 0..T-1 of ids [batch, T], looked up in a table or added."""
    nodes = [
        helper.make_node("Shape", ["ids"], ["s"], start=1, end=2),
        helper.make_node("Squeeze", ["s"], ["t"]),
        helper.make_node("Range", ["zero", "t", "one"], ["p"], name="the_range"),
        helper.make_node("Gather", ["rows", "p"], ["e"])
        if table
        else helper.make_node("Cast", ["p"], ["e"], to=1),
        helper.make_node("Cast", ["ids"], ["i"], to=1),
        helper.make_node("Unsqueeze", ["i", "last"], ["u"])
        if table
        else helper.make_node("Identity", ["i"], ["u"]),
        helper.make_node("Add", ["u", "e"], ["y"]),
    ]
    rows = np.random.default_rng(1).random((16, 3), np.float32)
    weights = {"zero": np.array(0), "one": np.array(1), "rows": rows, "last": np.array([2])}
    return graph(nodes, {"ids": (INT, ["batch", "T"])}, ["y"], weights)


@pytest.mark.parametrize("table", [True, False])
def test_an_open_range_becomes_a_slice_of_positions(table: bool) -> None:
    prepared = prepare(_positions(table), {}, None if table else 16)
    assert "Range" not in [n.op_type for n in prepared.model.graph]
    assert prepared.limit == 16
    for length in (1, 7, 16):
        feeds = {"ids": np.arange(2 * length).reshape(2, length)}
        want, got = run_reference(_positions(table), feeds), run_reference(prepared.model, feeds)
        np.testing.assert_array_equal(want["y"], got["y"])


def test_an_open_range_without_a_bound_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperator, match=r"Range: node 'the_range'[\s\S]*bound=512"):
        prepare(_positions(False), {}, None)


def test_more_positions_than_the_bound_are_refused() -> None:
    prepared = prepare(_positions(True), {}, None)
    with pytest.raises(DataError, match="at most 16"):
        check_feeds(prepared.inputs, {"ids": np.zeros((1, 17), np.int64)}, prepared.limit)


def test_feeds_that_do_not_fit_are_refused() -> None:
    inputs = prepare(_reshaping(), {"a.1": (2, 5)}, None).inputs
    good = {"a.1": np.zeros((2, 5), np.float32), "b": np.zeros((2, 3), np.float32)}
    check_feeds(inputs, good)
    for bad in (
        {"a.1": good["a.1"]},
        {**good, "c": good["b"]},
        {**good, "b": np.zeros((2, 3))},
        {**good, "b": np.zeros((3, 3), np.float32)},
    ):
        with pytest.raises(DataError):
            check_feeds(inputs, bad)


# -- comparing --------------------------------------------------------------------------------------


def test_relative_error_sees_every_kind_of_difference() -> None:
    want = np.array([1.0, -4.0, np.inf, np.nan], np.float32)
    assert relative_error(want, want.copy()) == 0
    assert relative_error(want, want + np.array([0, 0.04, 0, 0], np.float32)) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(want, want[:3]) == np.inf
    assert relative_error(want, want.astype(np.float64)) == np.inf
    assert relative_error(want, np.array([1, -4, 3, np.nan], np.float32)) == np.inf
    assert relative_error(want, np.array([np.nan, -4, np.inf, np.nan], np.float32)) == np.inf
    assert relative_error(np.arange(3), np.array([0, 1, 3])) == np.inf


def test_checks_cover_zeros_large_values_and_a_second_size() -> None:
    feeds = feeds_to_check(prepare(_reshaping(), {}, None))
    assert set(feeds) == {"random", "zero", "large", "smaller"}
    assert not feeds["zero"]["b"].any()
    assert np.abs(feeds["large"]["b"]).max() > 10
    assert feeds["smaller"]["a.1"].shape != feeds["random"]["a.1"].shape
    assert set(feeds_to_check(prepare(_reshaping(), {"a.1": (2, 5)}, None))) == {"random", "zero", "large"}


def test_kernel_names_lose_their_number() -> None:
    assert [plain_kernel(n) for n in ("matmul12", "fused_conv2d_add1", "conv2d")] == [
        "matmul",
        "fused_conv2d_add",
        "conv2d",
    ]


# -- options, absence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["tvm:cuda", "tvm:llvm?speed=1", "tvm:llvm?tune=soon", "tvm:llvm?trials=0", "tvm:llvm?shapes=x"],
)
def test_targets_it_does_not_understand(target: str) -> None:
    with pytest.raises(BudgetError):
        Tvm().check(Target.parse(target))


def test_without_tvm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"lamina\[tvm\]"):
        Tvm().compile(_reshaping(), Target.parse("tvm:llvm"))


def test_importing_the_backend_imports_no_tvm(tmp_path: Path) -> None:
    code = (
        "import sys, lamina.backends.tvm, lamina.backends.tvm_search, lamina.backends.tvm_tune\n"
        "sys.exit(any(m.split('.')[0] in ('tvm', 'torch', 'onnxruntime') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_constant_output_stays_an_output() -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Cast", ["s"], ["y"], to=FLOAT)]
    value = helper.make_tensor("v", FLOAT, [2], [2.0, 4.0])
    for prepared in (
        prepare(graph(nodes, X, ["y"]), {}, None),
        prepare(graph([helper.make_node("Constant", [], ["y"], value=value)], X, ["y"]), {}, None),
    ):
        _outputs_two_and_four(prepared)


def _outputs_two_and_four(prepared: Prepared) -> None:
    assert not {n.op_type for n in prepared.model.graph} & {"Constant", "Shape", "Cast"}
    assert prepared.outputs == ("y",)
    np.testing.assert_array_equal(
        run_reference(prepared.model, {"x": np.zeros((2, 4), np.float32)})["y"], [2, 4]
    )


def test_a_tile_of_many_axes_is_refused() -> None:
    inputs: Inputs = {"x": (FLOAT, [2, 3, 4])}
    few, many = np.array([1, 2, 2]), np.array([2, 2, 2])
    assert prepare(graph([node("Tile", "x r")], inputs, ["y"], {"r": few}), {}, None)
    with pytest.raises(UnsupportedOperator, match="Tile"):
        prepare(graph([node("Tile", "x r")], inputs, ["y"], {"r": many}), {}, None)
