"""Merge parallel linear branches of the same value, as re-parameterizable networks have them, into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.affine import affine_at
from lamina.passes.fold.graph import LocalFold, attribute, constant, sole_consumer, sweep
from lamina.passes.fold.linear import (
    Array,
    Linear,
    linear_of,
    outgrows,
    paddings,
    rounded,
    spread,
    write,
)
from lamina.passes.pass_ import Effect, Rounding

_NEST = "the kernels do not nest, or their strides, groups or channels differ"


@dataclass(frozen=True)
class _Match:
    base: Linear
    merged: tuple[ir.Value, ...]
    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class MergeParallelLinear(LocalFold):
    """Replace a sum of convolutions, or of products, of the same x by one with the summed weight.

    A kernel that fits into another, when both are padded to the same output, is set into it; x itself is a
    convolution with the identity at the centre, a BatchNormalization or a scale of x one with its diagonal.

    Fires: Add or Sum of two or more of: Conv, x, a constant scale and shift of x; or of MatMul or Gemm
    (a MatMul with the Add of its bias), x, a scale and shift of x. At least one is a linear operator.
    Refuses: branches of different inputs; kernels that do not nest, other strides, groups, dilations; x
    beside an operator that changes its shape; branches read elsewhere; shared or overridable weights.
    Effect: Rounding; added in double precision and rounded once.
    Cost: O(operands of the sums + weight elements).
    Source: Ding et al. 2021, RepVGG, arXiv:2101.03697, sec. 3.3.
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    paper: ClassVar[str] = "arXiv:2101.03697"
    anchors: ClassVar[tuple[str, ...]] = ("Add", "Sum")

    def match(self, node: ir.Node) -> _Match | str | None:
        """The operands that are linear in the same value."""
        operands = [v for v in node.inputs if v is not None]
        found = {v: linear_of(v) for v in operands}
        bases = [x for x in found.values() if isinstance(x, Linear) and x.node.op_type != "ConvTranspose"]
        bases.sort(key=lambda x: -x.stored.size)  # the others are set into the largest
        reason = None
        for base in bases:
            with np.errstate(all="ignore"):  # what is not finite is refused
                result = _merged(node, operands, found, base)
            if isinstance(result, _Match):
                return result
            reason = reason or result
        return reason

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the summed weight and leave the sum of what is not merged."""
        where, base = node.name or node.op_type, match.base
        before = base.output
        output = write(rewriter, base, weight=match.weight, bias=match.bias)
        gone = [*match.merged, before]
        left = [v for v in node.inputs if v is not None and v is not output and v not in gone]
        if left:
            for i, value in enumerate([output, *left]):
                node.replace_input_with(i, value)
            node.resize_inputs(1 + len(left))
        else:
            rewriter.replace_uses(node.outputs[0], output)
            rewriter.remove([node])
        sweep(rewriter, [p for p in (v.producer() for v in match.merged) if p is not None])
        count = len(match.merged) + 1
        rewriter.record(self.name, where, f"{count} parallel branches merged into '{base.node.name}'")


def _merged(
    node: ir.Node, operands: list[ir.Value], found: dict[ir.Value, Linear | str | None], base: Linear
) -> _Match | str | None:
    """What can be added to ``base``, or why nothing can although something nearly matches."""
    if sole_consumer(base.output) is not node or operands.count(base.output) > 1:
        return None
    weights, offset = base.weights().copy(), base.offset
    merged: list[ir.Value] = []
    constants: list[ir.Value | None] = [base.weight, base.bias]
    reason: str | None = None
    for value in operands:
        if value is base.output:
            continue
        term = _term(node, value, found[value], base) if operands.count(value) == 1 else None
        if term is None or isinstance(term, str):
            reason = reason or term
            continue
        weights += term.weights
        if term.offset is not None:
            offset = term.offset if offset is None else offset + term.offset
        merged.append(value)
        constants += term.constants
    return _finished(base, weights, offset, merged, constants) if merged else reason


def _finished(
    base: Linear, weights: Array, offset: Array | None, merged: list[ir.Value], old: list[ir.Value | None]
) -> _Match | str:
    stored, bias = base.store(weights), None
    if offset is not None:
        wanted = np.broadcast_to(offset, (base.channels_out,)) if base.is_conv or not offset.ndim else offset
        bias = rounded(wanted, base.stored.dtype)
    if stored is None or (offset is not None and bias is None):
        return "the summed weights would overflow or underflow"
    if bias is not None and bias.size > max(base.channels_out, *(_size(v) for v in old)):
        return "the summed bias would be larger than before"
    if outgrows(old, [stored, bias]):
        return "a weight is shared: a copy would grow the file"
    return _Match(base, tuple(merged), stored, bias)


def _size(value: ir.Value | None) -> int:
    array = constant(value)
    return 0 if array is None else int(array.size)


@dataclass(frozen=True)
class _Term:
    weights: Array
    offset: Array | None
    constants: tuple[ir.Value | None, ...] = ()


def _term(node: ir.Node, value: ir.Value, linear: Linear | str | None, base: Linear) -> _Term | str | None:
    """One operand in the form of ``base``, why it is not, or None if it has nothing to do with it."""
    if isinstance(linear, str):
        return linear
    if isinstance(linear, Linear):
        if linear.source is not base.source or linear.node.op_type != base.node.op_type:
            return None
        if sole_consumer(value) is not node:
            return "a branch is read elsewhere"
        weights = _nested(linear, base)
        return _NEST if weights is None else _Term(weights, linear.offset, (linear.weight, linear.bias))
    if value is base.source:
        weights = _diagonal(base, np.ones(()))
        return _NEST if weights is None else _Term(weights, None)
    return _scaled(node, value, base)


def _scaled(node: ir.Node, value: ir.Value, base: Linear) -> _Term | str | None:
    """A BatchNormalization, or a scale and shift, of the base's input."""
    affine = affine_at(value.producer())
    if affine is None or affine.source is not base.source:
        return None
    if sole_consumer(value) is not node:
        return "a branch is read elsewhere"
    pair = affine.along(base.rank, base.axis, base.channels_out)
    if pair is None or base.rank is None:
        return "the constant varies over more than channels, or may change the shape"
    if not affine.keeps_shape(base.rank, base.axis, base.channels_out):
        return "the constant varies over more than channels, or may change the shape"
    weights = _diagonal(base, pair[0])
    return _NEST if weights is None else _Term(weights, pair[1] if affine.shifts else None, affine.constants)


