"""Linear operators with constant weights: read as one array of weights and a bias, and written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, constant, is_op, rank_of, sole_consumer, substitute

Array = np.ndarray[Any, Any]

LINEAR: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = ("float16", "float32", "float64")
_SMALL = 2.0**-14
_OPERATOR_BYTES = 64


@dataclass(frozen=True)
class Linear:
    """One operator y = W x + b.

    Attributes:
        node: The Conv, ConvTranspose, Gemm or MatMul.
        source: The x it is applied to.
        weight: The value of the weight.
        stored: The weight as it is stored.
        bias: The value of the bias; None where there is none.
        offset: What is added, in double precision, channels along its last axis; None likewise.
        carrier: The Add that adds the bias of a MatMul; None where there is none.
    """

    node: ir.Node
    source: ir.Value
    weight: ir.Value
    stored: Array
    bias: ir.Value | None = None
    offset: Array | None = None
    carrier: ir.Node | None = None

    @property
    def output(self) -> ir.Value:
        """The y."""
        return (self.carrier or self.node).outputs[0]

    @property
    def is_conv(self) -> bool:
        """Whether channels lie along axis 1, not along the last."""
        return self.node.op_type in ("Conv", "ConvTranspose")

    @property
    def rank(self) -> int | None:
        """The rank of y, where it is known."""
        if self.is_conv or self.node.op_type == "Gemm":
            return self.stored.ndim
        return rank_of(self.output)

    @property
    def axis(self) -> int:
        """The axis of y's channels, counted from the end."""
        return 1 - self.stored.ndim if self.is_conv else -1

    @property
    def source_axis(self) -> int:
        """The axis of x's channels, counted from the end."""
        if self.node.op_type == "Gemm" and attribute(self.node, "transA", 0):
            return -2
        return self.axis

    @property
    def groups(self) -> int:
        """How many groups of channels do not see each other."""
        return int(attribute(self.node, "group", 1)) if self.is_conv else 1

    def weights(self) -> Array:
        """W in double precision as [groups, channels out / groups, channels in / groups, taps]."""
        stored = wide(self.stored)
        if self.node.op_type == "Conv":
            return stored.reshape(self.groups, -1, stored.shape[1], prod(stored.shape[2:]))
        if self.node.op_type == "ConvTranspose":
            taps = prod(stored.shape[2:])
            return stored.reshape(self.groups, -1, stored.shape[1], taps).transpose(0, 2, 1, 3)
        if self.node.op_type == "Gemm":
            stored = stored if attribute(self.node, "transB", 0) else stored.T
            return stored[None, :, :, None] * attribute(self.node, "alpha", 1.0)
        return stored.T[None, :, :, None]

    def layout(self, weights: Array) -> Array:
        """``weights`` as this operator stores them, where they have as many taps."""
        if self.node.op_type == "Conv":
            return weights.reshape(-1, weights.shape[2], *self.stored.shape[2:])
        if self.node.op_type == "ConvTranspose":
            turned = weights.transpose(0, 2, 1, 3)
            return turned.reshape(-1, weights.shape[1], *self.stored.shape[2:])
        matrix = weights[0, :, :, 0]
        return matrix if self.node.op_type == "Gemm" and attribute(self.node, "transB", 0) else matrix.T

    def store(self, weights: Array) -> Array | None:
        """``weights`` as stored, in the operator's type; None where that would lose them."""
        largest = np.abs(weights).max(axis=(2, 3), keepdims=True)
        found = rounded(weights, self.stored.dtype, largest)
        return None if found is None else np.ascontiguousarray(self.layout(found))

    @property
    def channels_out(self) -> int:
        """The number of y's channels."""
        if self.node.op_type == "Conv":
            return int(self.stored.shape[0])
        if self.node.op_type == "ConvTranspose":
            return int(self.stored.shape[1]) * self.groups
        turned = self.node.op_type == "Gemm" and attribute(self.node, "transB", 0)
        return int(self.stored.shape[0 if turned else 1])

    @property
    def channels_in(self) -> int:
        """The number of x's channels."""
        if self.node.op_type == "Conv":
            return int(self.stored.shape[1]) * self.groups
        turned = self.node.op_type == "Gemm" and attribute(self.node, "transB", 0)
        return int(self.stored.shape[1 if turned else 0])


def wide(array: Array) -> Array:
    """``array`` in a type that holds products of its numbers."""
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


def rounded(exact: Array, dtype: np.dtype[Any], largest: Array | float | None = None) -> Array | None:
    """``exact`` in ``dtype``, or None where that overflows, or loses small numbers that matter.

    Numbers below the smallest normal one keep fewer digits; that matters unless they vanish beside
    ``largest``, by default the largest of all.
    """
    with np.errstate(all="ignore"):
        result = np.asarray(exact).astype(dtype)
    if not np.isfinite(result).all():
        return None
    limits = np.finfo(dtype)
    if not ((np.abs(exact) < limits.tiny) & (exact != 0)).any():
        return result
    scale = np.abs(exact).max(initial=0) if largest is None else largest
    return result if (np.abs(result - exact) <= limits.eps * scale).all() else None


def cancels(first: Array, second: Array) -> bool:
    """Whether two constants nearly cancel, so that adding one after the other rounds on purpose."""
    total = np.abs(first + second)
    return bool((total < _SMALL * np.maximum(np.abs(first), np.abs(second))).any())


