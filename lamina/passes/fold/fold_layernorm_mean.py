"""Take the mean out of layer normalizations: centre what writes to the residual stream instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.channels import discard, replace_constant
from lamina.passes.fold.graph import attribute, constant, is_op, substitute
from lamina.passes.fold.streams import Stream, StreamFold, Walk, label, plain_norm
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class FoldLayernormMean(StreamFold):
    """Replace every ``LayerNormalization`` of a residual stream by ``RMSNormalization``.

    With C = I - 11'/d, LN(x) = RMSNorm(C x) with the same gain, plus the bias. C is folded into what writes
    to the stream: embedding tables, weights and biases of output projections, constants. The stream then
    has no mean, and no normalization has to take it out.

    Fires: float32; every writer linear with constant weights (MatMul, Gemm, Conv, a table, a constant), and
    every reader a layer normalization over the channels, or a sum, selection or transposition of the stream.
    Refuses: the stream is an output or read by something else; a nonlinear writer; post-norm (the gain gives
    the output of a normalization a mean); a writer's weight that is read elsewhere (tied embeddings).
    Effect: Rounding; weights are centred in float64 and rounded once.
    Cost: O(nodes) and one pass over the centred weights.
    Source: Jiang et al. 2023, arXiv:2305.14858, sec. 3. Deviates: keeps all d coordinates.
    """

    effect: ClassVar[Effect] = Rounding(ulps=128)
    paper: ClassVar[str] = "arXiv:2305.14858"
    minimum_opset: ClassVar[int] = 23
    anchors: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def walk(self, norm: ir.Node) -> Stream:
        """The stream that a layer normalization reads, as far as its mean goes."""
        source = norm.inputs[0]
        assert source is not None
        return _Centring(norm.graph).run(source)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Centre the writers, then write the cheaper operator for every reader."""
        for value, (axis,) in match.constants.items():
            centred = _centred(value, axis)
            if centred is not None:
                replace_constant(rewriter, value, centred, "centred")
        for norm in dict.fromkeys(match.readers):
            where = norm.name
            _write(norm, rewriter)
            rewriter.record(self.name, where, f"the stream is centred by {len(match.constants)} constants")


class _Centring(Walk):
    """Where the mean over the channels goes: layer normalizations take it out."""

    only_reader: ClassVar[str] = "no layer normalization over its channels"

    def written(self, node: ir.Node, axis: int, size: int) -> dict[int, int] | str:
        if is_op(node, "LayerNormalization"):
            return _normalized(node, axis)
        return super().written(node, axis, size)

    def read(self, node: ir.Node, index: int, axis: int) -> bool:
        if not plain_norm(node, "LayerNormalization") or index != 0 or axis != -1:
            return False
        self.stream.readers.append(node)
        return True

    def check(self, value: ir.Value) -> None:
        """Whether centring a constant is seen by this stream only, or changes nothing."""
        stream, array = self.stream, constant(value)
        if array is None or array.dtype != np.float32:
            stream.refuse(f"'{value.name}' writes to it and is not a float32 constant")
            return
        axis, *more = stream.constants[value]
        if more:
            stream.refuse(f"'{value.name}' is used with its channels on two axes")
            return
        others = [u.node for u in value.uses() if (u.node, u.idx) not in stream.roles]
        if (others or value.is_graph_output()) and np.any(array.mean(axis=axis, dtype=np.float64) != 0):
            reader = label(others[0]) if others else "the interface"
            stream.refuse(f"'{value.name}' writes to it, and {reader} reads the same weight")


def _normalized(node: ir.Node, axis: int) -> dict[int, int] | str:
    """A normalization's own output has no mean only if its gain is the same for all channels."""
    gain = constant(node.inputs[1])
    uniform = gain is not None and np.ptp(gain) == 0
    if axis != -1 or not plain_norm(node, "LayerNormalization") or not uniform:
        return (
            f"{label(node)} writes to it (post-norm), and its gain differs between channels,"
            " so that its output has a mean"
        )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return f"{label(node)} writes to it with a computed bias"
    return {} if bias is None else {2: -1}


def _centred(value: ir.Value, axis: int) -> np.ndarray[Any, Any] | None:
    """The constant less its mean over the channels; None where it has none."""
    array = constant(value)
    assert array is not None
    mean = array.mean(axis=axis, keepdims=True, dtype=np.float64)
    if not mean.any():
        return None
    return np.subtract(array, mean, out=np.empty_like(array), dtype=np.float64, casting="same_kind")


def _write(norm: ir.Node, rewriter: Rewriter) -> None:
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    attributes = {"axis": -1, "epsilon": attribute(norm, "epsilon", 1e-5)}
    if "stash_type" in norm.attributes:
        attributes["stash_type"] = attribute(norm, "stash_type", 1)
    result, inputs = norm.outputs[0], list(norm.inputs[:2])
    shift = constant(bias)
    if bias is None or (shift is not None and not shift.any()):
        substitute(rewriter, result, "RMSNormalization", inputs, attributes)
        discard(rewriter, bias)
        return
    rewriter.at(norm)
    name = f"{norm.name}_rms"
    plain = rewriter.op(
        "RMSNormalization", inputs, attributes, name=name, dtype=result.dtype, shape=result.shape
    )
    substitute(rewriter, result, "Add", [plain, bias])
