"""Operators whose inputs and attributes changed places between opsets, written for the builder's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from graphs import Builder, Dim, Shape, Val

BIG = 2**63 - 1


def longs(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def reduce(b: Builder, kind: str, x: Val, axes: tuple[int, ...], *, keep: bool = True) -> Val:
    """ReduceMean, ReduceSum, ReduceMax...; axes counted from the end become positive before opset 11."""
    rank = x.rank
    wanted = {a % rank for a in axes}
    shape: list[Dim] = []
    for i, d in enumerate(x.shape):
        if i not in wanted:
            shape.append(d)
        elif keep:
            shape.append(1)
    given = list(axes) if b.opset >= 11 else sorted(wanted)
    keepdims = None if keep and b.chance(0.5) else int(keep)
    if b.opset >= (13 if kind == "ReduceSum" else 18):
        return b.op(kind, [x, longs(*given)], tuple(shape), x.dtype, keepdims=keepdims)
    return b.op(kind, [x], tuple(shape), x.dtype, axes=given, keepdims=keepdims)


def unsqueeze(b: Builder, x: Val, axis: int, **options: Any) -> Val:
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    if b.opset >= 13:
        return b.op("Unsqueeze", [x, longs(axis)], shape, x.dtype, exact=x.exact, **options)
    return b.op("Unsqueeze", [x], shape, x.dtype, exact=x.exact, axes=[axis], **options)


def squeeze(b: Builder, x: Val, axis: int) -> Val:
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    if b.opset >= 13:
        return b.op("Squeeze", [x, longs(axis)], shape, x.dtype, exact=x.exact)
    return b.op("Squeeze", [x], shape, x.dtype, exact=x.exact, axes=[axis])


def slice_(b: Builder, x: Val, axis: int, start: int, end: int, step: int, dim: Dim, **options: Any) -> Val:
    """A slice of one axis whose length the caller knows to be ``dim``; step 1 only before opset 10."""
    shape = (*x.shape[:axis], dim, *x.shape[axis + 1 :])
    if b.opset >= 10:
        reads: list[Any] = [x, longs(start), longs(end), longs(axis)]
        if step != 1 or b.chance(0.5):
            reads.append(longs(step))
        return b.op("Slice", reads, shape, x.dtype, exact=x.exact, **options)
    return b.op(
        "Slice", [x], shape, x.dtype, exact=x.exact, starts=[start], ends=[end], axes=[axis], **options
    )


def clip(b: Builder, x: Val, low: float | None, high: float | None) -> Val:
    if b.opset < 11:
        return b.op("Clip", [x], x.shape, x.dtype, exact=x.exact, min=low, max=high)
    reads: list[Any] = [x, None if low is None else np.array(low, x.dtype)]
    if high is not None:
        reads.append(np.array(high, x.dtype))
    if reads[-1] is None:
        reads.pop()
    return b.op("Clip", reads, x.shape, x.dtype, exact=x.exact)


def pad(b: Builder, x: Val, pads: list[int], value: float = 0.0, mode: str = "constant") -> Val:
    """``pads`` as the operator takes them: all begins, then all ends."""
    rank = x.rank
    added = [pads[i] + pads[i + rank] for i in range(rank)]
    shape = tuple(d if not a else d + a for d, a in zip(x.shape, added, strict=True))  # type: ignore[operator]
    named = None if mode == "constant" and b.chance(0.5) else mode
    if b.opset < 11:
        return b.op("Pad", [x], shape, x.dtype, exact=x.exact, pads=pads, value=value, mode=named)
    reads: list[Any] = [x, longs(*pads)]
    if value or (mode == "constant" and b.chance(0.5)):
        reads.append(np.array(value, x.dtype))
    return b.op("Pad", reads, shape, x.dtype, exact=x.exact, mode=named)


def dropout(b: Builder, x: Val) -> Val:
    if b.opset < 12:
        return b.op("Dropout", [x], x.shape, x.dtype, exact=x.exact, ratio=0.3)
    reads: list[Any] = [x]
    if b.chance(0.6):
        reads.append(np.array(0.3, np.float32))
        if b.chance(0.5):
            reads.append(np.array(False))
    return b.op("Dropout", reads, x.shape, x.dtype, exact=x.exact)


def split(b: Builder, x: Val, axis: int, sizes: list[int]) -> list[Val]:
    results = [((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype) for size in sizes]
    if b.opset >= 13:
        if b.opset >= 18 and len(set(sizes)) == 1 and b.chance(0.5):
            return b.ops("Split", [x], results, exact=x.exact, axis=axis, num_outputs=len(sizes))
        return b.ops("Split", [x, longs(*sizes)], results, exact=x.exact, axis=axis)
    return b.ops("Split", [x], results, exact=x.exact, axis=axis, split=sizes)


def softmax(b: Builder, x: Val, axis: int = -1, **options: Any) -> Val:
    last = axis % x.rank
    plain = b.opset >= 13 and last == x.rank - 1 and b.chance(0.3)
    stated = None if plain else axis if b.opset >= 11 else last
    return b.op("Softmax", [x], x.shape, x.dtype, axis=stated, **options)


def transpose(b: Builder, x: Val, *perm: int) -> Val:
    return b.op("Transpose", [x], tuple(x.shape[i] for i in perm), x.dtype, exact=x.exact, perm=list(perm))


def reshape(b: Builder, x: Val, target: list[int], shape: Shape) -> Val:
    return b.op("Reshape", [x, longs(*target)], shape, x.dtype, exact=x.exact)


def matmul(b: Builder, x: Val, w: Val | np.ndarray, shape: Shape) -> Val:
    return b.op("MatMul", [x, w], shape, x.dtype)


def either(b: Builder, op_type: str, first: Any, second: Any, shape: Shape, dtype: Any) -> Val:
    """A commutative operator with its operands in either order."""
    reads = [first, second] if b.chance(0.5) else [second, first]
    return b.op(op_type, reads, shape, dtype)
