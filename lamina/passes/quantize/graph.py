"""What the quantizing modules share: constants, weights kept once, conversions at a form's borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.quantize.weights import QuantizedWeight

FLOAT = ir.DataType.FLOAT
_STANDARD = ("", "ai.onnx")
Made = TypeVar("Made")

# A weight's tensor is shared by every clone of its program, so each form of it is computed once a process.
_FORMS: WeakKeyDictionary[ir.TensorProtocol, dict[str, Any]] = WeakKeyDictionary()


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.op_type in op_types and node.domain in _STANDARD


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value nobody can override: an initializer's, or a Constant node's."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    return ir.convenience.get_const_tensor(value) if is_op(value.producer(), "Constant") else None


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The content of :func:`constant_tensor`."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def dims_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The dimensions of a constant, as plain numbers."""
    return tuple(tensor.shape.numpy())


def attributes(node: ir.Node, *leave_out: str) -> dict[str, Any]:
    """A node's attributes as plain values, for an operator that takes its place."""
    return {key: attr.value for key, attr in node.attributes.items() if key not in leave_out}


def quantized(value: ir.Value, form: str, make: Callable[[np.ndarray], Made]) -> Made:
    """The weight ``value`` in the form called ``form``, computed by ``make`` the first time."""
    tensor = constant_tensor(value)
    assert tensor is not None, f"{value.name} is not constant"  # sites() made sure
    try:
        forms = _FORMS.setdefault(tensor, {})
    except TypeError:  # a tensor class without weak references: recompute
        return make(tensor.numpy())
    if form not in forms:
        forms[form] = make(tensor.numpy())
    found: Made = forms[form]
    return found


def shared(
    rewriter: Rewriter, weight: ir.Value, form: str, array: np.ndarray, dtype: ir.DataType | None = None
) -> ir.Value:
    """An initializer derived from ``weight``, created once a graph: readers of one weight share its forms.

    ``form`` must name everything the content depends on besides the weight.
    """
    name = f"{weight.name}.{form}"
    known = rewriter.graph.initializers.get(name)
    return rewriter.constant(array, name, dtype=dtype) if known is None else known


def common(rewriter: Rewriter, array: np.ndarray, name: str) -> ir.Value:
    """A small constant that many weights use, created once a graph; ``name`` says all of its content."""
    known = rewriter.graph.initializers.get(name)
    return rewriter.constant(array, name) if known is None else known


def scalar(rewriter: Rewriter, number: Any, kind: Any, name: str) -> ir.Value:
    """A constant of rank 0: the kernels of the QLinear family want scalar scales."""
    return rewriter.constant(np.array(number, dtype=kind), name)


def border(rewriter: Rewriter, name: str, parameters: Mapping[str, Any]) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point constants of one quantized activation."""
    scale = scalar(rewriter, parameters["scale"], np.float32, f"{name}.scale")
    return scale, scalar(rewriter, parameters["zero_point"], np.uint8, f"{name}.zero_point")


def quantize(
    rewriter: Rewriter, value: ir.Value, parameters: Mapping[str, Any], name: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """``value`` as uint8, with its scale and zero point constants."""
    scale, zero = border(rewriter, name, parameters)
    kind, shape = ir.DataType.UINT8, value.shape
    codes = rewriter.op(
        "QuantizeLinear", [value, scale, zero], name=f"{name}.quantize", dtype=kind, shape=shape
    )
    return codes, scale, zero


def dequantize(rewriter: Rewriter, codes: ir.Value, scale: ir.Value, zero: ir.Value, name: str) -> ir.Value:
    """Codes back as float32."""
    return rewriter.op(
        "DequantizeLinear", [codes, scale, zero], name=f"{name}.dequantize", dtype=FLOAT, shape=codes.shape
    )


def quantize_dequantize(
    rewriter: Rewriter, value: ir.Value, parameters: Mapping[str, Any], name: str
) -> ir.Value:
    """``value`` through uint8 and back: what runtimes fuse into integer kernels."""
    return dequantize(rewriter, *quantize(rewriter, value, parameters, name), name)


def dequantized_channels(
    rewriter: Rewriter, weight: ir.Value, form: str, made: QuantizedWeight, axis: int
) -> ir.Value:
    """Per-channel int8 weights behind their DequantizeLinear."""
    inputs = [
        shared(rewriter, weight, f"{form}.codes", made.codes),
        shared(rewriter, weight, f"{form}.scale", made.scale),
        shared(rewriter, weight, f"{form}.zero_point", np.zeros(len(made.scale), np.int8)),
    ]
    name = f"{weight.name}.dequantize"
    return rewriter.op("DequantizeLinear", inputs, {"axis": axis}, name=name, dtype=FLOAT)
