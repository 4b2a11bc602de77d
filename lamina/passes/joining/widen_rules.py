"""What each operator does to values of several bodies that lie side by side (:mod:`.widen`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lamina.ir.branch_view import words
from lamina.passes.fold.graph import attribute, rank_of
from lamina.passes.joining.widen import (
    Affine,
    Array,
    Constants,
    Same,
    State,
    Total,
    Unlike,
    Wide,
    Widener,
    shaped,
)
from lamina.passes.joining.widen_linear import conv, gemm, matmul
from lamina.passes.joining.widen_views import (
    concat,
    expand,
    reshape,
    shape,
    slices,
    split,
    squeeze,
    transpose,
    unsqueeze,
)

Rule = Callable[[Widener, ir.Node, Sequence[State]], list[State]]

_UNARY = words(
    "Abs Cast Celu Clip Cos Dropout Elu Erf Exp Gelu HardSigmoid HardSwish Identity IsNaN LeakyRelu Log Mish "
    "Neg Not Reciprocal Relu Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh ThresholdedRelu"
)
_BROADCAST = words(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow Sub Sum Where"
)


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of a node's operator, or None where there is none."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in _UNARY:
        return _unary
    return _broadcast if node.op_type in _BROADCAST else _RULES.get(node.op_type)


def _unary(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    wide = states[0]
    if not isinstance(wide, Wide):
        raise Unlike(f"{node.op_type} '{node.name}' reads what cannot be put side by side")
    wide = widener.solid(wide)
    values = widener.op(node, [wide.value, *(widener.shared(s) for s in states[1:])], like=[wide.value])
    return [_moved(wide, v) for v in values]


def _moved(wide: Wide, value: ir.Value) -> Wide:
    return Wide(value, wide.axis, wide.rank, wide.sizes, raised=wide.raised)


# -- elementwise ------------------------------------------------------------------------------------


def _broadcast(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    wides = [s for s in states if isinstance(s, Wide)]
    if not wides:
        if any(isinstance(s, Total) for s in states):
            return [_after_sum(widener, node, states)]
        return [_affine(node, states)]
    biased = _biased(widener, node, states)
    if biased is not None:
        return [biased]
    wides = [widener.solid(w) for w in wides]
    frame = max(wides, key=lambda w: w.rank)
    if any(
        (w.axis - w.rank, w.sizes, w.raised) != (frame.axis - frame.rank, frame.sizes, frame.raised)
        for w in wides
    ):
        raise Unlike(
            f"{node.op_type} '{node.name}' combines values that lie side by side along different axes"
        )
    inputs = [
        widener.solid(s).value if isinstance(s, Wide) else _fitting(widener, node, s, frame) for s in states
    ]
    rank = max([frame.rank, *(rank_of(v) or 0 for v in inputs if v is not None)])
    (value,) = widener.op(node, inputs)
    made = Wide(value, frame.axis + rank - frame.rank, rank, frame.sizes, raised=frame.raised)
    return [shaped(made, node.outputs[0])]


def _fitting(widener: Widener, node: ir.Node, state: State, frame: Wide) -> ir.Value | None:
    """An operand beside bodies that lie side by side."""
    if isinstance(state, Same):
        rank = rank_of(state.value)
        if rank is None or state.value.shape is None or (frame.raised and rank > 2):
            raise Unlike(f"the shape of '{state.value.name}' is not known, or it has no place for heads")
        at = frame.axis - frame.rank + rank
        if at < 0 or state.value.shape[at] == 1:
            return state.value
        return widener.spread(state.value, at)
    if not isinstance(state, Constants):
        raise Unlike(
            f"{node.op_type} '{node.name}' reads a sum of the bodies, or a normalization beside them"
        )
    value = state.values[0]
    ranks = {a.ndim for a in state.arrays}
    if len(ranks) > 1:
        raise Unlike(f"the constants of '{node.name}' differ in shape")
    at = frame.axis - frame.rank + ranks.pop()
    if state.equal and (at < 0 or state.arrays[0].shape[at] == 1):
        return widener.keep(value)
    if frame.raised and state.arrays[0].ndim > 2:
        raise Unlike(f"the constant of '{node.name}' has no place for heads")
    parts = []
    for array, size in zip(state.arrays, frame.sizes, strict=True):
        full = array.reshape((1,) * max(0, -at) + array.shape)
        place = max(at, 0)
        parts.append(np.broadcast_to(full, (*full.shape[:place], size, *full.shape[place + 1 :])))
    return widener.store(np.concatenate(parts, axis=max(at, 0)), value)


def _biased(widener: Widener, node: ir.Node, states: Sequence[State]) -> State:
    """The bias of a projection, with what a normalization's shift adds to it."""
    wide = next((s for s in states if isinstance(s, Wide)), None)
    biases = next((s for s in states if isinstance(s, Constants)), None)
    if node.op_type != "Add" or wide is None or wide.offsets is None or biases is None or len(states) > 2:
        return None
    if wide.axis != wide.rank - 1 or any(
        a.shape != (n,) for a, n in zip(biases.arrays, wide.sizes, strict=True)
    ):
        return None
    both = [a.astype(np.float64) + b for a, b in zip(biases.arrays, wide.offsets, strict=True)]
    bias = widener.store(np.concatenate(both), biases.values[0])
    (value,) = widener.op(node, [wide.value, bias], like=[wide.value])
    return _moved(wide, value)


