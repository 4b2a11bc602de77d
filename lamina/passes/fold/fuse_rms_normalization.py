"""Recognize a decomposed root-mean-square normalization and write the standard operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import (
    LocalFold,
    attribute,
    constant,
    is_op,
    other_input,
    rank_of,
    scalar,
    sole_consumer,
    substitute,
)
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    result: ir.Value
    weight: ir.Value | None
    epsilon: float
    width: int


@dataclass(frozen=True)
class FuseRmsNormalization(LocalFold):
    """Replace x / sqrt(mean(x^2) + epsilon), times a weight where there is one, by ``RMSNormalization``.

    Fires: float32; mean over the last axis, kept; Mul(x, x) or Pow(x, 2); Sqrt and Reciprocal, Sqrt and
    Div, or Pow -0.5; each intermediate value read once; the weight a constant vector.
    Refuses: another axis; an unknown last dimension; an intermediate value read elsewhere.
    Effect: Rounding, a few ulps of max|y|.
    Cost: O(ReduceMean nodes).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)
    paper: ClassVar[str] = "arXiv:1910.07467"
    minimum_opset: ClassVar[int] = 23
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The normalization around a ReduceMean of a square."""
        x = _squared(node.inputs[0])
        if x is None:
            return None
        shift = sole_consumer(node.outputs[0])
        if shift is None or not is_op(shift, "Add"):
            return None
        rank = rank_of(x)
        epsilon = scalar(other_input(shift, node.outputs[0]), rank)
        if epsilon is None or rank is None or not _over_last_axis(node, rank):
            return "it is not the mean over the last axis, kept, plus a number"
        normalized = _divided(x, shift.outputs[0])
        if normalized is None:
            return "x is not divided by its root, or the root is read elsewhere"
        width = x.shape[-1] if x.shape is not None else None
        if not isinstance(width, int) or x.dtype is not ir.DataType.FLOAT:
            return "it is not float32 with a known last dimension"
        weight, result = _weighted(normalized, width)
        return _Match(x, result, weight, epsilon, width)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the operator; without a weight it gets one of ones, which the operator demands."""
        weight = match.weight
        if weight is None:
            weight = rewriter.constant(np.ones(match.width, np.float32), "lamina_rms_ones")
        where = match.result.producer().name
        attributes = {"axis": -1, "epsilon": match.epsilon}
        substitute(rewriter, match.result, "RMSNormalization", [match.x, weight], attributes)
        rewriter.record(self.name, where, "decomposed RMS normalization")


def _squared(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if is_op(node, "Pow") and scalar(node.inputs[1], rank_of(node.inputs[0])) == 2.0:
        return node.inputs[0]
    return None


def _over_last_axis(node: ir.Node, rank: int) -> bool:
    axes = attribute(node, "axes", None)
    if axes is None and len(node.inputs) > 1:
        array = constant(node.inputs[1])
        axes = None if array is None else array.reshape(-1).tolist()
    return axes is not None and list(axes) in ([-1], [rank - 1]) and attribute(node, "keepdims", 1) == 1


def _divided(x: ir.Value, variance: ir.Value) -> ir.Value | None:
    """X / sqrt(variance) in any of its spellings."""
    root, inverse = sole_consumer(variance), False
    if root is not None and is_op(root, "Pow") and root.inputs[0] is variance:
        exponent = scalar(root.inputs[1], rank_of(variance))
        if exponent not in (0.5, -0.5):
            return None
        inverse = exponent == -0.5
    elif root is None or not is_op(root, "Sqrt"):
        return None
    value = root.outputs[0]
    node = sole_consumer(value)
    if node is not None and not inverse and _is_reciprocal(node, value):
        value, inverse = node.outputs[0], True
        node = sole_consumer(value)
    if node is None:
        return None
    if inverse:
        return node.outputs[0] if is_op(node, "Mul") and other_input(node, value) is x else None
    divides = is_op(node, "Div") and node.inputs[0] is x and node.inputs[1] is value
    return node.outputs[0] if divides else None


def _is_reciprocal(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, "Div"):
        return node.inputs[1] is value and scalar(node.inputs[0], rank_of(value)) == 1.0
    return is_op(node, "Reciprocal")


def _weighted(normalized: ir.Value, width: int) -> tuple[ir.Value | None, ir.Value]:
    node = sole_consumer(normalized)
    if node is None or not is_op(node, "Mul"):
        return None, normalized
    weight = other_input(node, normalized)
    array = constant(weight)
    if weight is None or array is None or array.shape != (width,):
        return None, normalized
    return weight, node.outputs[0]
