"""Fold constant scales and shifts, BatchNormalization among them, into the linear operator beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.affine import AFFINE, Affine, affine_at
from lamina.passes.fold.graph import LocalFold, is_op, rank_of, sole_consumer, substitute, sweep
from lamina.passes.fold.linear import (
    LINEAR,
    Array,
    Linear,
    cancels,
    is_shared,
    linear_at,
    linear_of,
    outgrows,
    paddings,
    rounded,
    spread,
    with_carrier,
    write,
)
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    linear: Linear
    affine: Affine
    weight: Array | None
    bias: Array | None


@dataclass(frozen=True)
class FoldAffine(LocalFold):
    """Fold y = x * scale + shift into the Conv, ConvTranspose, Gemm or MatMul before or after it.

    After: s (W x + b) + t = (s W) x + (s b + t). Before: W (s x + t) + b = (W s) x + (W t + b).

    Fires: Mul, Div, Add, Sub, Neg by constants that are scalars or vary over channels only, and
    BatchNormalization; weights and biases constant; the value between the two read nowhere else. The bias
    of a MatMul is the Add behind it; a MatMul without one is never made to have one by an Add after it.
    Refuses: the last factor or shift of a decomposed normalization or GELU in front of the linear operator,
    as runtimes fuse those as a whole; weights that callers may override, or that other operators read (a
    copy would grow the file); a shift before an operator that pads with zeros, for it would not reach the
    border; folded weights that overflow or underflow; an Add that nearly cancels the bias (it rounds on
    purpose).
    Shapes: Conv W [C_out, C_in/group, *k], ConvTranspose W [C_in, C_out/group, *k]; scale, shift [C] or [].
    Effect: Rounding; folded in double precision and rounded once.
    Cost: O(sites + weight elements); one copy of each folded weight.
    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.2 (inference form).
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    paper: ClassVar[str] = "arXiv:1712.05877"
    anchors: ClassVar[tuple[str, ...]] = LINEAR + AFFINE

    def match(self, node: ir.Node) -> _Match | str | None:
        """An affine operator in front of, or behind, a linear one."""
        near = [None if v is None else v.producer() for v in node.inputs[:2]]
        if not any(is_op(n, *AFFINE, *LINEAR) for n in near):
            return None
        with np.errstate(all="ignore"):  # what is not finite is refused
            return _before(node) if node.op_type in LINEAR else _after(node)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the folded constants and take the affine operator out."""
        linear, affine = match.linear, match.affine
        where = affine.node.name or affine.node.op_type
        if affine.node is node:
            _close_after(rewriter, match)
        else:
            write(rewriter, linear, source=affine.source, weight=match.weight, bias=match.bias)
            sweep(rewriter, [affine.node])
        rewriter.record(self.name, where, f"{affine.node.op_type} folded into '{linear.node.name}'")


def _after(node: ir.Node) -> _Match | str | None:
    near = [None if v is None else v.producer() for v in node.inputs[:2]]
    affine = affine_at(node) if any(is_op(n, "Add", *LINEAR) for n in near) else None
    linear = None if affine is None else linear_of(affine.source)
    if affine is None or linear is None:
        return None
    if isinstance(linear, str):
        return linear
    if linear.node.op_type == "MatMul" and linear.carrier is None and not affine.scales:
        return None  # MatMul and the Add of its bias: the form that is kept
    if sole_consumer(linear.output) is None:
        return "the value between the two is read elsewhere"
    pair = affine.along(linear.rank, linear.axis, linear.channels_out)
    if pair is None:
        return "the constant varies over more than channels, or may change the shape"
    scale, shift = pair
    groups = linear.groups
    weights = None
    if affine.scales:
        factor = scale if scale.ndim == 0 else scale.reshape(groups, -1, 1, 1)
        weights = linear.weights() * factor
    offset = shift if linear.offset is None else linear.offset * scale + shift
    if linear.offset is not None and not affine.scales and cancels(linear.offset, shift):
        return "it nearly cancels the bias: the order of the additions matters"
    return _folded(linear, affine, weights, offset)


def _completes_pattern(source: ir.Value) -> bool:
    """Whether ``source`` is a decomposed normalization without its gain or shift, or a GELU without its half.

    trap: ONNX Runtime fuses both from decomposed operators, but only whole ones: a decoder whose gains were
    folded into weights took 1.07 of its time.
    """
    node = source.producer()
    affine = affine_at(node) if node is not None and is_op(node, "Mul") else None
    if affine is not None:  # the gain is there, the shift is what is looked at
        node = affine.source.producer()
    if node is None or not is_op(node, "Div", "Mul"):
        return False
    operands = [None if v is None else v.producer() for v in node.inputs]
    if is_op(node, "Div"):
        return is_op(operands[1], "Sqrt")
    if any(is_op(n, "Reciprocal") for n in operands):
        return True
    gates = [n for n in operands if n is not None and is_op(n, "Add")]
    reads = [v.producer() for n in gates for v in n.inputs if v is not None]
    return any(is_op(n, "Erf", "Tanh") for n in reads)


def _before(node: ir.Node) -> _Match | str | None:
    source = node.inputs[0] if node.inputs else None
    affine = None if source is None else affine_at(source.producer())
    linear = None if affine is None else linear_at(node)
    if affine is None or linear is None:
        return None
    if isinstance(linear, str):
        return linear
    linear = with_carrier(linear)
    if linear_of(affine.source) is not None and node.op_type == "MatMul" and not affine.scales:
        return None  # the bias of another operator: left to that one
    if sole_consumer(linear.source) is not node:
        return "the value between the two is read elsewhere"
    channels, axis = linear.channels_in, linear.source_axis
    rank = linear.rank if linear.node.op_type != "MatMul" else rank_of(linear.source)
    if _completes_pattern(affine.source):
        return "it completes a normalization or GELU, which runtimes fuse as a whole"
    pair = affine.along(rank, axis, channels)
    if pair is None or rank is None or not affine.keeps_shape(rank, axis, channels):
        return "the constant varies over more than channels, or may change the shape"
    reason = _shift_reason(linear) if affine.shifts else None
    if reason is not None:
        return reason
    scale, shift = (a if a.ndim == 0 else a.reshape(linear.groups, 1, -1, 1) for a in pair)
    original = linear.weights()
    offset: Array = np.zeros(()) if linear.offset is None else linear.offset
    if affine.shifts:
        offset = offset + (original * shift).sum(axis=(2, 3)).reshape(-1)
    return _folded(linear, affine, original * scale if affine.scales else None, offset)


def _shift_reason(linear: Linear) -> str | None:
    """Why a constant added to x does not become a constant added to y."""
    node = linear.node
    if not linear.is_conv:
        wider = linear.channels_out > linear.channels_in
        return "adding it behind the product would cost more" if wider and not _has_bias(linear) else None
    kernel = linear.stored.shape[2:]
    padded = paddings(node, kernel)
    if padded is None or any(padded):
        return "zero padding: the shift would not reach the border"
    if node.op_type == "Conv":
        return None
    plain = all(k == 1 for k in (*kernel, *spread(node, "strides", len(kernel))))
    stretched = "output_padding" in node.attributes or "output_shape" in node.attributes
    return None if plain and not stretched else "a transposed convolution spreads the shift unevenly"


def _has_bias(linear: Linear) -> bool:
    return linear.node.op_type == "Gemm" or linear.carrier is not None


def _folded(linear: Linear, affine: Affine, weights: Array | None, offset: Array) -> _Match | str:
    """The constants as stored, or why they cannot be."""
    dtype = linear.stored.dtype
    stored = None if weights is None else linear.store(weights)
    needed = linear.offset is not None or bool(offset.any()) or not np.isfinite(offset).all()
    bias = None
    if needed:
        wanted = offset
        if linear.is_conv or offset.ndim == 0:
            wanted = np.broadcast_to(offset, (linear.channels_out,))
        bias = rounded(wanted, dtype)
    if (weights is not None and stored is None) or (needed and bias is None):
        return "the folded constants would overflow or underflow"
    if bias is not None and linear.offset is not None:
        if bias.size > max(linear.offset.size, linear.channels_out):
            return "the folded bias would be larger than the two"
        same = bias.shape == linear.offset.shape and bool((bias == linear.offset).all())
        bias = None if same and "beta" not in linear.node.attributes else bias
    old: list[ir.Value] = [*affine.constants]
    old += [linear.weight] if stored is not None else []
    old += [linear.bias] if bias is not None and linear.bias is not None else []
    kept = [v for v in old if v is linear.weight or v is linear.bias]
    if outgrows(old, [stored, bias]) and any(is_shared(v) for v in kept):
        return "its weight is shared: a copy would grow the file"
    return _Match(linear, affine, stored, bias)


def _close_after(rewriter: Rewriter, match: _Match) -> None:
    linear, affine = match.linear, match.affine
    result, bias = affine.node.outputs[0], match.bias
    if bias is not None and linear.node.op_type == "MatMul" and linear.carrier is None:
        write(rewriter, linear, weight=match.weight)
        value = rewriter.constant(bias, f"{linear.node.name}_bias_folded")
        substitute(rewriter, result, "Add", [linear.output, value])
        return
    write(rewriter, linear, weight=match.weight, bias=bias)
    if linear.output.shape is None:
        linear.output.shape = result.shape
    rewriter.replace_uses(result, linear.output)
    rewriter.remove([affine.node])
