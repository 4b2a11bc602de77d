"""Example inputs made up from a model's interface, valid enough to run it."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lamina.errors import DataError

# Made-up sizes of the first axis, of an image's others and of any others; the first that stay small are used.
_SIZES = ((2, 64, 8), (2, 8, 4), (2, 2, 2), (1, 1, 1))
_SMALL, _LIMIT = 1 << 24, 1 << 28  # elements of one input
# Operators that hand index values on unchanged (or a subset of them), by input position.
_CARRIERS = frozenset(
    {
        "Cast",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Transpose",
        "Expand",
        "Slice",
        "Concat",
    }
    | {"Tile", "Split", "Where", "Clip"}
)
_LOOKUPS = {"Gather": ((1, 0),), "EmbedLayerNormalization": ((0, 2), (1, 3))}


def synthesize(model: ir.Model) -> dict[str, np.ndarray]:
    """One array an input: the same symbolic dim gets the same size, ids stay inside their tables.

    Floats are standard normal, masks ones, integers in the range of the smallest table they index
    (0 and 1 where they index none); the seed is fixed.

    Raises:
        DataError: The fixed dims of an input alone make it too large to be made up.
    """
    values = [v for v in model.graph.inputs if v.name and v.name not in model.graph.initializers]
    shapes = _shapes(values)
    return {v.name: draw_values(v, s) for v, s in zip(values, shapes, strict=True) if v.name}


def _shapes(values: Sequence[ir.Value]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for defaults in _SIZES:
        sizes: dict[str, int] = {}
        shapes = [tuple(_size(v, i, d, sizes, defaults) for i, d in enumerate(v.shape or ())) for v in values]
        if all(math.prod(shape) <= _SMALL for shape in shapes):
            return shapes
    for value, shape in zip(values, shapes, strict=True):
        if math.prod(shape) > _LIMIT:
            raise DataError(
                f"input '{value.name}' has {math.prod(shape):,} elements: no example of it is made up",
                advice="give example_inputs, or a model whose inputs fit into memory",
            )
    return shapes


def _size(
    value: ir.Value,
    axis: int,
    dim: int | ir.SymbolicDim,
    sizes: dict[str, int],
    defaults: tuple[int, int, int],
) -> int:
    made_up = _default(value, axis, defaults)
    if isinstance(dim, int):
        return dim if dim >= 0 else made_up
    symbol = str(dim.value) if dim.value is not None else ""
    if not symbol:
        return made_up
    known = evaluate_dim(symbol, sizes)
    if known is None:
        known = sizes[symbol] = made_up
    return known


def _default(value: ir.Value, axis: int, defaults: tuple[int, int, int]) -> int:
    batch, spatial, other = defaults
    if axis == 0:
        return batch
    image = value.dtype is not None and value.dtype.is_floating_point() and len(value.shape or ()) >= 4
    return spatial if image else other


def evaluate_dim(symbol: str, sizes: dict[str, int]) -> int | None:
    """A known symbol, or a sum, difference or product such as ``past_length + 1``."""
    if symbol in sizes:
        return sizes[symbol]
    parts = re.split(r"\s*([-+*])\s*", symbol.strip())
    if len(parts) < 3:
        return None
    terms = [int(p) if p.isdecimal() and len(p) <= 12 else sizes.get(p) for p in parts[0::2]]
    if any(t is None for t in terms):
        return None
    total = terms[0] or 0
    for sign, term in zip(parts[1::2], terms[1:], strict=True):
        total = total * (term or 0) if sign == "*" else total + (term or 0) * (1 if sign == "+" else -1)
    return max(total, 1)


def draw_values(
    value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator | None = None
) -> np.ndarray:
    """One array the input ``value`` accepts; without ``rng`` always the same one for its name and shape."""
    name = value.name or ""
    dtype = value.dtype or ir.DataType.FLOAT
    rng = np.random.default_rng(zlib.crc32(name.encode())) if rng is None else rng
    if dtype == ir.DataType.STRING:
        return np.full(shape, "a", dtype=object)
    kind = dtype.numpy()
    if dtype == ir.DataType.BOOL or "mask" in name.lower():
        return np.ones(shape, kind)
    if dtype.is_integer():
        return rng.integers(0, table_rows(value), shape).astype(kind)
    if np.dtype(kind).kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(kind)
    return rng.standard_normal(shape).astype(kind)


def table_rows(value: ir.Value) -> int:
    """Rows of the smallest table the value's elements index, 2 when they index none."""
    rows = math.inf
    seen, queue = {value}, [value]
    while queue:
        for node, index in tuple(queue.pop().uses()):
            rows = min([rows, *_indexed(node, index)])
            if node.op_type in _CARRIERS or (node.op_type == "Gather" and index == 0):
                fresh = [v for v in node.outputs if v not in seen]
                seen.update(fresh)
                queue += fresh
    return max(1, int(rows)) if rows < math.inf else 2


def _indexed(node: ir.Node, index: int) -> Iterator[int]:
    for position, table in _LOOKUPS.get(node.op_type, ()):
        data = node.inputs[table] if table < len(node.inputs) else None
        if position != index or data is None or data.shape is None:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        size = data.shape[axis] if -len(data.shape) <= axis < len(data.shape) else None
        if isinstance(size, int):
            yield size
