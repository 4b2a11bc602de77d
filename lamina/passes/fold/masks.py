"""Reading attention masks: is an additive mask the causal one, whatever the length?"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lamina.passes.fold.graph import constant, is_op
from lamina.passes.fold.heads import same_dim

_LARGEST = 1 << 22  # elements of a table that are worth reading
_CLOSED = -1e9  # exp is 0 in float32 below it, unless two scores of a row lie a billion apart

_MOVES = (
    *("Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Transpose", "Identity", "Gather"),
    *("Tile", "Flatten", "Trilu"),
)


def is_causal(mask: ir.Value) -> bool:
    """Whether ``mask`` is [..., t, t], 0 on and below the diagonal and closed above it.

    It is when it is cut from the upper left corner of a constant that is.
    """
    if mask.shape is None or len(mask.shape) < 2 or not same_dim(mask.shape[-1], mask.shape[-2]):
        return False
    value: ir.Value | None = mask
    while value is not None and _is_corner(value.producer()):
        node = value.producer()
        value = None if node is None else node.inputs[0]
    if value is None or value.const_value is None or value.const_value.size > _LARGEST:
        return False
    table = constant(value)
    if table is None or table.ndim < 2 or table.dtype != np.float32:
        return False
    rows, columns = table.shape[-2:]
    if rows != columns or table.size != rows * columns:
        return False
    table, above = table.reshape(rows, columns), np.triu(np.ones((rows, columns), bool), 1)
    return bool((table[above] <= _CLOSED).all()) and not table[~above].any()


def _is_corner(node: ir.Node | None) -> bool:
    """Whether a Slice starts at 0 and takes every element up to its end."""
    if node is None or not is_op(node, "Slice"):
        return False
    starts = constant(node.inputs[1])
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else np.ones(1)
    return starts is not None and steps is not None and not starts.any() and bool((steps == 1).all())


def may_hold_lowest(mask: ir.Value, depth: int = 32) -> bool:
    """Whether a float32 mask may hold the lowest finite float: unless all it is made of is seen not to.

    What is fed, and what comes out of arithmetic, may.
    """
    array = constant(mask)
    if array is not None:
        return bool((array == np.finfo(np.float32).min).any())
    node = mask.producer()
    if node is None or depth == 0:
        return True
    if is_op(node, "Where"):
        sources = node.inputs[1:]
    elif is_op(node, *_MOVES):
        sources = node.inputs[:1]
    elif is_op(node, "Concat"):
        sources = node.inputs
    else:
        return not (is_op(node, "Cast") and _is_whole(node.inputs[0]))
    return any(v is None or may_hold_lowest(v, depth - 1) for v in sources)


def _is_whole(value: ir.Value | None) -> bool:
    """Whether a value is boolean or an integer: none of them becomes the lowest float."""
    kind = None if value is None else value.dtype
    return kind is not None and (kind == ir.DataType.BOOL or kind.is_integer())
