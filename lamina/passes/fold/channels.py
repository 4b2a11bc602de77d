"""Follow one axis of a tensor, its channels, through operators that treat all channels alike.

Such an operator commutes with every linear map over the channels. Axes count from the end (-1 is the last),
so that broadcasting does not move them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.ir.semantics import is_fenced
from lamina.passes.fold.graph import attribute, constant, is_op, rank_of
from lamina.passes.fold.heads import same_dim

_SAME = ("Identity", "Neg", "Dropout")
_SUMS = ("Add", "Sub", "Sum")
_MOVES = ("Slice", "Transpose", "Unsqueeze", "Squeeze", "Gather")
_DEPTH = 8
_POOLS = ("GlobalAveragePool", "AveragePool")


def channels_of(value: ir.Value | None, axis: int, depth: int = _DEPTH) -> int | None:
    """The size of ``axis`` where it is a known number; 1 where a broadcast value lacks the axis."""
    if value is None or value.shape is None:
        return None
    if len(value.shape) < -axis:
        return 1
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    # Shape inference gives up on all axes of a Slice whose end is computed, not just on the sliced one.
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or source.shape is None or not depth or not is_op(node, *_MOVES):
        return None
    at = _moved(node, axis, list(source.shape))
    return None if at is None else channels_of(source, at - len(source.shape), depth - 1)


def link(node: ir.Node, axis: int) -> dict[int, int] | None:
    """Which operands carry the channels that are ``axis`` of the first output, each at which axis of its own.

    None where the operator mixes or scales channels, or where it cannot be told.
    """
    output = node.outputs[0]
    size = channels_of(output, axis)
    if size is None or size < 2 or is_fenced(node) or any(v.name for v in node.outputs[1:]):
        return None
    found = _operands(node, axis, size)
    if not found or any(channels_of(node.inputs[i], a) != size for i, a in found.items()):
        return None
    return found


def linked_output(node: ir.Node, operand: int, axis: int) -> int | None:
    """The axis of the first output that ``axis`` of this operand becomes; the inverse of :func:`link`."""
    rank = rank_of(node.outputs[0]) if node.outputs else None
    for candidate in range(-1, -1 - (rank or 0), -1):
        found = link(node, candidate)
        if found is not None and found.get(operand) == axis:
            return candidate
    return None


def _operands(node: ir.Node, axis: int, size: int) -> dict[int, int] | None:
    source = node.inputs[0] if node.inputs else None
    if is_op(node, *_SUMS):
        return {i: axis for i in range(len(node.inputs))}
    if is_op(node, "Concat"):
        return _beside(node, axis)
    if is_op(node, "Mul", "Div"):
        return _scaled(node, axis, size)
    if source is None or source.shape is None:
        return None
    if is_op(node, *_SAME) or (is_op(node, "Expand") and channels_of(source, axis) == size):
        return {0: axis}
    found = _moved(node, axis, list(source.shape))
    return None if found is None else {0: found - len(source.shape)}


def _beside(node: ir.Node, axis: int) -> dict[int, int] | None:
    rank = rank_of(node.outputs[0])
    along = attribute(node, "axis", None)
    if rank is None or along is None or (along % rank) == axis + rank:
        return None
    return {i: axis for i in range(len(node.inputs))}


def _scaled(node: ir.Node, axis: int, size: int) -> dict[int, int] | None:
    """The operand that carries the channels, if the other one is the same for all of them."""
    sizes = [channels_of(v, axis) for v in node.inputs]
    if sizes == [size, 1]:
        return {0: axis}
    return {1: axis} if sizes == [1, size] and node.op_type == "Mul" else None


def _moved(node: ir.Node, axis: int, dims: list[Any]) -> int | None:
    """The position in the first operand, counted from the front, of ``axis`` of the output."""
    output = node.outputs[0]
    if output.shape is None:
        return None
    rank, at = len(output.shape), axis + len(output.shape)
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm", None) or list(range(rank))[::-1]
        return int(perm[at])
    if is_op(node, "Unsqueeze", "Squeeze", "ReduceMean", "ReduceSum"):
        return _squeezed(node, at, len(dims), rank)
    if is_op(node, "Reshape", "Flatten"):
        return _reshaped(dims, list(output.shape), at)
    if is_op(node, "Slice"):
        axes = _listed(node, 3)
        return at if axes is not None and at not in {a % rank for a in axes} else None
    if is_op(node, "Gather"):
        return _gathered(node, at, len(dims))
    if is_op(node, *_POOLS):
        return at if at == 1 else None
    return None


def _listed(node: ir.Node, index: int) -> list[int] | None:
    """The axes that an attribute or a constant input states."""
    stated = attribute(node, "axes", None)
    if stated is None and len(node.inputs) > index:
        array = constant(node.inputs[index])
        stated = None if array is None else array.reshape(-1).tolist()
    return None if not stated else [int(a) for a in stated]


def _squeezed(node: ir.Node, at: int, rank_in: int, rank_out: int) -> int | None:
    axes = _listed(node, 1)
    if axes is None:
        return None
    if is_op(node, "Unsqueeze"):
        added = {a % rank_out for a in axes}
        return None if at in added else [p for p in range(rank_out) if p not in added].index(at)
    removed = {a % rank_in for a in axes}
    if not is_op(node, "Squeeze") and attribute(node, "keepdims", 1):
        return None if at in removed else at
    return [p for p in range(rank_in) if p not in removed][at]


def _reshaped(dims: list[Any], new: list[Any], at: int) -> int | None:
    """A reshape keeps the last axis if its size stays, and any other if all before it stays too."""
    if at == len(new) - 1 and same_dim(dims[-1] if dims else None, new[-1]):
        return len(dims) - 1
    kept = at < len(dims) and all(same_dim(a, b) for a, b in zip(dims[: at + 1], new[: at + 1], strict=True))
    return at if kept else None


def _gathered(node: ir.Node, at: int, rank_in: int) -> int | None:
    indices = rank_of(node.inputs[1])
    if indices is None:
        return None
    along = attribute(node, "axis", 0) % rank_in
    if at < along:
        return at
    return at - indices + 1 if at >= along + indices else None


def replace_constant(
    rewriter: Rewriter,
    old: ir.Value,
    array: np.ndarray[Any, Any],
    suffix: str,
    *,
    readers: tuple[ir.Node, ...] = (),
) -> ir.Value:
    """Give the readers of a constant (all, or these) another one; the old one leaves when nobody is left."""
    new = rewriter.constant(array, f"{old.name}_{suffix}")
    for use in tuple(old.uses()):
        if not readers or use.node in readers:
            use.node.replace_input_with(use.idx, new)
    discard(rewriter, old)
    return new


def discard(rewriter: Rewriter, value: ir.Value | None) -> None:
    """Take an initializer out of the graph if nobody reads it."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.name and rewriter.graph.initializers.get(value.name) is value:
        del rewriter.graph.initializers[value.name]
