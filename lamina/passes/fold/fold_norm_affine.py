"""Fold a normalization's gain and bias into the linear operators that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.ir.semantics import is_fenced
from lamina.passes.fold.affine import affine_at
from lamina.passes.fold.channels import channels_of, discard, linked_output
from lamina.passes.fold.graph import (
    LocalFold,
    attribute,
    constant,
    is_op,
    normalized_axis,
    rank_of,
    sole_consumer,
    sweep,
)
from lamina.passes.fold.linear import (
    Array,
    Linear,
    is_shared,
    linear_at,
    paddings,
    rounded,
    with_carrier,
    write,
)
from lamina.passes.pass_ import Effect, Rounding

_LAST = ("LayerNormalization", "RMSNormalization")
_FIRST = ("BatchNormalization", "GroupNormalization", "InstanceNormalization")
# What hands on values without adding or scaling them, so that a constant in each channel stays that constant.
_CARRIERS = (
    "Identity",
    "Dropout",
    "Transpose",
    "Reshape",
    "Flatten",
    "Slice",
    "Gather",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "ReduceMean",
    "GlobalAveragePool",
)


@dataclass(frozen=True)
class _Affine:
    """What a normalization multiplies by and adds, with what plain operators behind it do likewise."""

    result: ir.Value
    axis: int
    gain: Array
    bias: Array


@dataclass(frozen=True)
class _Reader:
    linear: Linear
    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class _Match:
    affine: _Affine
    readers: tuple[_Reader, ...]


@dataclass(frozen=True)
class FoldNormAffine(LocalFold):
    """Fold gain g and bias h of a normalization into its readers: W <- W diag(g), b <- b + W h.

    The normalization keeps a gain of ones and no bias, so every reader sees the same plain normalized
    values: what rotations and flattening need, and one addition less behind an ``RMSNormalization``.

    Fires: float32 LayerNormalization and RMSNormalization over the last axis, BatchNormalization,
    GroupNormalization, InstanceNormalization; constant multiplications and additions behind it count as
    its own; readers Conv, ConvTranspose, Gemm, MatMul with constant weights, behind transpositions,
    reshapes and selections too.
    Refuses: any other reader; the interface shows the value; a weight or bias read elsewhere; a bias to fold
    into a reader that has none (unless ``add_bias``) or that pads with zeros.
    Effect: Rounding; folded in double precision and rounded once.
    Cost: O(nodes + weight elements); one copy of each folded weight.

    Attributes:
        add_bias: Give readers without a bias one, at the price of an addition each.
    """

    add_bias: bool = False
    effect: ClassVar[Effect] = Rounding(ulps=64)
    anchors: ClassVar[tuple[str, ...]] = _LAST + _FIRST

    def match(self, node: ir.Node) -> _Match | str | None:
        """The readers of a normalization, with their new weights."""
        affine = _affine_of(node)
        if affine is None:
            return None
        found = _linear_readers(affine.result, affine.axis, node.graph)
        if isinstance(found, str):
            return found
        readers = []
        with np.errstate(all="ignore"):  # what is not finite is refused
            for linear in found:
                reader = _folded(linear, affine, self.add_bias)
                if isinstance(reader, str):
                    return reader
                readers.append(reader)
        return _Match(affine, tuple(readers)) if readers else None

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the readers' weights, then leave the normalization plain."""
        for reader in match.readers:
            write(rewriter, reader.linear, weight=reader.weight, bias=reader.bias)
            discard(rewriter, reader.linear.weight)
            discard(rewriter, reader.linear.bias)
        _make_plain(node, rewriter)
        result, plain = match.affine.result, node.outputs[0]
        if result is not plain:
            rewriter.replace_uses(result, plain)
            sweep(rewriter, [result.producer()])
        rewriter.record(self.name, node.name or node.op_type, f"folded into {len(match.readers)} readers")


def _affine_of(node: ir.Node) -> _Affine | None:
    """Gain and bias per channel, if they are constants and do anything."""
    output, source = node.outputs[0], node.inputs[0]  # of the same type and shape, known or not
    rank = rank_of(source)
    if source is None or rank is None or source.dtype is not ir.DataType.FLOAT or is_fenced(node):
        return None
    axis = -1 if is_op(node, *_LAST) else 1 - rank
    if is_op(node, *_LAST) and normalized_axis(attribute(node, "axis", -1), rank) != -1:
        return None
    size = channels_of(source, axis)
    gain, bias = constant(node.inputs[1]), np.zeros(size or 0)
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    if shift is not None:
        stored = constant(shift)
        if stored is None or stored.shape != (size,):
            return None
        bias = stored.astype(np.float64)
    if gain is None or gain.shape != (size,):
        return None
    affine = _with_followers(_Affine(output, axis, gain.astype(np.float64), bias), node, rank)
    idle = affine.result is output and bool((affine.gain == 1).all()) and not affine.bias.any()
    return None if idle else affine


