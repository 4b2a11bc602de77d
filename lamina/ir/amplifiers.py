"""Nodes that can make an unbounded tensor out of a few numbers, found before anybody computes them.

onnx's inference with data propagation and constant folding both hold what such a node makes, so a file of a
hundred bytes could ask for terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

# operator -> the inputs whose values decide how much it makes
_SIZES: dict[str, tuple[int, ...]] = {
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Tile": (1,),
    "Pad": (1,),
    "OneHot": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}
# What hands numbers on by its first input only: the others are places, not amounts.
_FIRST_ONLY = frozenset(
    {"Slice", "Gather", "Squeeze", "Unsqueeze", "Cast", "Split", "Transpose", "Identity", "Flatten"}
    | {"ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin"}
)
_LIMIT = 1 << 22  # elements: a few seconds of inference
_ENDLESS = 1 << 62


def heavy_nodes(nodes: Iterable[ir.Node], limit: int = _LIMIT) -> list[ir.Node]:
    """Those of ``nodes`` that may make more than ``limit`` elements from constants.

    An upper bound is taken: the product of all numbers that reach a size, so that what is left out is safe.
    Shapes that values state are believed. Linear in the nodes behind each size.
    """
    return [n for n in nodes if amplifies(n) and _bound(n, limit) > limit]


def amplifies(node: ir.Node) -> bool:
    """Whether the size of what ``node`` makes is among its inputs' values."""
    return node.op_type in _SIZES and node.domain in ("", "ai.onnx")


def _bound(node: ir.Node, limit: int) -> int:
    sizes = [node.inputs[i] for i in _SIZES[node.op_type] if i < len(node.inputs)]
    total = 1
    data = node.inputs[0] if node.op_type != "Range" and node.inputs else None
    if data is not None and data not in sizes and data.shape is not None:
        total = math.prod(d for d in data.shape if isinstance(d, int) and d)
    for number in _numbers([v for v in sizes if v is not None]):
        total *= number
        if total > limit:
            return _ENDLESS
    return total


def _numbers(values: list[ir.Value]) -> Iterator[int]:
    """Every number above one that may end up in one of ``values``."""
    pending, seen = list(values), set(values)
    while pending:
        value = pending.pop()
        if value.const_value is not None:
            yield from _constants(value.const_value)
            continue
        node = value.producer()
        if node is None:
            continue
        first = node.inputs[0] if node.inputs else None
        if node.op_type in ("Shape", "Size") and first is not None and first.shape is not None:
            yield from (d for d in first.shape if isinstance(d, int) and d > 1)
            continue
        reads = node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs
        fresh = [v for v in reads if v is not None and v not in seen]
        seen.update(fresh)
        pending += fresh


def _constants(tensor: ir.TensorProtocol) -> Iterator[int]:
    if tensor.dtype == ir.DataType.STRING or not (tensor.dtype.is_integer() or tensor.size <= 8):
        return  # a weight: its numbers are no sizes
    array = np.abs(tensor.numpy().astype(np.float64)).reshape(-1)
    array = np.where(np.isnan(array), 1, np.minimum(array, _ENDLESS))
    top = array if array.size <= 64 else array.max(keepdims=True)  # no tensor has more dims than that
    yield from (math.ceil(number) for number in top if number > 1)
