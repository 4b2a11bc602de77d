"""Recognize a decomposed root-mean-square normalization and write the standard operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import (
    LocalFold,
    constant,
    is_op,
    other_input,
    rank_of,
    scalar,
    sole_consumer,
    substitute,
)
from lamina.passes.fold.normalizations import averaged_axes, root_of, squared
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
        x = squared(node.inputs[0])
        if x is None:
            return None
        shift = sole_consumer(node.outputs[0])
        if shift is None or not is_op(shift, "Add"):
            return None
        rank = rank_of(x)
        epsilon = scalar(other_input(shift, node.outputs[0]), rank)
        if epsilon is None or rank is None or averaged_axes(node, rank) != 1:
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


def _divided(x: ir.Value, variance: ir.Value) -> ir.Value | None:
    """X / sqrt(variance) in any of its spellings."""
    root = root_of(variance)
    node = None if root is None else sole_consumer(root.value)
    if root is None or node is None:
        return None
    if root.inverse:
        return node.outputs[0] if is_op(node, "Mul") and other_input(node, root.value) is x else None
    divides = is_op(node, "Div") and node.inputs[0] is x and node.inputs[1] is root.value
    return node.outputs[0] if divides else None


def _weighted(normalized: ir.Value, width: int) -> tuple[ir.Value | None, ir.Value]:
    node = sole_consumer(normalized)
    if node is None or not is_op(node, "Mul"):
        return None, normalized
    weight = other_input(node, normalized)
    array = constant(weight)
    if weight is None or array is None or array.shape != (width,):
        return None, normalized
    return weight, node.outputs[0]
