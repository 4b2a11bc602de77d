"""Affine operators with constant coefficients: y = x * scale + shift, per element or per channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.ir.semantics import is_fenced
from lamina.passes.fold.graph import attribute, constant, is_op, rank_of
from lamina.passes.fold.linear import Array, wide

AFFINE: tuple[str, ...] = ("Mul", "Div", "Add", "Sub", "Neg", "BatchNormalization")
_FLOATS = ("float16", "float32", "float64")
_ONE, _ZERO = np.ones(()), np.zeros(())


@dataclass(frozen=True)
class Affine:
    """One operator y = x * scale + shift.

    Attributes:
        node: The operator.
        source: The x.
        scale: What x is multiplied by, in double precision.
        shift: What is added to that, in double precision.
        constants: The values the two come from.
        vector: Whether they are vectors along axis 1, as a BatchNormalization has them, rather than
            arrays that broadcast from the last axis.
    """

    node: ir.Node
    source: ir.Value
    scale: Array
    shift: Array
    constants: tuple[ir.Value, ...]
    vector: bool = False

    @property
    def scales(self) -> bool:
        """Whether it multiplies."""
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        """Whether it adds."""
        return bool((self.shift != 0).any())

    def along(self, rank: int | None, axis: int, channels: int) -> tuple[Array, Array] | None:
        """Scale and shift as scalars or vectors over the channels at ``axis``, counted from the end.

        None where they vary over anything else, or might broadcast x to another shape.
        """
        if self.vector:
            fits = rank is not None and axis == 1 - rank and self.scale.shape == (channels,)
            return (self.scale, self.shift) if fits else None
        scale, shift = (_flat(a, rank, axis, channels) for a in (self.scale, self.shift))
        return None if scale is None or shift is None else (scale, shift)

    def keeps_shape(self, rank: int, axis: int, channels: int) -> bool:
        """Whether y has certainly the shape of x, x having ``channels`` at ``axis``."""
        if self.vector or self.scale.ndim == self.shift.ndim == 0:
            return True
        known = rank_of(self.source)
        if known != rank or self.source.shape is None:
            return False
        return self.scale.size == self.shift.size == 1 or self.source.shape[axis] == channels


def _flat(array: Array, rank: int | None, axis: int, channels: int) -> Array | None:
    if array.ndim > (1 if rank is None else rank):
        return None
    if array.size == 1:
        return array.reshape(())
    if array.ndim < -axis or array.shape[axis] != channels or array.size != channels:
        return None
    return array.reshape(channels)


def affine_at(node: ir.Node | None) -> Affine | None:
    """``node`` as an affine operator with constant coefficients, or None."""
    if node is None or not is_op(node, *AFFINE):
        return None
    if node.op_type == "BatchNormalization":
        return None if is_fenced(node) else _normalization(node)
    if node.op_type == "Neg":
        return _negation(node)
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or (first.const_value is None and second.const_value is None):
        return None
    left, right = constant(first), constant(second)
    if (left is None) == (right is None) or is_fenced(node):
        return None
    one, zero = _ONE, _ZERO
    source, operand, array = (first, second, right) if left is None else (second, first, left)
    if array is None or array.dtype.name not in _FLOATS or not array.size:
        return None
    number = wide(array)
    if node.op_type == "Add":
        return Affine(node, source, one, number, (operand,))
    if node.op_type == "Sub":
        return Affine(
            node, source, one if left is None else -one, -number if left is None else number, (operand,)
        )
    if node.op_type == "Mul":
        return Affine(node, source, number, zero, (operand,))
    if left is not None:
        return None
    with np.errstate(divide="ignore"):
        return Affine(node, source, 1 / number, zero, (operand,))


def _negation(node: ir.Node) -> Affine | None:
    source = node.inputs[0]
    known = source is not None and source.dtype is not None and source.dtype.is_floating_point()
    if source is None or not known or is_fenced(node):
        return None
    return Affine(node, source, -_ONE, _ZERO, ())


def _normalization(node: ir.Node) -> Affine | None:
    source, parameters = node.inputs[0], node.inputs[1:5]
    arrays = [constant(v) for v in parameters]
    if source is None or len(arrays) != 4 or any(a is None or a.dtype.name not in _FLOATS for a in arrays):
        return None
    gamma, beta, mean, variance = (wide(a) for a in arrays if a is not None)
    if not (gamma.shape == beta.shape == mean.shape == variance.shape) or gamma.ndim != 1:
        return None
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    values = tuple(v for v in parameters if v is not None)
    return Affine(node, source, scale, beta - mean * scale, values, vector=True)
