"""Put the power-of-two scales that smoothing leaves in front of quantized products into what comes before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, constant, is_op, rank_of, sole_consumer, sweep
from lamina.passes.pass_ import Effect, Exact, Fold

_NORMS = ("LayerNormalization", "RMSNormalization")
# f(c x) = c f(x) for c > 0
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity")


@dataclass(frozen=True)
class _Part:
    """One constant to scale: an input of a node, whose last axis (``column``: the one before) is scaled."""

    node: ir.Node
    index: int
    column: bool = False


@dataclass(frozen=True)
class AbsorbScale(Fold):
    """Merge equal multiplications by powers of two, and fold them into the operator that makes the value.

    ``x * c`` with a constant c ``[channels]`` of powers of two goes into the gain and bias of a
    normalization, the constant factor or weight of the product, or the scale of quantized weights, that made
    x; through a Relu, the weighted sum of attention, and products of two activations into one of them.

    Fires: every reader of x multiplies it by the same c; all on the way is read by nothing else.
    Refuses: factors that are not powers of two; weights that others read too (a copy would grow the file).
    Effect: Exact, as long as no number leaves the normal range of float32.
    Cost: O(nodes); one copy of each scaled constant.
    Source: SmoothQuant, arXiv:2211.10438, sec. 4.2.
    """

    effect: ClassVar[Effect] = Exact()
    wants: ClassVar[tuple[str, ...]] = ("Mul",)

    def apply(self, rewriter: Rewriter) -> None:
        """One sweep in topological order."""
        first: dict[tuple[ir.Value, bytes], ir.Node] = {}
        for node in list(rewriter.graph):
            factor = _factor(node)
            if factor is None or node.inputs[0] is None:
                continue
            survivor = first.setdefault((node.inputs[0], factor.tobytes()), node)
            if survivor is not node:
                rewriter.replace_uses(node.outputs[0], survivor.outputs[0])
                rewriter.remove([node])
                rewriter.record(self.name, node.name or "Mul", f"same as '{survivor.name}'")
        for node in first.values():
            self._absorb(node, rewriter)

    def _absorb(self, node: ir.Node, rewriter: Rewriter) -> None:
        source, factor = node.inputs[0], _factor(node)
        if source is None or factor is None or node.outputs[0].is_graph_output():
            return
        parts = None if sole_consumer(source) is not node else _parts(source, len(factor))
        if parts is None:
            return
        for part in parts:
            value = part.node.inputs[part.index]
            array = constant(value)
            assert value is not None
            assert array is not None
            scaled = array * (factor[:, None] if part.column else factor)
            part.node.replace_input_with(part.index, rewriter.constant(scaled, f"{value.name}.scaled"))
        rewriter.replace_uses(node.outputs[0], source)
        sweep(rewriter, [node])
        rewriter.record(self.name, node.name or "Mul", f"its factor went into what made '{source.name}'")


def _factor(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """The constant ``[channels]`` of powers of two that a Mul multiplies its first operand by."""
    if not is_op(node, "Mul") or rank_of(node.inputs[0]) is None or constant(node.inputs[0]) is not None:
        return None
    array = constant(node.inputs[1])
    if array is None or array.ndim != 1 or array.size < 2 or array.dtype != np.float32:
        return None
    return array if (array > 0).all() and (np.frexp(array)[0] == 0.5).all() else None


def _parts(value: ir.Value, channels: int) -> list[_Part] | None:
    """Constants to scale so that the last axis of ``value`` is scaled; None where that cannot be done."""
    node = value.producer()
    if node is None or sole_consumer(value) is None or len(node.outputs) > 1:
        return None
    if is_op(node, *_NORMS):
        last = attribute(node, "axis", -1) in (-1, (rank_of(value) or 0) - 1)
        found = [_Part(node, i) for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
        return found if last and found and _vectors(found, channels) else None
    if is_op(node, "Mul"):
        return _of_product(node, channels)
    if is_op(node, "Add"):
        return _of_sum(node, channels)
    if is_op(node, *_HOMOGENEOUS):
        return None if node.inputs[0] is None else _parts(node.inputs[0], channels)
    if is_op(node, "Reshape"):
        split = _heads(node, channels)
        return None if split is None else _parts(split, channels)
    if is_op(node, "MatMul"):
        return _of_matmul(node, channels)
    if is_op(node, "Gemm"):
        return _of_gemm(node, channels)
    return None


def _of_matmul(node: ir.Node, channels: int) -> list[_Part] | None:
    array = constant(node.inputs[1])
    if array is not None and array.ndim < 2:
        return None  # a product with a vector has no such axis
    found = _of_weight(node.inputs[1], _Part(node, 1), channels)
    # weights times values: attention of one head mixes tokens, not channels
    mixed = node.inputs[1] if found is None else None
    return found if mixed is None or (rank_of(mixed) or 0) < 2 else _parts(mixed, channels)


def _heads(joined: ir.Node, channels: int) -> ir.Value | None:
    """The values of attention, heads not yet split, of whose weighted sums ``joined`` holds all heads.

    ``[b, t, h d] -> [b, t, h, d] -> [b, h, t, d]``, mixed along t, and the same way back: channel h d + i is
    channel h d + i throughout.
    """
    value: ir.Value | None = joined.inputs[0]
    for op_type in ("Transpose", "MatMul", "Transpose", "Reshape"):
        node = None if value is None else value.producer()
        if value is None or node is None or not is_op(node, op_type) or sole_consumer(value) is None:
            return None
        if op_type == "Transpose" and list(attribute(node, "perm", ())) != [0, 2, 1, 3]:
            return None
        split = value
        value = node.inputs[1 if op_type == "MatMul" else 0]
    shapes = [None if v is None or v.shape is None else list(v.shape) for v in (value, split)]
    whole, apart = shapes
    if whole is None or apart is None or len(whole) != 3 or len(apart) != 4 or whole[2] != channels:
        return None
    sizes = [d for d in apart[2:] if isinstance(d, int)]
    together = rank_of(joined.outputs[0]) == 3
    return value if together and len(sizes) == 2 and sizes[0] * sizes[1] == channels else None


def _of_product(node: ir.Node, channels: int) -> list[_Part] | None:
    for index in (1, 0):
        part = _Part(node, index)
        if constant(node.inputs[index]) is not None:
            return [part] if _vectors([part], channels) else None
    for operand in node.inputs:
        found = None if operand is None else _parts(operand, channels)
        if found is not None:
            return found
    return None


def _of_sum(node: ir.Node, channels: int) -> list[_Part] | None:
    for index in (1, 0):
        part, other = _Part(node, index), node.inputs[1 - index]
        if _vectors([part], channels) and other is not None:
            rest = _parts(other, channels)
            return None if rest is None else [*rest, part]
    return None


def _of_gemm(node: ir.Node, channels: int) -> list[_Part] | None:
    transposed = bool(attribute(node, "transB", 0))
    found = _of_weight(node.inputs[1], _Part(node, 1, column=transposed), channels)
    if found is None or len(node.inputs) < 3 or node.inputs[2] is None:
        return found
    bias = _of_weight(node.inputs[2], _Part(node, 2), channels)
    return None if bias is None else [*found, *bias]


def _of_weight(value: ir.Value | None, part: _Part, channels: int) -> list[_Part] | None:
    """A constant weight or bias, or the scale of a quantized one."""
    array = constant(value)
    if value is not None and array is not None:
        axis = 0 if part.column else -1
        alone = len(value.uses()) == 1 and array.dtype == np.float32 and array.ndim > 0
        return [part] if alone and array.shape[axis] == channels else None
    node = None if value is None else value.producer()
    if value is None or node is None or not is_op(node, "DequantizeLinear"):
        return None
    scale, codes = constant(node.inputs[1]), node.inputs[0]
    alone = sole_consumer(value) is not None and scale is not None and codes is not None
    if not alone or constant(codes) is None or scale is None or scale.shape != (channels,):
        return None
    rank = rank_of(codes) or 0
    axis = attribute(node, "axis", 1) % max(rank, 1)
    return [_Part(node, 1)] if axis == (0 if part.column or rank == 1 else rank - 1) else None


def _vectors(parts: list[_Part], channels: int) -> bool:
    arrays = [constant(p.node.inputs[p.index]) for p in parts]
    return all(
        a is not None and a.size == channels and a.shape[-1:] == (channels,) and a.dtype == np.float32
        for a in arrays
    )