def _after_sum(widener: Widener, node: ir.Node, states: Sequence[State]) -> State:
    """The bias of the last projection, or a scale that all bodies have in common."""
    total = next(s for s in states if isinstance(s, Total))
    others = next((s for s in states if isinstance(s, Constants)), None)
    if others is None or len(states) > 2 or node.op_type not in ("Add", "Mul"):
        raise Unlike(f"{node.op_type} '{node.name}' reads what the last projection makes")
    if node.op_type == "Mul":
        if not others.equal:
            raise Unlike(f"'{node.name}' scales what the bodies make differently")
        second = widener.keep(others.values[0])
    else:
        added = np.asarray(sum(a.astype(np.float64) for a in others.arrays))
        second = widener.store(added, others.values[0])
    (value,) = widener.op(node, [total.value, second], like=[total.value])
    return Total(value)


def _affine(node: ir.Node, states: Sequence[State]) -> State:
    """A gain or shift of each body's own on a value they share."""
    unlike = Unlike(f"{node.op_type} '{node.name}' has other constants in each body, and is no gain or shift")
    if len(states) != 2 or node.op_type not in ("Add", "Sub", "Mul", "Div"):
        raise unlike
    first, second = states
    if isinstance(first, Constants) and node.op_type in ("Add", "Mul"):
        first, second = second, first
    if not isinstance(first, (Same, Affine)) or not isinstance(second, Constants):
        raise unlike
    base = first.value if isinstance(first, Same) else first.base
    width = base.shape[-1] if base.shape is not None and len(base.shape) else None
    if not isinstance(width, int) or any(a.size not in (1, width) or a.ndim > 1 for a in second.arrays):
        raise unlike
    count = len(second.arrays)
    one, none = (np.ones(width),) * count, (np.zeros(width),) * count
    gains, shifts = (one, none) if isinstance(first, Same) else (first.gains, first.shifts)
    constants = [a.astype(np.float64) for a in second.arrays]
    if node.op_type in ("Add", "Sub"):
        sign = 1 if node.op_type == "Add" else -1
        return Affine(base, gains, tuple(s + sign * c for s, c in zip(shifts, constants, strict=True)))
    factors = constants if node.op_type == "Mul" else [1 / c for c in constants]
    return Affine(
        base,
        tuple(g * f for g, f in zip(gains, factors, strict=True)),
        tuple(s * f for s, f in zip(shifts, factors, strict=True)),
    )


# -- normalizations and attention -------------------------------------------------------------------


