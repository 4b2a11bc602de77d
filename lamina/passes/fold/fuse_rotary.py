"""Recognize interleaved rotary position embeddings and write the standard operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, constant, is_op, sole_consumer, substitute
from lamina.passes.fold.heads import dimension, packed, same_dim, same_dims
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    result: ir.Value


@dataclass(frozen=True)
class FuseRotary(LocalFold):
    """Replace the even/odd slices, products and restacking of a rotary embedding by ``RotaryEmbedding``.

    y[2i] = x[2i] cos - x[2i+1] sin and y[2i+1] = x[2i] sin + x[2i+1] cos. Where the heads were split off
    right before it, the operator runs on the unsplit tensor and the split follows, so that an attention
    that takes unsplit tensors needs no transposes at all.

    Fires: float32 x [b, h, t, d] with d known and even; cos and sin [t, d/2].
    Refuses: other layouts, partial rotation, shapes that are not certain.
    Effect: Rounding, a few ulps of max|y|.
    Cost: O(Concat nodes).
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """

    effect: ClassVar[Effect] = Rounding(ulps=4)
    paper: ClassVar[str] = "arXiv:2104.09864"
    minimum_opset: ClassVar[int] = 23
    anchors: ClassVar[tuple[str, ...]] = ("Concat",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The rotation that ends in stacking its two halves."""
        halves = [_unsqueezed_last(v) for v in node.inputs]
        if len(halves) != 2 or any(h is None for h in halves):
            return None
        difference, total = (h.producer() if h is not None else None for h in halves)
        if difference is None or total is None or not is_op(difference, "Sub") or not is_op(total, "Add"):
            return None
        restack = sole_consumer(node.outputs[0])
        if restack is None or not is_op(restack, "Reshape"):
            return "what it stacks is not reshaped back"
        found = _rotation(difference, total)
        if found is None:
            return "it does not rotate the even and odd elements of one tensor"
        x, cos, sin = found
        reason = _unfit(x, cos, sin, restack.outputs[0])
        return reason or _Match(x, cos, sin, restack.outputs[0])

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the operator on the unsplit tensor where there is one, else on the split one."""
        x, result, where = match.x, match.result, match.result.producer().name
        rewriter.at(match.result.producer())
        batch = dimension(rewriter, x, 0)
        tables = [_per_batch(v, batch, x.shape[0], rewriter) for v in (match.cos, match.sin)]
        source = packed(x)
        if source is None:
            substitute(rewriter, result, "RotaryEmbedding", [x, *tables], {"interleaved": 1})
        else:
            attributes = {"interleaved": 1, "num_heads": source.heads}
            turned = rewriter.op(
                "RotaryEmbedding",
                [source.value, *tables],
                attributes,
                name=f"{where}_rotary",
                dtype=x.dtype,
                shape=source.value.shape,
            )
            split = source.reshape.outputs[0]
            flags = {"allowzero": source.reshape.attributes.get_int("allowzero", 0)}
            again = [turned, source.reshape.inputs[1]]
            parts = rewriter.op(
                "Reshape", again, flags, name=f"{where}_split", dtype=x.dtype, shape=split.shape
            )
            substitute(rewriter, result, "Transpose", [parts], {"perm": [0, 2, 1, 3]})
        rewriter.record(self.name, where, "interleaved rotary embedding")


def _unsqueezed_last(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Unsqueeze") or value is None or value.shape is None:
        return None
    axes = constant(node.inputs[1])
    return node.inputs[0] if axes is not None and axes.tolist() in ([-1], [len(value.shape) - 1]) else None


def _rotation(difference: ir.Node, total: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin of the two halves; the even and odd slices tell which factor is which."""
    parts = [_product(v) for v in (*difference.inputs, *total.inputs)]
    if any(p is None for p in parts):
        return None
    (even, cos), (odd, sin), *rest = [p for p in parts if p is not None]
    if (even[1], odd[1]) != (0, 1) or even[0] is not odd[0]:
        return None
    return (even[0], cos, sin) if set(rest) == {(even, sin), (odd, cos)} else None


def _product(value: ir.Value | None) -> tuple[tuple[ir.Value, int], ir.Value] | None:
    """A product of every second element of a tensor with something: ((tensor, first element), something)."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Mul"):
        return None
    for i in (0, 1):
        half, factor = _every_second(node.inputs[i]), node.inputs[1 - i]
        if half is not None and factor is not None:
            return half, factor
    return None


def _every_second(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Slice") or len(node.inputs) < 5:
        return None
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    numbers = [constant(v) for v in node.inputs[1:5]]
    if any(n is None or n.size != 1 for n in numbers):
        return None
    start, end, axis, step = (int(n.reshape(-1)[0]) for n in numbers if n is not None)
    rank, size = len(source.shape), source.shape[-1]
    if step != 2 or axis not in (-1, rank - 1) or start not in (0, 1) or not isinstance(size, int):
        return None
    return (source, start) if size % 2 == 0 and end >= size else None


def _unfit(x: ir.Value, cos: ir.Value, sin: ir.Value, result: ir.Value) -> str | None:
    if x.shape is None or len(x.shape) != 4 or x.dtype is not ir.DataType.FLOAT:
        return "x is not known to be float32 [b, h, t, d]"
    for table in (cos, sin):
        if table.shape is None or len(table.shape) != 2 or not same_dim(table.shape[0], x.shape[2]):
            return "cos and sin are not known to be [t, d/2]"
    if result.shape is None or len(result.shape) != 4 or not same_dims(x, result, (0, 1, 2, 3)):
        return "the result is not known to have the shape of x"
    return None


def _per_batch(table: ir.Value, batch: ir.Value, dim: Any, rewriter: Rewriter) -> ir.Value:
    """[t, d/2] -> [b, t, d/2], the layout the operator wants without position ids."""
    rest = rewriter.constant(np.array([1, 1], np.int64), "lamina_rotary_ones")
    shape = rewriter.op("Concat", [batch, rest], {"axis": 0}, dtype=ir.DataType.INT64)
    dims = None if table.shape is None else ir.Shape([dim, *table.shape])
    return rewriter.op("Expand", [table, shape], dtype=table.dtype, shape=dims)
