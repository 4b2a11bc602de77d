"""Which initializer each weighted operator multiplies with, and along which axis its outputs lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program

# operator -> inputs that may be its weight
_SLOTS: dict[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "DeformConv": (1,),
    "GRU": (1, 2),
    "Gather": (0,),
    "Gemm": (0, 1),
    "LSTM": (1, 2),
    "MatMul": (0, 1),
    "RNN": (1, 2),
}
# Exporters put these between a weight and its reader.
_PASSING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class WeightedOperator:
    """One operator and one of its weights (a recurrent operator has two).

    Attributes:
        name: Of the node.
        op_type: Of the node.
        weight: Name of the initializer.
        channel_axis: Axis of the weight along which outputs lie; None where the weight reaches the operator
            through other nodes, and for tensors quantized as a whole.
    """

    name: str
    op_type: str
    weight: str
    channel_axis: int | None


def weighted_operators(program: Program) -> tuple[WeightedOperator, ...]:
    """The operators that multiply with, or look up, a floating weight of rank 2 or more, in graph order."""
    found = []
    for node in program.graph:
        if node.domain:
            continue
        for slot in _SLOTS.get(node.op_type, ()):
            value = node.inputs[slot] if slot < len(node.inputs) else None
            weight = _initializer(value)
            if weight is not None:
                axis = _channel_axis(node, slot, weight) if weight is value else None
                found.append(WeightedOperator(node.name or "", node.op_type, weight.name or "", axis))
    return tuple(found)


def _initializer(value: ir.Value | None) -> ir.Value | None:
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _PASSING else None
    tensor = None if value is None else value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) < 2:
        return None
    return value


def _channel_axis(node: ir.Node, slot: int, weight: ir.Value) -> int:
    rank = 2 if weight.shape is None else len(weight.shape)
    if node.op_type == "MatMul":
        return rank - 1 if slot == 1 else rank - 2
    if node.op_type == "Gemm":
        turned = node.attributes.get("transB" if slot == 1 else "transA")
        flipped = turned is not None and turned.as_int() != 0
        return int(not flipped) if slot == 1 else int(flipped)
    # ConvTranspose keeps its outputs on axis 1, recurrent weights behind the directions
    return 1 if node.op_type in ("ConvTranspose", "LSTM", "GRU", "RNN") else 0


def quantization_error(weight: np.ndarray, axis: int | None, bits: int) -> float:
    """``L2(Q_b(W) - W)^2`` of symmetric round-to-nearest with one scale a channel.

    ``Q_b(w) = s clip(round(w / s), -m, m)`` with ``m = 2^(b-1) - 1`` and ``s = max abs(w) / m`` over the
    channel (over all of W where ``axis`` is None), in float64.
    """
    wide = weight.astype(np.float64)
    rest = tuple(i for i in range(wide.ndim) if i != axis)
    most = 2 ** (bits - 1) - 1
    scale = np.abs(wide).max(axis=rest, keepdims=True) / most
    safe = np.where(scale == 0, 1.0, scale)
    levels = np.clip(np.round(wide / safe), -most, most)
    return float(np.square(levels * safe - wide).sum())
