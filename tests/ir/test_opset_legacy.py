"""Opsets 1 to 6: broadcasting along an axis, training flags and attributes that became others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_tools import proto, run

from lamina.errors import UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.verify import check, verify_structure

_RNG = np.random.default_rng(3)
_X = _RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
_VECTOR = _RNG.standard_normal(3).astype(np.float32)
_MATRIX = _RNG.standard_normal((3, 4)).astype(np.float32)
_SLOPE = np.abs(_VECTOR)


def _old(
    op: str, opset: int, weights: dict[str, np.ndarray] | None = None, **attributes: object
) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", *(weights or {})], ["y"], "it", **attributes)
    return proto([node], {"x": _X.shape}, {"y": None}, weights, opset=opset)  # type: ignore[dict-item]


def _answer(model: onnx.ModelProto) -> np.ndarray:
    program = capture(model)
    verify_structure(program)
    check(program)
    assert program.opset >= 13
    return run(program.model, {"x": _X})[0]


def _leaky(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return np.where(x < 0, x * slope, x)


_CASES: dict[str, tuple[onnx.ModelProto, Callable[[], np.ndarray]]] = {
    "add along axis 1": (
        _old("Add", 6, {"b": _VECTOR}, axis=1, broadcast=1),
        lambda: _X + _VECTOR[:, None, None],
    ),
    "multiply along two axes": (
        _old("Mul", 1, {"b": _MATRIX}, axis=1, broadcast=1, consumed_inputs=[0, 0]),
        lambda: _X * _MATRIX[:, :, None],
    ),
    "negative axis": (
        _old("Sub", 6, {"b": _VECTOR}, axis=-3, broadcast=1),
        lambda: _X - _VECTOR[:, None, None],
    ),
    "aligned at the end": (_old("Div", 6, {"b": _X[0, 0]}, broadcast=1), lambda: _X / _X[0, 0]),
    "slope per channel": (_old("PRelu", 6, {"s": _SLOPE}), lambda: _leaky(_X, _SLOPE[:, None, None])),
    "one slope": (_old("PRelu", 6, {"s": _SLOPE[:1]}), lambda: _leaky(_X, _SLOPE[0])),
    "shape as an attribute": (_old("Reshape", 1, shape=[0, -1]), lambda: _X.reshape(2, 60)),
    "paddings": (
        _old("Pad", 1, paddings=[0, 0, 1, 0, 0, 0, 0, 2], value=0.5),
        lambda: np.pad(_X, [(0, 0), (0, 0), (1, 0), (0, 2)], constant_values=0.5),
    ),
    "join along the old default axis": (_old("Concat", 1, {"b": _X}), lambda: np.concatenate([_X, _X], 1)),
    "dropout under test": (_old("Dropout", 6, is_test=1, ratio=0.5), lambda: _X),
    "upsample by two scales": (
        _old("Upsample", 1, height_scale=2.0, width_scale=3.0, mode="nearest"),
        lambda: _X.repeat(2, 2).repeat(3, 3),
    ),
    "pool by a float norm": (
        _old("GlobalLpPool", 1, p=2.0),
        lambda: np.sqrt((_X**2).sum((2, 3), keepdims=True)),
    ),
    "the old default of Selu": (
        _old("Selu", 1),
        lambda: 1.0507 * np.where(_X > 0, _X, 1.6732 * np.expm1(_X)),
    ),
    "batch normalization under test": (
        _old(
            "BatchNormalization",
            6,
            {"s": _VECTOR, "b": _SLOPE, "m": _VECTOR, "v": _SLOPE},
            is_test=1,
            epsilon=1e-3,
        ),
        lambda: (
            (_X - _VECTOR[:, None, None]) / np.sqrt(_SLOPE + 1e-3)[:, None, None] * _VECTOR[:, None, None]
            + _SLOPE[:, None, None]
        ),
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_old_definitions_compute_the_same(name: str) -> None:
    model, expected = _CASES[name]
    np.testing.assert_allclose(_answer(model), expected(), rtol=2e-6, atol=2e-6)


def test_types_by_name() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], "it", to="INT32")
    model = proto([node], {"x": _X.shape}, {"y": None}, opset=1)  # type: ignore[dict-item]
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    np.testing.assert_array_equal(_answer(model), _X.astype(np.int32))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_old("Dropout", 6), "it is in training mode"),
        (
            _old("BatchNormalization", 6, dict.fromkeys("sbmv", _VECTOR), is_test=0),
            "it is in training mode",
        ),
        (_old("Add", 6, {"b": _MATRIX}, axis=3, broadcast=1), "its operand reaches beyond the last axis"),
        (_old("Cast", 1, to="INT33"), "'INT33' is no data type"),
        (_old("GlobalLpPool", 1, p=2.5), "its norm is of a fractional order"),
    ],
)
def test_what_has_no_newer_form_is_named(model: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(UnsupportedOperator) as caught:
        capture(model)
    assert caught.value.what.endswith(f"cannot be raised to a newer opset: {reason}")


def test_batch_normalization_is_not_left_where_the_reference_evaluator_trains() -> None:
    from onnx.reference import ReferenceEvaluator

    model, expected = _CASES["batch normalization under test"]
    answer = ReferenceEvaluator(ir.to_proto(capture(model).model)).run(None, {"x": _X})[0]
    np.testing.assert_allclose(answer, expected(), rtol=1e-5, atol=1e-5)


def _old_scan(lengths: str, **attributes: object) -> onnx.ModelProto:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum_in", "next"], ["sum_out"]),
            helper.make_node("Mul", ["sum_out", "next"], ["product"]),
        ],
        "body",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in ("sum_in", "next")],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in ("sum_out", "product")],
    )
    node = helper.make_node(
        "Scan", [lengths, "start", "x"], ["y", "z"], "scan", num_scan_inputs=1, body=body, **attributes
    )
    inputs = {"start": ["n", 2], "x": ["n", 3, 2]}
    return proto([node], inputs, {"y": ["n", 2], "z": ["n", 3, 2]}, opset=8)


@pytest.mark.parametrize("directions", [[0], [1]])
def test_a_scan_with_a_batch_axis(directions: list[int]) -> None:
    start = _RNG.standard_normal((4, 2)).astype(np.float32)
    x = _RNG.standard_normal((4, 3, 2)).astype(np.float32)
    program = capture(_old_scan("", directions=directions))
    verify_structure(program)
    check(program)
    steps = x[:, ::-1] if directions == [1] else x
    sums = start[:, None] + np.cumsum(steps, 1)
    final, products = run(program.model, {"start": start, "x": x})
    np.testing.assert_allclose(final, sums[:, -1], rtol=1e-6)
    np.testing.assert_allclose(products, sums * steps, rtol=1e-5, atol=1e-6)


def test_a_scan_with_lengths_is_named() -> None:
    model = _old_scan("lengths")
    model.graph.input.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ["n"]))
    with pytest.raises(UnsupportedOperator, match="version 8 had a length for each sequence"):
        capture(model)