def _with_followers(affine: _Affine, node: ir.Node, rank: int) -> _Affine:
    """``affine`` with the constant multiplications and additions that alone read it taken in."""
    result, gain, bias = affine.result, affine.gain, affine.bias
    while True:
        reader = sole_consumer(result)
        step = affine_at(reader) if is_op(reader, "Mul", "Add", "Sub", "Div") else None
        if reader is None or step is None or step.source is not result or reader.graph is not node.graph:
            return _Affine(result, affine.axis, gain, bias)
        pair = step.along(rank, affine.axis, gain.size)
        if pair is None:
            return _Affine(result, affine.axis, gain, bias)
        scale, shift = pair
        result, gain, bias = reader.outputs[0], gain * scale, bias * scale + shift


def _linear_readers(start: ir.Value, start_axis: int, graph: Any) -> list[Linear] | str:
    """The linear operators that read a value; or the reader that is none."""
    found: list[Linear] = []
    pending = [(start, start_axis)]
    while pending:
        value, axis = pending.pop()
        if value.is_graph_output():
            return f"the interface shows '{value.name}'"
        for use in value.uses():
            node = use.node
            label = f"{node.op_type} '{node.name}'"
            if is_op(node, "Shape", "Size"):
                continue
            linear = linear_at(node) if use.idx == 0 and node.graph is graph else None
            if isinstance(linear, Linear) and linear.source_axis == axis:
                found.append(with_carrier(linear))
                continue
            carries = use.idx == 0 and node.graph is graph and is_op(node, *_CARRIERS)
            after = linked_output(node, 0, axis) if carries else None
            if after is None:
                return f"{label} reads it and is not linear with constant weights"
            pending.append((node.outputs[0], after))
    return found


def _folded(linear: Linear, affine: _Affine, add_bias: bool) -> _Reader | str:
    """A reader's new constants, or why it cannot take the gain and bias."""
    label = f"{linear.node.op_type} '{linear.node.name}'"
    if linear.channels_in != affine.gain.size:
        return f"{label} reads another number of channels"
    if is_shared(linear.weight):
        return f"the weight of {label} is read elsewhere: a copy would grow the file"
    weights = linear.weights()
    stored = linear.store(weights * affine.gain.reshape(linear.groups, 1, -1, 1))
    bias = None
    if affine.bias.any():
        reason = _bias_reason(linear, label, add_bias)
        if reason is not None:
            return reason
        shift = (weights * affine.bias.reshape(linear.groups, 1, -1, 1)).sum(axis=(2, 3)).reshape(-1)
        bias = rounded(shift if linear.offset is None else linear.offset + shift, linear.stored.dtype)
        if bias is None:
            return f"the bias of {label} would overflow or underflow"
    if stored is None:
        return f"the weight of {label} would overflow or underflow"
    return _Reader(linear, stored, bias)


def _bias_reason(linear: Linear, label: str, add_bias: bool) -> str | None:
    """Why a reader cannot take the normalization's bias."""
    if linear.node.op_type == "ConvTranspose":
        return f"{label} spreads the bias unevenly"
    if linear.is_conv:
        padded = paddings(linear.node, linear.stored.shape[2:])
        if padded is None or any(padded):
            return f"{label} pads with zeros: the bias would not reach the border"
    if linear.bias is None:
        return None if add_bias else f"{label} has no bias to take the normalization's"
    return f"the bias of {label} is read elsewhere" if is_shared(linear.bias) else None


def _make_plain(node: ir.Node, rewriter: Rewriter) -> None:
    """Give a normalization a gain of ones, and no bias where it may go without."""
    gain, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    stored, shift = constant(gain), constant(bias)
    if stored is not None and not (stored == 1).all():
        node.replace_input_with(1, rewriter.constant(np.ones_like(stored), "lamina_norm_ones"))
        discard(rewriter, gain)
    if bias is None or shift is None:
        return
    if is_op(node, "LayerNormalization"):
        node.resize_inputs(2)
    elif shift.any():
        node.replace_input_with(2, rewriter.constant(np.zeros_like(shift), "lamina_norm_zeros"))
    discard(rewriter, bias)
