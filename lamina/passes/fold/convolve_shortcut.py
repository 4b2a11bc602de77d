"""Write a parameter-free shortcut, subsampling and zero channels, as one convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, attribute, constant, is_op, sole_consumer, substitute
from lamina.passes.pass_ import Effect, Rounding

_LARGEST = 1 << 16  # weights of the convolution; a wider shortcut costs more than it saves


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    strides: tuple[int, int]
    before: int
    channels_in: int
    channels_out: int


@dataclass(frozen=True)
class ConvolveShortcut(LocalFold):
    """Replace strided Slices and a channel Pad by a 1x1 convolution with a shifted identity.

    ONNX Runtime keeps convolutions, sums and activations in a blocked layout, but not Slice and Pad: one such
    shortcut sends every later residual sum of its stage back to the plain layout, with a conversion each way.

    Fires: float32 [b, c, h, w] with c known; Slices from 0 to the end with steps along h and w; zero padding
    of channels only; each intermediate value read once.
    Refuses: other axes, starts or paddings; more than 65,536 weights.
    Effect: Exact for finite values (one times x plus zeros), but for the sign of zero; an infinity or NaN in
    one channel reaches the others.
    Cost: O(Pad nodes).
    Source: the option A shortcut of He et al. 2015, arXiv:1512.03385, sec. 3.3.
    """

    effect: ClassVar[Effect] = Rounding(ulps=1)
    paper: ClassVar[str] = "arXiv:1512.03385"
    anchors: ClassVar[tuple[str, ...]] = ("Pad",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The subsampling in front of a channel padding."""
        x, strides = node.inputs[0], [1, 1]
        producer = None if x is None else x.producer()
        while x is not None and producer is not None and is_op(producer, "Slice"):
            steps = _steps(producer)
            if steps is None or sole_consumer(x) is None:
                return "it slices more than h and w by steps, or the slice is read elsewhere"
            strides = [a * b for a, b in zip(strides, steps, strict=True)]
            x = producer.inputs[0]
            producer = None if x is None else x.producer()
        if x is None or strides == [1, 1]:
            return None
        channels = _padded_channels(node)
        if channels is None:
            return "it does not pad channels, and only those, with zeros"
        if x.shape is None or not isinstance(x.shape[1], int) or x.dtype is not ir.DataType.FLOAT:
            return "it is not known to be float32 [b, c, h, w]"
        wide = x.shape[1]
        if wide * (wide + sum(channels)) > _LARGEST:
            return "a convolution of this width costs more"
        return _Match(x, (strides[0], strides[1]), channels[0], wide, wide + sum(channels))

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the convolution."""
        weight = np.zeros((match.channels_out, match.channels_in, 1, 1), np.float32)
        for i in range(match.channels_in):
            weight[match.before + i, i] = 1.0
        where = node.name or "Pad"
        shifted = rewriter.constant(weight, f"{where}_identity")
        attributes = {"kernel_shape": [1, 1], "strides": list(match.strides)}
        substitute(rewriter, node.outputs[0], "Conv", [match.x, shifted], attributes)
        rewriter.record(self.name, where, "subsampling shortcut with zero channels, written as Conv")


def _steps(node: ir.Node) -> tuple[int, int] | None:
    """The steps along h and w of a Slice that only subsamples them."""
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4 or len(node.inputs) < 5:
        return None
    arrays = [constant(v) for v in node.inputs[1:5]]
    if any(a is None for a in arrays):
        return None
    starts, ends, axes, steps = (a.reshape(-1).tolist() for a in arrays if a is not None)
    found = [1, 1]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % 4
        size = source.shape[axis]
        whole = end >= (size if isinstance(size, int) else 2**31 - 1)
        if start != 0 or step < 1 or not whole or (axis < 2 and step != 1):
            return None
        if axis >= 2:
            found[axis - 2] = step
    return found[0], found[1]


def _padded_channels(node: ir.Node) -> tuple[int, int] | None:
    """How many zero channels a Pad puts before and after, if it does nothing else."""
    if attribute(node, "mode", "constant") != "constant":
        return None
    pads = constant(node.inputs[1])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(4)
    value = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if pads is None or axes is None or value is None or value.any() or pads.size != 2 * axes.size:
        return None
    every = {int(axis) % 4: pair for axis, pair in zip(axes, pads.reshape(2, -1).T.tolist(), strict=True)}
    before, after = every.pop(1, (0, 0))
    return (before, after) if before >= 0 and after >= 0 and not any(map(any, every.values())) else None