def _diagonal(base: Linear, scale: Array) -> Array | None:
    """The weights of x * scale in the form of ``base``, if ``base`` keeps the shape of x."""
    channels = base.channels_out
    if base.channels_in != channels or base.source_axis != base.axis:
        return None
    kernel, centre = base.stored.shape[2:], 0
    if base.is_conv:
        at = _place((1,) * len(kernel), [0] * (2 * len(kernel)), base)
        if at is None or any(s != 1 for s in spread(base.node, "strides", len(kernel))):
            return None
        centre = int(np.ravel_multi_index(at, kernel))
    weights = np.zeros_like(base.weights())
    each = channels // base.groups
    for channel in range(channels):
        weights[channel // each, channel % each, channel % each, centre] = (
            scale if not scale.ndim else scale[channel]
        )
    return weights


def _nested(linear: Linear, base: Linear) -> Array | None:
    """The weights of ``linear`` in the form of ``base``."""
    if linear.channels_out != base.channels_out or linear.groups != base.groups:
        return None
    if not base.is_conv:
        same = attribute(linear.node, "transA", 0) == attribute(base.node, "transA", 0)
        return linear.weights() if same and linear.channels_in == base.channels_in else None
    kernel, larger = linear.stored.shape[2:], base.stored.shape[2:]
    if linear.stored.shape[:2] != base.stored.shape[:2] or len(kernel) != len(larger):
        return None
    if spread(linear.node, "strides", len(kernel)) != spread(base.node, "strides", len(kernel)):
        return None
    around = paddings(linear.node, kernel)
    if around is None or paddings(base.node, larger) is None:
        return linear.weights() if kernel == larger and _same_settings(linear, base) else None
    stretch = zip(kernel, *(spread(x.node, "dilations", len(kernel)) for x in (linear, base)), strict=True)
    at = _place(kernel, around, base)
    if at is None or any(k > 1 and d != e for k, d, e in stretch):
        return None
    weights = np.zeros((*linear.weights().shape[:3], *larger), linear.weights().dtype)
    window = tuple(slice(t, t + k) for t, k in zip(at, kernel, strict=True))
    index = (slice(None), slice(None), slice(None), *window)
    weights[index] = linear.weights().reshape(*weights.shape[:3], *kernel)
    return weights.reshape(*weights.shape[:3], -1)


def _same_settings(linear: Linear, base: Linear) -> bool:
    size = linear.stored.ndim - 2
    modes = [attribute(x.node, "auto_pad", "NOTSET") for x in (linear, base)]
    return modes[0] == modes[1] and spread(linear.node, "dilations", size) == spread(
        base.node, "dilations", size
    )


def _place(kernel: tuple[int, ...], around: list[int], base: Linear) -> tuple[int, ...] | None:
    """Where in the base's kernel a smaller one gives the same output as by itself."""
    larger = base.stored.shape[2:]
    padded = paddings(base.node, larger)
    if padded is None:
        return None
    size, found = len(kernel), []
    for i, stretch in enumerate(spread(base.node, "dilations", size)):
        before, after = padded[i] - around[i], padded[size + i] - around[size + i]
        at, rest = divmod(before, stretch)
        if rest or at < 0 or at + kernel[i] > larger[i] or after != stretch * (larger[i] - kernel[i] - at):
            return None
        found.append(at)
    return tuple(found)
