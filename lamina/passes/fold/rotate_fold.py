"""Rotate residual streams: an orthogonal map over the channels, folded into all that write and read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.channels import replace_constant
from lamina.passes.fold.graph import attribute, constant, is_op
from lamina.passes.fold.linear import Array, Linear, linear_at
from lamina.passes.fold.orthogonal import turned
from lamina.passes.fold.streams import Stream, StreamFold, Walk, label, plain_norm
from lamina.passes.pass_ import Effect, Rounding

_NORMS = ("RMSNormalization", "LayerNormalization")
_ROTATED = re.compile(r"_rotated(_\d+)?$")


@dataclass(frozen=True)
class RotateFold(StreamFold):
    """Turn a residual stream x into x Q, Q orthogonal: outliers of single channels spread over all.

    ``RMSNorm(x Q) = RMSNorm(x) Q`` where the gain is the same for all channels, so Q passes sums and
    normalizations. What writes becomes W Q, embedding tables and biases too; what reads becomes Q' W. The
    function stays; blocks of weights hold like ranges, which few bits reward. Not applied by itself: nothing
    gets faster. :func:`lamina.passes.fold.fold` writes ``fold-layernorm-mean`` and ``fold-norm-affine``
    before it, which make normalizations what this fold can pass.

    Fires: float32; every writer linear with constant weights (MatMul, Gemm, Conv, a table, a constant) and
    every reader an RMSNormalization of one gain for all channels, or a MatMul, Gemm or ungrouped
    convolution with constant weights; a weight that does both, and a table that is the head too, is turned
    on all its axes.
    Refuses: the stream or a normalization of it is an output; any other writer or reader; a gain; a weight
    that somebody reads another way. What is rotated already is left alone, known by its weights' names.
    Effect: Rounding; weights are turned in float64 and rounded once.
    Cost: O(nodes), and O(log d + m) operations an element of a weight whose channels are d = 2^k m, m odd.
    Source: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), sec. 4, stage 1a. Deviates: widths that are no
    power of two turn by Hadamard's matrix times a random orthogonal one; nothing is rotated at run time.

    Attributes:
        seed: Of the signs, and of the small matrix of odd widths.
    """

    seed: int = 0
    effect: ClassVar[Effect] = Rounding(ulps=128)
    paper: ClassVar[str] = "arXiv:2404.00456"
    anchors: ClassVar[tuple[str, ...]] = _NORMS

    def walk(self, norm: ir.Node) -> Stream:
        """The stream that a normalization reads, to the weights on both of its ends."""
        source = norm.inputs[0]
        assert source is not None
        return _Rotation(norm.graph).run(source)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Turn every constant of the stream along its channels."""
        for value, axes in match.constants.items():
            array = constant(value)
            assert array is not None
            exact = array.astype(np.float64)
            for axis in axes:
                exact = turned(exact, axis, self.seed)
            replace_constant(rewriter, value, exact.astype(np.float32), "rotated")
        count, readers = len(match.constants), len(match.readers)
        rewriter.record(
            self.name, node.name or node.op_type, f"{count} constants of {readers} normalizations turned"
        )

    def _verdict(self, stream: Stream) -> Stream | str | None:
        names = [value.name or "" for value in stream.constants]
        if names and all(_ROTATED.search(name) for name in names):
            return None
        return super()._verdict(stream)


class _Rotation(Walk):
    """Where an orthogonal map over the channels goes: through RMS normalizations into linear operators."""

    only_reader: ClassVar[str] = "neither linear with constant weights nor an RMSNormalization without gain"

    def run(self, start: ir.Value) -> Stream:
        stream = super().run(start)
        sizes = {
            array.shape[axis]
            for value, axes in stream.constants.items()
            for axis in axes
            if (array := constant(value)) is not None and array.ndim >= -axis
        }
        if len(sizes) != 1:
            stream.refuse(f"its weights have {sorted(sizes)} channels")
        return stream

    def carried(self, node: ir.Node, axis: int) -> dict[int, int] | None:
        return {0: axis} if _passes(node, axis) else super().carried(node, axis)

    def handed(self, node: ir.Node, index: int, axis: int) -> int | None:
        if index != 0 or not plain_norm(node, *_NORMS):
            return super().handed(node, index, axis)
        self.stream.readers.append(node)
        return axis if _passes(node, axis) else None

    def written(self, node: ir.Node, axis: int, size: int) -> dict[int, int] | str:
        if is_op(node, "RMSNormalization"):
            return f"{label(node)} scales its channels: its gain could not be folded into what reads it"
        if is_op(node, "LayerNormalization"):
            return f"{label(node)} writes to it and takes a mean out"
        return super().written(node, axis, size)

    def read(self, node: ir.Node, index: int, axis: int) -> bool:
        linear = linear_at(node) if index == 0 else None
        if not isinstance(linear, Linear) or linear.source_axis != axis or linear.groups != 1:
            return False
        self.stream.weigh(node, 1, _axis_in(linear))
        return True

    def check(self, value: ir.Value) -> None:
        """Whether all who read a constant see it turned."""
        stream, array = self.stream, constant(value)
        if array is None or array.dtype != np.float32 or not _shows(array, stream.constants[value]):
            stream.refuse(f"'{value.name}' belongs to it and is no float32 constant with its channels")
            return
        other = next(
            (u.node for u in value.uses() if stream.roles.get((u.node, u.idx)) != stream.constants[value]),
            None,
        )
        if other is not None or value.is_graph_output():
            reader = "the interface" if other is None else label(other)
            stream.refuse(f"'{value.name}' belongs to it, and {reader} reads it another way")


def _passes(node: ir.Node, axis: int) -> bool:
    """Whether ``node`` is a normalization that an orthogonal map commutes with."""
    if axis != -1 or not plain_norm(node, "RMSNormalization"):
        return False
    gain = constant(node.inputs[1])
    return gain is not None and gain.size > 0 and bool(np.ptp(gain) == 0)


def _axis_in(linear: Linear) -> int:
    """The axis of a reader's weight that it sums over, counted from the end."""
    if linear.node.op_type == "Conv":
        return 1 - linear.stored.ndim
    if linear.node.op_type == "ConvTranspose":
        return -linear.stored.ndim
    turned_weight = linear.node.op_type == "Gemm" and attribute(linear.node, "transB", 0)
    return -1 if turned_weight else -2


def _shows(array: Array, axes: set[int]) -> bool:
    return all(array.ndim >= -axis for axis in axes)
