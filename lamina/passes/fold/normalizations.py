"""How exporters spell a normalization: squares, means over the last axes, roots and their inverses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.passes.fold.graph import attribute, constant, is_op, rank_of, scalar, sole_consumer


@dataclass(frozen=True)
class Root:
    """The square root of a value, or one over it, and the nodes that compute it."""

    value: ir.Value
    inverse: bool
    nodes: tuple[ir.Node, ...]


def squared(value: ir.Value | None) -> ir.Value | None:
    """The x of which ``value`` is x * x or x ** 2."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if is_op(node, "Pow") and scalar(node.inputs[1], rank_of(node.inputs[0])) == 2.0:
        return node.inputs[0]
    return None


def averaged_axes(node: ir.Node, rank: int) -> int | None:
    """How many last axes a ReduceMean averages, keeping them as ones; None where it does not do that."""
    axes = attribute(node, "axes", None)
    if axes is None and len(node.inputs) > 1:
        array = constant(node.inputs[1])
        axes = None if array is None else array.reshape(-1).tolist()
    if not axes or attribute(node, "keepdims", 1) != 1:
        return None
    counted = sorted({int(a) % rank for a in axes}) if rank else []
    last = list(range(rank - len(counted), rank))
    return len(counted) if counted == last and len(counted) == len(axes) else None


def root_of(variance: ir.Value) -> Root | None:
    """The root of ``variance`` in any of its spellings, if nothing else reads what lies on the way."""
    node = sole_consumer(variance)
    if node is None:
        return None
    if is_op(node, "Pow") and node.inputs[0] is variance:
        exponent = scalar(node.inputs[1], rank_of(variance))
        return Root(node.outputs[0], exponent == -0.5, (node,)) if exponent in (0.5, -0.5) else None
    if not is_op(node, "Sqrt"):
        return None
    value = node.outputs[0]
    above = sole_consumer(value)
    if above is not None and _is_reciprocal(above, value):
        return Root(above.outputs[0], True, (node, above))
    return Root(value, False, (node,))


def _is_reciprocal(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, "Div"):
        return node.inputs[1] is value and scalar(node.inputs[0], rank_of(value)) == 1.0
    return is_op(node, "Reciprocal")


def affine_constant(value: ir.Value | None, dims: tuple[int, ...], rank: int) -> np.ndarray[Any, Any] | None:
    """The content of a float32 constant of shape ``dims``, ones in front allowed up to ``rank``, as ``dims``.

    Ones in front need a reshaped copy, so only a constant that nobody else reads may have them.
    """
    array = constant(value)
    if value is None or array is None or array.dtype != np.float32 or array.ndim > rank:
        return None
    extra = array.ndim - len(dims)
    if extra < 0 or array.shape != (1,) * extra + dims:
        return None
    return array.reshape(dims) if extra == 0 or len(value.uses()) == 1 else None
