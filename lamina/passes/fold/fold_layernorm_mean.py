"""Take the mean out of layer normalizations: centre what writes to the residual stream instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.channels import discard, replace_constant
from lamina.passes.fold.graph import LocalFold, Operators, attribute, constant, substitute
from lamina.passes.fold.streams import Stream, plain_layer_norm, stream_of
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class FoldLayernormMean(LocalFold):
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

    def match(self, node: ir.Node) -> Stream | str | None:
        """The stream that a normalization reads, or what keeps its mean in it."""
        source = node.inputs[0]
        if not plain_layer_norm(node) or source is None or source.dtype is not ir.DataType.FLOAT:
            return None
        return _verdict(stream_of(node))

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite every stream, once all are walked: a reader of one may write to another."""
        rewriter.require_opset(self.minimum_opset)
        for node, found in list(self._found(rewriter.graph)):
            if not isinstance(found, str):
                self.rewrite(node, found, rewriter)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Centre the writers, then write the cheaper operator for every reader."""
        for value, axis in match.constants.items():
            centred = _centred(value, axis)
            if centred is not None:
                replace_constant(rewriter, value, centred, "centred")
        for norm in dict.fromkeys(match.readers):
            where = norm.name
            _write(norm, rewriter)
            rewriter.record(self.name, where, f"the stream is centred by {len(match.constants)} constants")

    def _found(self, graph: ir.Graph, operators: Operators | None = None) -> Iterator[tuple[ir.Node, Any]]:
        """One finding a stream, however many normalizations read it: each stream is walked once."""
        seen: set[ir.Node] = set()
        for node in [n for n in graph if plain_layer_norm(n)]:
            source = node.inputs[0]
            if node in seen or node.graph is not graph or source is None:
                continue
            if source.dtype is not ir.DataType.FLOAT:
                continue
            stream = stream_of(node)
            seen.update(stream.readers)
            yield node, _verdict(stream)


def _verdict(stream: Stream) -> Stream | str:
    if stream.obstacle is None:
        return stream
    count = len(set(stream.readers))
    return f"{count} normalization{'s' if count > 1 else ''} of one residual stream: {stream.obstacle}"


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
