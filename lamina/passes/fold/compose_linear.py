"""Multiply two linear operators with constant weights, one right behind the other, into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, attribute, is_op, sole_consumer, substitute, sweep
from lamina.passes.fold.linear import (
    Array,
    Linear,
    hint,
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

_COSTS = "the composed weight would cost more"
_FLOW = "the composed weight would overflow or underflow"


@dataclass(frozen=True)
class _Match:
    inner: Linear
    outer: Linear
    weight: Array
    bias: Array | None
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ComposeLinear(LocalFold):
    """Replace B (A x + a) + b by (B A) x + (B a + b).

    Fires: MatMul and Gemm in any order, the Add of a bias behind a MatMul included; two Convs of one group
    of which one is 1x1. The composed weight is no larger than the two.
    Refuses: a composed weight that would cost more (a low-rank pair), overflow or underflow; a value between
    the two that is read elsewhere; weights that callers may override or other operators read; a bias, or a
    stride, in front of a convolution that pads with zeros or has a larger kernel.
    Shapes: A [m, k], B [n, m]; Conv [m, k, *taps], [n, m, *taps].
    Effect: Rounding; multiplied in double precision and rounded once.
    Cost: O(sites) and one product of weights a match.
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    anchors: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv")

    def match(self, node: ir.Node) -> _Match | str | None:
        """A linear operator behind another."""
        source = node.inputs[0]
        producer = None if source is None else source.producer()
        if source is None or not is_op(producer, "Add", *self.anchors):
            return None
        inner, outer = linear_of(source), linear_at(node)
        for found in (inner, outer):
            if not isinstance(found, Linear):
                return found if inner is not None and outer is not None else None
        assert isinstance(inner, Linear)
        assert isinstance(outer, Linear)
        if inner.is_conv != outer.is_conv or (outer.is_conv and (inner.groups > 1 or outer.groups > 1)):
            return None
        if sole_consumer(source) is not node:
            return "the value between the two is read elsewhere"
        with np.errstate(all="ignore"):  # what is not finite is refused
            return _convs(inner, outer) if outer.is_conv else _matrices(inner, outer)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the composed operator with the names of the second."""
        inner, outer, where = match.inner, match.outer, node.name or node.op_type
        behind = inner.carrier or inner.node
        if not outer.is_conv and inner.node.op_type == "Gemm" and node.op_type == "MatMul":
            _replace(rewriter, match, "Gemm")
        elif outer.is_conv:
            _replace(rewriter, match, "Conv")
        else:
            write(rewriter, outer, source=inner.source, weight=match.weight, bias=match.bias)
            if match.attributes:
                node.attributes["transA"] = ir.AttrInt64("transA", match.attributes["transA"])
            sweep(rewriter, [behind])
        rewriter.record(self.name, where, f"composed with '{inner.node.name}' before it")


def _replace(rewriter: Rewriter, match: _Match, op_type: str) -> None:
    inner, outer = match.inner, match.outer
    weight = rewriter.constant(match.weight, hint(outer.weight, "weight"))
    inputs: list[ir.Value | None] = [inner.source, weight]
    if match.bias is not None:
        name = hint(outer.bias or inner.bias, f"{outer.node.name}_bias")
        inputs.append(rewriter.constant(match.bias, name))
    elif outer.bias is not None:
        inputs.append(outer.bias)
    substitute(rewriter, outer.node.outputs[0], op_type, inputs, match.attributes)


def _matrices(inner: Linear, outer: Linear) -> _Match | str | None:
    if outer.node.op_type == "Gemm" and attribute(outer.node, "transA", 0):
        return None
    both = inner.node.op_type == outer.node.op_type == "MatMul"
    outer = with_carrier(outer) if both else outer
    first, second = inner.weights()[0, :, :, 0], outer.weights()[0, :, :, 0]
    if second.shape[0] * first.shape[1] > first.size + second.size:
        return _COSTS
    turned = inner.node.op_type == "Gemm" and attribute(inner.node, "transA", 0)
    offset = None
    if inner.offset is not None:
        rows = inner.offset.shape[-1:] if inner.offset.ndim else ()
        if not both and inner.offset.size not in (1, *rows):
            return "its bias varies over rows"
        wanted = (*inner.offset.shape[:-1], second.shape[1]) if both else (second.shape[1],)
        offset = np.broadcast_to(inner.offset if both else inner.offset.reshape(-1), wanted) @ second.T
    return _finished(
        inner, outer, (second @ first)[None, :, :, None], offset, {"transA": 1} if turned else {}
    )


def _convs(inner: Linear, outer: Linear) -> _Match | str | None:
    kernel, last = inner.stored.shape[2:], outer.stored.shape[2:]
    points = all(k == 1 for k in kernel), all(k == 1 for k in last)
    if inner.stored.ndim != outer.stored.ndim or not any(points):
        return None
    strides, more = (spread(x.node, "strides", len(kernel)) for x in (inner, outer))
    around, padded = paddings(inner.node, kernel), paddings(outer.node, last)
    both = [a * b for a, b in zip(strides, more, strict=True)]
    first, second = inner.weights()[0], outer.weights()[0]
    if second.shape[0] * first.shape[1] * max(first.shape[2], second.shape[2]) > first.size + second.size:
        return _COSTS
    if points[1] and padded is not None and not any(padded):
        if around is None and any(s != 1 for s in more):
            return "its padding depends on its stride"
        weights, settings = np.einsum("om,mit->oit", second[:, :, 0], first), inner
    elif points[0] and around is not None and not any(around) and all(s == 1 for s in strides):
        if inner.offset is not None and inner.offset.any() and (padded is None or any(padded)):
            return "zero padding: the bias before it would not reach the border"
        weights, settings = np.einsum("omt,mi->oit", second, first[:, :, 0]), outer
    else:
        return "the 1x1 convolution pads or strides"
    attributes = {a.name: a.value for a in settings.node.attributes.values()}
    attributes |= {"strides": both, "kernel_shape": list(settings.stored.shape[2:])}
    offset = None if inner.offset is None else second.sum(axis=2) @ inner.offset
    return _finished(inner, outer, weights[None], offset, attributes)


def _finished(
    inner: Linear, outer: Linear, weights: Array, offset: Array | None, attributes: dict[str, Any]
) -> _Match | str:
    """The composed constants as stored, or why they cannot be."""
    dtype = outer.stored.dtype
    compact = rounded(weights, dtype, np.abs(weights).max(axis=(2, 3), keepdims=True))
    bias = None  # the bias of the second stays as it is
    if offset is not None:
        bias = rounded(offset if outer.offset is None else offset + outer.offset, dtype)
    if compact is None or (offset is not None and bias is None):
        return _FLOW
    known = [x.offset.size for x in (inner, outer) if x.offset is not None]
    if bias is not None and bias.size > max(*known, outer.channels_out):
        return "the composed bias would be larger than the two"
    stored = _layout(inner, outer, compact)
    old = [inner.weight, outer.weight, inner.bias, outer.bias if bias is not None else None]
    if outgrows(old, [stored, bias]):
        return "a weight is shared: a copy would grow the file"
    return _Match(inner, outer, stored, bias, attributes)


def _layout(inner: Linear, outer: Linear, weights: Array) -> Array:
    if outer.is_conv:
        taps = max((inner, outer), key=lambda x: x.stored[0, 0].size).stored.shape[2:]
        return np.ascontiguousarray(weights.reshape(*weights.shape[1:3], *taps))
    return np.ascontiguousarray(outer.layout(weights))