def _normalize(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """A normalization of the stream, its gain and shift left to what reads it; or of each head."""
    source, *constants = states
    rank = rank_of(node.inputs[0])
    if rank is None or attribute(node, "axis", -1) not in (-1, rank - 1) or len(node.outputs) > 1:
        raise Unlike(f"{node.op_type} '{node.name}' is not over the last axis alone")
    if isinstance(source, Wide):
        source = widener.solid(source)
        if source.axis == source.rank - 1:
            raise Unlike(f"{node.op_type} '{node.name}' mixes what lies side by side")
        kept = [widener.shared(s) for s in constants]
        return [_moved(source, *widener.op(node, [source.value, *kept], {"axis": -1}, like=[source.value]))]
    if not isinstance(source, Same) or not isinstance(constants[0], Constants):
        raise Unlike(f"{node.op_type} '{node.name}' reads what differs from body to body")
    gains = tuple(a.astype(np.float64) for a in constants[0].arrays)
    shifts = tuple(np.zeros_like(g) for g in gains)
    if len(constants) > 1 and isinstance(constants[1], Constants):
        shifts = tuple(a.astype(np.float64) for a in constants[1].arrays)
    return [Affine(_plain(widener, node, source.value, gains[0]), gains, shifts)]


def _plain(widener: Widener, node: ir.Node, source: ir.Value, gain: Array) -> ir.Value:
    """The normalization with a gain of ones; one for all that read the same stream alike."""
    epsilon = attribute(node, "epsilon", 1e-5)
    key = ("plain", node.op_type, source, epsilon)
    if key not in widener.made:
        ones = widener.number(np.ones_like(gain), source)
        first = widener.rewriter.op(
            node.op_type,
            [source, ones],
            {"axis": -1, "epsilon": epsilon},
            name=f"{node.name}_plain",
            dtype=source.dtype,
            shape=source.shape,
        )
        widener.made[key] = first
    made: ir.Value = widener.made[key]
    return made


def _softmax(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    wide, rank = states[0], rank_of(node.inputs[0])
    if not isinstance(wide, Wide) or rank is None:
        raise Unlike(f"{node.op_type} '{node.name}' reads what cannot be put side by side")
    wide = widener.solid(wide)
    axis = attribute(node, "axis", -1)
    axis = axis if axis < 0 else axis - rank
    if axis + wide.rank == wide.axis:
        raise Unlike(f"{node.op_type} '{node.name}' mixes what lies side by side")
    return [_moved(wide, *widener.op(node, [wide.value], {"axis": axis}, like=[wide.value]))]


def _attention(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Heads one behind another; keys or values that all bodies share are repeated."""
    if len(node.outputs) > 1 or any(s is not None for s in states[4:]):
        raise Unlike(f"Attention '{node.name}' keeps keys and values")
    if attribute(node, "qk_matmul_output_mode", 0):
        raise Unlike(f"Attention '{node.name}' shows its scores")
    rank = rank_of(node.inputs[0])
    axis = 2 if rank == 3 else 1
    inputs = [_heads(widener, node, s, axis) for s in states[:3]]
    if len(states) > 3 and states[3] is not None:
        mask = widener.shared(states[3])
        if mask is None or mask.shape is None or (len(mask.shape) == 4 and mask.shape[1] != 1):
            raise Unlike(f"the mask of Attention '{node.name}' may be one of each head")
        inputs.append(mask)
    names = ("q_num_heads", "kv_num_heads")
    heads = {n: widener.count * int(attribute(node, n, 1)) for n in names if n in node.attributes}
    (value,) = widener.op(node, inputs, heads)
    dims = node.outputs[0].shape
    size = None if dims is None else dims[axis]
    if rank not in (3, 4) or not isinstance(size, int):
        raise Unlike(f"the heads of Attention '{node.name}' are not known")
    return [shaped(Wide(value, axis, rank, (size,) * widener.count), node.outputs[0])]


def _heads(widener: Widener, node: ir.Node, state: State, axis: int) -> ir.Value:
    if isinstance(state, Same):
        return widener.spread(state.value, axis)
    if not isinstance(state, Wide) or state.axis != axis or len(set(state.sizes)) > 1:
        raise Unlike(f"the heads of Attention '{node.name}' do not lie side by side")
    return widener.solid(state).value


def _rotary(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    wide = states[0]
    if not isinstance(wide, Wide) or wide.axis != (2 if wide.rank == 3 else 1):
        raise Unlike(f"the heads of RotaryEmbedding '{node.name}' do not lie side by side")
    wide, size = widener.solid(wide), wide.size
    heads = int(attribute(node, "num_heads", 0))
    if wide.rank == 3 and (not heads or size % heads):
        raise Unlike(f"the heads of RotaryEmbedding '{node.name}' are not known")
    changes = {"num_heads": heads * widener.count} if heads else {}
    inputs = [wide.value, *(widener.shared(s) for s in states[1:])]
    return [_moved(wide, *widener.op(node, inputs, changes, like=[wide.value]))]


_RULES: dict[str, Rule] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": conv,
    "LayerNormalization": _normalize,
    "RMSNormalization": _normalize,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "Reshape": reshape,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "Expand": expand,
    "Slice": slices,
    "Split": split,
    "Concat": concat,
    "Shape": shape,
}