def linear_at(node: ir.Node | None) -> Linear | str | None:
    """``node`` as a linear operator with constant weights, why it is not quite one, or None."""
    if node is None or not is_op(node, *LINEAR) or len(node.inputs) < 2:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None:
        return None
    stored = constant(weight)
    if stored is None:
        return "its weight is a graph input" if weight.is_initializer() else None
    if stored.dtype.name not in _FLOATS or not stored.size or not _shaped(node, stored):
        return None
    found = Linear(node, source, weight, stored)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return found
    array = constant(bias)
    if array is None:
        return "its bias is no constant"
    offset = wide(array)
    if node.op_type == "Gemm":
        offset = offset * attribute(node, "beta", 1.0)
    return replace(found, bias=bias, offset=offset)


def _shaped(node: ir.Node, stored: Array) -> bool:
    if node.op_type in ("Gemm", "MatMul"):
        return stored.ndim == 2
    return stored.ndim > 2 and stored.shape[0] % int(attribute(node, "group", 1)) == 0


def with_carrier(linear: Linear) -> Linear:
    """``linear`` with the Add of a constant that follows a MatMul and alone reads it."""
    add = sole_consumer(linear.node.outputs[0]) if linear.node.op_type == "MatMul" else None
    if add is None or not is_op(add, "Add") or add.graph is not linear.node.graph:
        return linear
    bias = next((v for v in add.inputs if v is not linear.node.outputs[0]), None)
    array = constant(bias)
    if array is None or array.dtype != linear.stored.dtype or not array.size:
        return linear
    if array.ndim and array.shape[-1] not in (1, linear.channels_out):
        return linear
    return replace(linear, bias=bias, offset=wide(array), carrier=add)


def linear_of(value: ir.Value | None) -> Linear | str | None:
    """The linear operator that ``value`` is the result of, with the Add behind a MatMul."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Add"):
        return linear_at(node)
    for operand in node.inputs:
        inner = None if operand is None else operand.producer()
        found = linear_at(inner) if is_op(inner, "MatMul") else None
        if isinstance(found, Linear) and with_carrier(found).carrier is node:
            return with_carrier(found)
    return None


def paddings(node: ir.Node, kernel: tuple[int, ...]) -> list[int] | None:
    """The zeros a convolution puts around x, befores then afters; None where they depend on x."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode == "VALID" or (mode != "NOTSET" and all(k == 1 for k in kernel)):
        return [0] * (2 * len(kernel))
    if mode != "NOTSET":
        return None
    return list(attribute(node, "pads", [0] * (2 * len(kernel))))


def spread(node: ir.Node, name: str, length: int) -> list[int]:
    """The ``strides`` or ``dilations`` of a convolution."""
    return list(attribute(node, name, [1] * length))


def is_shared(value: ir.Value) -> bool:
    """Whether anything besides one operator reads a constant, so that it stays when that one goes."""
    return value.is_graph_output() or len(value.uses()) > 1


def outgrows(old: Sequence[ir.Value | None], new: Sequence[Array | None]) -> bool:
    """Whether writing ``new`` for ``old`` grows the file because some of ``old`` is shared and stays.

    The operator that goes saves some bytes too.
    """
    added = sum(a.nbytes for a in new if a is not None)
    if added <= _OPERATOR_BYTES:  # before counting readers: a number may have many
        return False
    known = [v for v in dict.fromkeys(old) if v is not None]
    shared = [v for v in known if is_shared(v)]
    alone = [constant(v) for v in known if v not in shared]
    freed = sum(a.nbytes for a in alone if a is not None)
    return bool(shared) and added > freed + _OPERATOR_BYTES


def hint(value: ir.Value | None, otherwise: str) -> str:
    """A name for the folded form of a constant."""
    name = otherwise if value is None or not value.name else value.name
    return name if name.endswith("_folded") else f"{name}_folded"


def write(
    rewriter: Rewriter,
    linear: Linear,
    *,
    source: ir.Value | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
) -> ir.Value:
    """Change the operator in place, as far as something is given; returns the value that is y now.

    A MatMul without an Add behind it gets one for its bias; its own name goes to that Add.
    """
    node = linear.node
    if source is not None:
        node.replace_input_with(0, source)
    if weight is not None:  # with the factor of a Gemm in it
        node.replace_input_with(1, rewriter.constant(weight, hint(linear.weight, "weight")))
        node.attributes.pop("alpha", None)
    if bias is None:
        return linear.output
    value = rewriter.constant(bias, hint(linear.bias, f"{node.name}_bias"))
    if linear.carrier is not None:
        at = next(i for i, v in enumerate(linear.carrier.inputs) if v is linear.bias)
        linear.carrier.replace_input_with(at, value)
        if source is not None:
            node.outputs[0].shape = _product_shape(linear, source)
        return linear.output
    if node.op_type == "MatMul":
        return _with_add(rewriter, linear, value)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
    node.attributes.pop("beta", None)
    return linear.output


def _with_add(rewriter: Rewriter, linear: Linear, bias: ir.Value) -> ir.Value:
    node, source = linear.node, linear.node.inputs[0]
    output, label = node.outputs[0], f"{node.name}_projection"
    product = rewriter.at(node).op("MatMul", list(node.inputs), name=label, dtype=output.dtype)
    product.shape = None if source is None else _product_shape(linear, source)
    return substitute(rewriter, output, "Add", [product, bias]).outputs[0]


def _product_shape(linear: Linear, source: ir.Value) -> ir.Shape | None:
    """The shape of source times matrix, which need not be that of y: a bias may add axes and repeat rows."""
    if source.shape is None:
        return None
    return ir.Shape([*list(source.shape)[:-1], linear.channels_out])
