"""Fold an explicit Pad into the padding of the convolution or pooling behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, attribute, constant, is_op, rank_of, sole_consumer, sweep
from lamina.passes.pass_ import Effect, Exact

_NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softplus", "Exp", "Sqrt")
_LARGEST_RANK = 64


@dataclass(frozen=True)
class _Match:
    source: ir.Value
    pads: tuple[int, ...]
    include_pad: bool


@dataclass(frozen=True)
class PadIntoConv(LocalFold):
    """Fold a constant Pad of spatial axes into the ``pads`` of Conv, AveragePool or MaxPool.

    Fires: Conv behind zeros; AveragePool behind zeros where the padding counts; MaxPool behind zeros where
    x is never negative, or behind minus infinity. The operator states its padding (NOTSET or VALID).
    Refuses: other values, modes, negative or computed pads; pads of batch or channels; a pooling window that
    could see padding only, rounds its output size up, is dilated, or returns indices; a Pad read elsewhere.
    Effect: Exact, but for the sign of a zero that MaxPool chooses, and for NaN: a window of MaxPool that
        holds nothing but NaN and padding had a zero to give, which it has no longer.
    Cost: O(sites).
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = ("Conv", "AveragePool", "MaxPool")

    def match(self, node: ir.Node) -> _Match | str | None:
        """A Pad in front of ``node`` alone."""
        value = node.inputs[0]
        pad = None if value is None else value.producer()
        if value is None or pad is None or not is_op(pad, "Pad") or len(pad.inputs) < 2:
            return None
        if sole_consumer(value) is not node:
            return "the Pad is read elsewhere"
        rank, filling, source = rank_of(value), _filling(pad), pad.inputs[0]
        around = None if rank is None else _around(pad, rank)
        if rank is None or filling is None or around is None or source is None:
            return "the Pad is not one of constant sizes and value, or its rank is unknown"
        spatial = rank - 2
        before, after = around[:rank], around[rank:]
        if min(around) < 0 or any(before[:2]) or any(after[:2]):
            return "the Pad crops, or pads batch or channels"
        own = _own(node, spatial)
        if own is None:
            return "the operator chooses its padding by itself"
        extra = [*before[2:], *after[2:]]
        reason = _why_not(node, source, filling, extra, own)
        if reason is not None:
            return reason
        pads = tuple(a + b for a, b in zip(own, extra, strict=True))
        return _Match(source, pads, include_pad=node.op_type == "AveragePool")

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Add the pads and read what was padded."""
        pad = node.inputs[0].producer() if node.inputs[0] is not None else None
        node.replace_input_with(0, match.source)
        node.attributes["pads"] = ir.AttrInt64s("pads", list(match.pads))
        node.attributes.pop("auto_pad", None)
        if match.include_pad:
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
        where = "Pad" if pad is None else pad.name or "Pad"
        sweep(rewriter, [] if pad is None else [pad])
        rewriter.record(self.name, where, f"folded into '{node.name}'")


def _filling(pad: ir.Node) -> float | None:
    """The constant a Pad fills in."""
    if attribute(pad, "mode", "constant") != "constant":
        return None
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if value is None:
        return 0.0
    array = constant(value)
    return (
        None
        if array is None or array.size != 1 or array.dtype.kind not in "fiu"
        else float(array.reshape(()))
    )


def _around(pad: ir.Node, rank: int) -> list[int] | None:
    """The pads of every axis, befores then afters."""
    sizes = constant(pad.inputs[1])
    axes: Any = np.arange(rank)
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        axes = constant(pad.inputs[3])
    if sizes is None or axes is None or sizes.size != 2 * axes.size or not 2 < rank < _LARGEST_RANK:
        return None
    found = [0] * (2 * rank)
    for axis, (before, after) in zip(axes.reshape(-1), sizes.reshape(2, -1).T, strict=True):
        found[int(axis) % rank], found[rank + int(axis) % rank] = int(before), int(after)
    return found


def _own(node: ir.Node, spatial: int) -> list[int] | None:
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * (2 * spatial)
    return list(attribute(node, "pads", [0] * (2 * spatial))) if mode == "NOTSET" else None


def _why_not(node: ir.Node, source: ir.Value, filling: float, extra: list[int], own: list[int]) -> str | None:
    if node.op_type == "Conv":
        return None if filling == 0 else "the Pad fills in something else than zeros"
    kernel = list(attribute(node, "kernel_shape", []))
    if any(a + b >= k for a, b, k in zip(own, extra, [*kernel, *kernel], strict=True)):
        return "a window of the pooling could see padding only"
    plain = not attribute(node, "ceil_mode", 0) and all(d == 1 for d in attribute(node, "dilations", []))
    if not plain or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "the pooling is dilated, rounds its size up or returns indices"
    if node.op_type == "AveragePool":
        if filling != 0:
            return "the Pad fills in something else than zeros"
        counted = not any(own) or attribute(node, "count_include_pad", 0)
        return None if counted else "the pooling counts the Pad but not its own padding"
    if filling == -np.inf or (filling == 0 and is_op(source.producer(), *_NEVER_NEGATIVE)):
        return None
    return "the padding could be the largest of a window"
