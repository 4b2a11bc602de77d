"""How attention heads are laid out: split off [b, t, h d] by reshaping and transposing, and repeated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, constant, is_op, sole_consumer

_SWAP = (0, 2, 1, 3)


@dataclass(frozen=True)
class Packed:
    """A [b, t, heads x size] tensor that a [b, heads, t, size] one is made from."""

    value: ir.Value
    heads: int
    reshape: ir.Node


def same_dim(a: object, b: object) -> bool:
    """Whether two dims are certainly equal: the same number, or the same symbol."""
    first, second = (getattr(d, "value", d) for d in (a, b))
    return first is not None and first == second


def same_dims(a: ir.Value | None, b: ir.Value | None, axes: tuple[int, ...]) -> bool:
    """Whether two values certainly agree in these axes."""
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    return all(same_dim(a.shape[i], b.shape[i]) for i in axes)


def permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """The permutation of a Transpose that states one."""
    if node is None or not is_op(node, "Transpose"):
        return None
    perm = attribute(node, "perm", None)
    return None if perm is None else tuple(perm)


def packed(value: ir.Value | None, perm: tuple[int, ...] = _SWAP) -> Packed | None:
    """What ``value`` was split from, if it is Transpose(Reshape(x)) that only splits heads off."""
    transpose = None if value is None else value.producer()
    if transpose is None or permutation(transpose) != perm:
        return None
    split = transpose.inputs[0]
    reshape = None if split is None else split.producer()
    if split is None or reshape is None or not is_op(reshape, "Reshape"):
        return None
    source = reshape.inputs[0]
    if source is None or source.shape is None or split.shape is None:
        return None
    if len(source.shape) != 3 or len(split.shape) != 4 or not same_dims(source, split, (0, 1)):
        return None
    heads, size = split.shape[2], split.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int) or source.shape[2] != heads * size:
        return None
    return Packed(source, heads, reshape)


def merged(value: ir.Value, width: int) -> ir.Value | None:
    """The [b, t, h d] value that ``value``, [b, h, t, d], is only put together to."""
    transpose = sole_consumer(value)
    if transpose is None or permutation(transpose) != _SWAP:
        return None
    reshape = sole_consumer(transpose.outputs[0])
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    split, result = transpose.outputs[0], reshape.outputs[0]
    if result.shape is None or len(result.shape) != 3 or result.shape[2] != width:
        return None
    return result if same_dims(split, result, (0, 1)) else None


def unrepeated(value: ir.Value) -> ir.Value:
    """The grouped heads [b, g, t, d] that ``value`` repeats n times each, or ``value`` itself."""
    reshape = value.producer()
    expanded = reshape.inputs[0] if reshape is not None and is_op(reshape, "Reshape") else None
    expand = None if expanded is None else expanded.producer()
    unsqueezed = expand.inputs[0] if expand is not None and is_op(expand, "Expand") else None
    unsqueeze = None if unsqueezed is None else unsqueezed.producer()
    if expanded is None or unsqueeze is None or not is_op(unsqueeze, "Unsqueeze"):
        return value
    source, axes = unsqueeze.inputs[0], constant(unsqueeze.inputs[1])
    if source is None or axes is None or axes.tolist() != [2]:
        return value
    return source if _repeats(source, expanded, value) else value


def _repeats(source: ir.Value, expanded: ir.Value, result: ir.Value) -> bool:
    if source.shape is None or expanded.shape is None or result.shape is None:
        return False
    if (len(source.shape), len(expanded.shape), len(result.shape)) != (4, 5, 4):
        return False
    groups, times, heads = source.shape[1], expanded.shape[2], result.shape[1]
    if not (isinstance(groups, int) and isinstance(times, int) and isinstance(heads, int)):
        return False
    pairs = ((0, 0), (1, 1), (2, 3), (3, 4))
    kept = all(same_dim(source.shape[i], expanded.shape[j]) for i, j in pairs)
    return kept and heads == groups * times and same_dims(source, result, (0, 2, 3))


def dimension(rewriter: Rewriter, value: ir.Value, axis: int) -> ir.Value:
    """The size of one dimension as a one-element tensor, at the rewriter's anchor.

    It is read off an interface input where one has that dimension: read off an activation, it would keep the
    layer that gives the activation alive after a later pass drops it.
    """
    dim = None if value.shape is None else value.shape[axis]
    if isinstance(dim, int):
        return rewriter.constant(np.array([dim], np.int64), "lamina_dimension")
    source, at = value, axis
    for port in rewriter.graph.inputs:
        for i, other in enumerate(port.shape or ()):
            if same_dim(dim, other):
                source, at = port, i
    return rewriter.op("Shape", [source], {"start": at, "end": at + 1}, dtype=ir.DataType.INT64)
