"""Add a branch's last bias where its skip comes from: into the bias of the normalization that writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.ir.semantics import is_fenced
from lamina.passes.fold.graph import (
    LocalFold,
    attribute,
    constant,
    consumers,
    is_op,
    normalized_axis,
    other_input,
    rank_of,
    sole_consumer,
    sweep,
)
from lamina.passes.fold.linear import Array, Linear, linear_at, linear_of, rounded, with_carrier, write
from lamina.passes.pass_ import Effect, Rounding

# Largest bias to absorb, in gains of the normalization: readers subtract it again, and digits go with it.
_LARGEST = 2.0


@dataclass(frozen=True)
class _Match:
    last: Linear  # the branch's last operator, with the Add that goes
    total: ir.Node  # the residual sum
    shift: Array  # the normalization's new bias
    readers: tuple[tuple[Linear, Array], ...]  # the branch's first operators, with their new biases


@dataclass(frozen=True)
class AbsorbResidualBias(LocalFold):
    """x + (branch(x) + c) with x = norm(..) + h  ->  x' + branch'(x') with x' = norm(..) + (h + c).

    The normalization adds a bias anyway, so an addition over the whole tensor goes. What else reads x
    subtracts c again in a bias of its own: W x + b = W x' + (b - W c).

    Fires: float32 LayerNormalization over the last axis that feeds a residual sum; the branch ends in
    MatMul and Add of a constant vector; every other reader of x is a MatMul or Gemm with constant weight
    and bias.
    Refuses: any other reader, or one without a bias; the interface shows x; a bias c above twice the largest
    gain of the normalization, which would cost digits.
    Effect: Rounding; folded in double precision and rounded once.
    Cost: O(nodes) and one vector-matrix product a reader.
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    anchors: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The branch whose last bias can go, and the readers' new biases."""
        x = node.outputs[0]
        sums = [(n, found) for n in consumers(x) if (found := _last(n, x)) is not None]
        if len(sums) != 1 or not _is_plain(node):
            return None
        total, last = sums[0]
        if x.is_graph_output():
            return f"the interface shows '{x.name}'"
        gain, bias = constant(node.inputs[1]), _bias(node)
        assert last.offset is not None
        if gain is None or bias is None or gain.shape != last.offset.shape:
            return "the normalization's gain or bias is no constant vector"
        if np.abs(last.offset).max() > _LARGEST * np.abs(gain).max():
            return "the bias is large beside what the normalization gives"
        shift = rounded(bias + last.offset, np.dtype(np.float32))
        if shift is None:
            return "the sum of the biases overflows"
        added = shift.astype(np.float64) - bias  # what is really added, rounding included
        readers = []
        for use in x.uses():
            if use.node is total or is_op(use.node, "Shape", "Size"):
                continue
            reader = _reader(use, added) if use.node.graph is node.graph else "a subgraph reads it"
            if isinstance(reader, str):
                return reader
            readers.append(reader)
        return _Match(last, total, shift, tuple(readers)) if readers else "nothing but the sum reads it"

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Move the bias and take it from the readers."""
        shift = rewriter.constant(match.shift, f"{match.last.bias.name}_absorbed")
        node.resize_inputs(3)
        node.replace_input_with(2, shift)
        for linear, bias in match.readers:
            write(rewriter, linear, bias=bias)
        add, product = match.last.carrier, match.last.node.outputs[0]
        rewriter.replace_uses(add.outputs[0], product)
        sweep(rewriter, [add])
        rewriter.record(self.name, node.name or "", f"the bias of '{add.name}' comes with it")


def _last(total: ir.Node, x: ir.Value) -> Linear | None:
    """The operator that ends the branch of the residual sum ``total`` of x, if it adds a vector last."""
    if not is_op(total, "Add", "Sum") or len(total.inputs) != 2:
        return None
    end = other_input(total, x)
    last = linear_of(end)
    if end is None or sole_consumer(end) is not total or not isinstance(last, Linear):
        return None
    if last.carrier is None or last.offset is None or last.offset.ndim != 1:
        return None
    same = rank_of(end) is not None and rank_of(end) == rank_of(x) == rank_of(last.node.outputs[0])
    wide = last.offset.shape == (last.channels_out,) and bool(np.isfinite(last.offset).all())
    return last if same and wide and last.offset.any() else None


def _is_plain(node: ir.Node) -> bool:
    rank = rank_of(node.outputs[0])
    if rank is None or node.outputs[0].dtype is not ir.DataType.FLOAT or is_fenced(node):
        return False
    return normalized_axis(attribute(node, "axis", -1), rank) == -1


def _bias(node: ir.Node) -> Array | None:
    """The normalization's bias in double precision, zeros where it has none."""
    gain = constant(node.inputs[1])
    stated = node.inputs[2] if len(node.inputs) > 2 else None
    if stated is None:
        return None if gain is None else np.zeros(gain.shape)
    bias = constant(stated)
    fits = bias is not None and gain is not None and bias.shape == gain.shape and np.isfinite(bias).all()
    return bias.astype(np.float64) if bias is not None and fits else None


def _reader(use: Any, added: Array) -> tuple[Linear, Array] | str:
    """A reader of x with the bias it has once ``added`` is in x; or why it cannot take it back."""
    node, label = use.node, f"{use.node.op_type} '{use.node.name}'"
    linear = linear_at(node) if use.idx == 0 and is_op(node, "MatMul", "Gemm") else None
    if not isinstance(linear, Linear) or linear.source_axis != -1:
        return f"{label} reads it and is not linear with a constant weight"
    linear = with_carrier(linear)
    if linear.offset is None:
        return f"{label} has no bias to take it back in"
    if not np.isfinite(linear.stored).all() or linear.offset.shape[-1:] != (linear.channels_out,):
        return f"{label} has a weight or bias that cannot be folded"
    bias = rounded(linear.offset - linear.weights()[0, :, :, 0] @ added, linear.stored.dtype)
    return f"{label}: its bias would overflow" if bias is None else (linear, bias)
