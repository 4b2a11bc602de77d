"""Cross-layer equalization: move scale between two linear operators with nothing but a Relu in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, is_op, sole_consumer
from lamina.passes.fold.linear import LINEAR, Array, Linear, is_shared, linear_at, linear_of, rounded, write
from lamina.passes.pass_ import Effect, Exact

# f(c x) = c f(x) for c > 0, channel by channel.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool")
_SWEEPS = 20


@dataclass(frozen=True)
class _Match:
    first: Linear
    second: Linear
    weights: tuple[Array, Array]
    bias: Array | None


@dataclass(frozen=True)
class EqualizeLayers(LocalFold):
    """Scale channel c between two linear operators by s_c, so that both sides' weights reach equally far.

    ``W2 f(W1 x + b1) = (W2 diag(s)) f(diag(1/s) (W1 x + b1))`` where f(c x) = c f(x), with
    ``s_c = sqrt(max|W1_c| / max|W2_c|)`` rounded to a power of two. The value in between then has channels of
    like size, which quantizing it with one scale rewards. Not applied by itself: nothing gets faster.

    Fires: Conv, ConvTranspose, Gemm or MatMul behind another, with Relu, LeakyRelu, PRelu, or poolings in
    between, all read by nothing else; some channel a factor of two or more from even.
    Refuses: shared weights; channels that are not the same on both sides.
    Effect: Exact, as long as no number leaves the normal range: scales are powers of two.
    Cost: O(weights) a sweep, at most 20 sweeps for chains.
    Source: Nagel et al. 2019, arXiv:1906.04721, sec. 4.1. Deviates: powers of two.
    """

    effect: ClassVar[Effect] = Exact()
    paper: ClassVar[str] = "arXiv:1906.04721"
    anchors: ClassVar[tuple[str, ...]] = LINEAR

    def match(self, node: ir.Node) -> _Match | str | None:
        """The second operator of a pair."""
        second = linear_at(node)
        if not isinstance(second, Linear) or sole_consumer(second.source) is not node:
            return None
        first = linear_of(_before(second.source))
        if not isinstance(first, Linear):
            return None
        if first.channels_out != second.channels_in or first.axis != second.source_axis:
            return "the channels of one are not those of the other"
        if is_shared(first.weight) or is_shared(second.weight) or (first.bias and is_shared(first.bias)):
            return "its weight or bias is shared"
        made, read = first.weights(), second.weights()
        reach = np.abs(made).max(axis=(2, 3)).reshape(-1), np.abs(read).max(axis=(1, 3)).reshape(-1)
        counted = (reach[0] > 0) & (reach[1] > 0)
        ratio = np.where(counted, reach[0], 1.0) / np.where(counted, reach[1], 1.0)
        exponents = np.trunc(np.log2(ratio) / 2)
        if not exponents.any():
            return None
        factor = np.exp2(exponents)
        one = first.store(made / factor.reshape(first.groups, -1, 1, 1))
        other = second.store(read * factor.reshape(second.groups, 1, -1, 1))
        bias = None
        if first.offset is not None:
            wanted = np.broadcast_to(first.offset, (*first.offset.shape[:-1], len(factor))) / factor
            bias = rounded(wanted, first.stored.dtype)
            if bias is None:
                return "a bias would overflow or underflow"
        if one is None or other is None:
            return "a weight would overflow or underflow"
        return _Match(first, second, (one, other), bias)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write both weights and the bias between them."""
        write(rewriter, match.first, weight=match.weights[0], bias=match.bias)
        write(rewriter, match.second, weight=match.weights[1])
        label = match.first.node.name or match.first.node.op_type
        rewriter.record(self.name, node.name or node.op_type, f"equalized with '{label}'")

    def apply(self, rewriter: Rewriter) -> None:
        """Sweep until every pair of every chain is even."""
        for _ in range(_SWEEPS):
            if not self.fires(rewriter.model):
                break
            super().apply(rewriter)


def _before(value: ir.Value) -> ir.Value | None:
    """What ``value`` is but for homogeneous operators."""
    node = value.producer()
    while is_op(node, *_HOMOGENEOUS) and node is not None and node.inputs[0] is not None:
        if sole_consumer(node.inputs[0]) is not node or len(node.outputs) > 1:
            return None
        value = node.inputs[0]
        node = value.producer()
    return None if sole_consumer(value) is None else value
