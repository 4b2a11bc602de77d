"""Projections of bodies that lie side by side: wider weights, and sums where a weight reads them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

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


def matmul(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """A projection, or a product of activations."""
    left, right = states
    if isinstance(right, Constants):
        return [_projection(widener, node, left, right)]
    if isinstance(left, (Same, Wide)) and isinstance(right, (Same, Wide)):
        return [_product(widener, node, left, right)]
    raise Unlike(f"MatMul '{node.name}' reads what cannot be put side by side")


def _projection(widener: Widener, node: ir.Node, left: State, right: Constants) -> State:
    weights = right.arrays
    if any(w.ndim != 2 for w in weights):
        raise Unlike(f"the weight of MatMul '{node.name}' is no matrix")
    if isinstance(left, (Same, Affine)):
        base, gains, shifts = _parts(left, len(weights))
        rank, scaled = rank_of(base), _scaled(weights, gains)
        if rank is None:
            raise Unlike(f"the rank of '{base.name}' is not known")
        weight = widener.store(np.concatenate(scaled, axis=1), right.values[0])
        (value,) = widener.op(node, [base, weight])
        sizes = tuple(w.shape[1] for w in weights)
        wide = Wide(value, rank - 1, rank, sizes)
        if shifts is not None:
            pairs = zip(shifts, weights, strict=True)
            wide = replace(wide, offsets=tuple(s @ w.astype(np.float64) for s, w in pairs))
        return shaped(wide, node.outputs[0])
    if not isinstance(left, Wide):
        raise Unlike(f"MatMul '{node.name}' reads what the last projection makes")
    left = widener.solid(left)
    left = lowered(widener, left) if left.raised else left
    if left.axis == left.rank - 1:
        weight = widener.store(np.concatenate(weights, axis=0), right.values[0])
        (value,) = widener.op(node, [left.value, weight], like=node.outputs)
        return Total(value)
    if left.axis == left.rank - 2 or not right.equal:
        raise Unlike(f"MatMul '{node.name}' has another weight in each body, for heads that lie side by side")
    (value,) = widener.op(node, [left.value, widener.keep(right.values[0])])
    return shaped(replace(left, value=value), node.outputs[0])


def _parts(
    state: Same | Affine, count: int
) -> tuple[ir.Value, tuple[Array, ...] | None, tuple[Array, ...] | None]:
    """The shared value, gains and shifts, where there are any."""
    if isinstance(state, Same):
        return state.value, None, None
    return state.base, state.gains, state.shifts if any(np.any(s) for s in state.shifts) else None


def _scaled(weights: Sequence[Array], gains: Sequence[Array] | None) -> list[Array]:
    """Weights [in, out] that take the gains of what they read; rounded once, when they are stored."""
    if gains is None:
        return list(weights)
    return [w.astype(np.float64) * g.reshape(-1, 1) for w, g in zip(weights, gains, strict=True)]


def _product(widener: Widener, node: ir.Node, left: Same | Wide, right: Same | Wide) -> State:
    """A product of activations; bodies may lie along rows, columns or what is multiplied one by one."""
    left = widener.solid(left) if isinstance(left, Wide) else left
    right = widener.solid(right) if isinstance(right, Wide) else right
    ranks = {s.rank if isinstance(s, Wide) else rank_of(s.value) for s in (left, right)}
    frame = _outer(left, right)
    if frame is not None and len(ranks) == 1:
        (value,) = widener.op(node, [left.value, right.value])
        return shaped(replace(frame, value=value), node.outputs[0])
    if _contracts(left, right) and all(isinstance(s, Same) or s.rank == 3 or s.raised for s in (left, right)):
        (value,) = widener.op(node, [_raised(widener, left), _raised(widener, right)])
        return shaped(Wide(value, 1, 4, (1,) * widener.count, raised=True), node.outputs[0])
    raise Unlike(f"MatMul '{node.name}' mixes what lies side by side")


def _outer(left: Same | Wide, right: Same | Wide) -> Wide | None:
    """Where bodies lie in a product whose sum does not run over them; None where it does."""
    if isinstance(left, Wide) and isinstance(right, Wide):
        alike = (left.axis, left.sizes, left.raised) == (right.axis, right.sizes, right.raised)
        return left if alike and left.axis < left.rank - 2 else None
    if isinstance(left, Wide):
        return left if left.axis == left.rank - 2 else None
    return right if isinstance(right, Wide) and right.axis == right.rank - 1 else None


def _contracts(left: Same | Wide, right: Same | Wide) -> bool:
    """Whether the sum of the product runs over the axis that bodies lie along, or one side was raised."""
    inner = isinstance(left, Wide) and (left.raised or left.axis == left.rank - 1)
    return inner or (isinstance(right, Wide) and (right.raised or right.axis == right.rank - 2))


def _raised(widener: Widener, state: Same | Wide) -> ir.Value:
    """A value with an axis for the bodies at place 1: [b, k, ..] of [b, t, k d] or [b, k d, t]."""
    if isinstance(state, Same):
        if rank_of(state.value) != 3:
            raise Unlike(f"'{state.value.name}' is no [b, t, d]")
        return widener.extra("Unsqueeze", [state.value, widener.integers(1)])
    if state.raised:
        return state.value
    parts = [widener.count, state.size]
    if state.axis == 1:
        return widener.extra("Reshape", [state.value, widener.integers(0, *parts, -1)])
    split = widener.extra("Reshape", [state.value, widener.integers(0, 0, *parts)])
    return widener.extra("Transpose", [split], {"perm": [0, 2, 1, 3]})


def lowered(widener: Widener, state: Wide) -> Wide:
    """[b, t, k d] of [b, k, t, d]."""
    turned = widener.extra("Transpose", [state.value], {"perm": [0, 2, 1, 3]})
    value = widener.extra("Reshape", [turned, widener.integers(0, 0, -1)])
    return Wide(value, 2, 3, state.sizes)


def gemm(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """A projection with its bias."""
    left, right, *rest = states
    if not isinstance(right, Constants) or attribute(node, "transA", 0):
        raise Unlike(f"the weight of Gemm '{node.name}' is no constant")
    turned = bool(attribute(node, "transB", 0))
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    weights = [alpha * (w.T if turned else w).astype(np.float64) for w in right.arrays]
    widths = [w.shape[1] for w in weights]
    biases = [np.zeros(n) for n in widths]
    if rest and rest[0] is not None:
        if not isinstance(rest[0], Constants) or any(a.ndim > 1 for a in rest[0].arrays):
            raise Unlike(f"the bias of Gemm '{node.name}' is no constant vector")
        biases = [beta * np.broadcast_to(a, (n,)) for a, n in zip(rest[0].arrays, widths, strict=True)]
    if isinstance(left, (Same, Affine)):
        base, gains, shifts = _parts(left, len(weights))
        if shifts is not None:
            biases = [b + s @ w for b, s, w in zip(biases, shifts, weights, strict=True)]
        weight, bias = np.concatenate(_scaled(weights, gains), axis=1), np.concatenate(biases)
        value = _gemm(widener, node, base, weight, bias, turned)
        return [shaped(Wide(value, 1, 2, tuple(widths)), node.outputs[0])]
    if not isinstance(left, Wide) or left.axis != 1:
        raise Unlike(f"Gemm '{node.name}' reads what cannot be put side by side")
    weight, bias = np.concatenate(weights, axis=0), np.asarray(sum(biases))
    return [Total(_gemm(widener, node, widener.solid(left).value, weight, bias, turned))]


def _gemm(
    widener: Widener, node: ir.Node, source: ir.Value, weight: Array, bias: Array, turned: bool
) -> ir.Value:
    first, name = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert first is not None
    inputs = [source, widener.store(weight.T if turned else weight, first)]
    if np.any(bias):
        kind = None if first.dtype is None else first.dtype.numpy()
        inputs.append(widener.store(bias, name or first, kind))
    return widener.op(node, inputs, {"alpha": 1.0, "beta": 1.0})[0]


def conv(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """A convolution of what all bodies share, of each body's channels, or of all of them into one sum."""
    left, right, *rest = states
    if not isinstance(right, Constants):
        raise Unlike(f"the kernel of Conv '{node.name}' is no constant")
    biases = rest[0] if rest else None
    if biases is not None and not isinstance(biases, Constants):
        raise Unlike(f"the bias of Conv '{node.name}' is no constant")
    groups, kernels = int(attribute(node, "group", 1)), right.arrays
    each = None if biases is None else [b.astype(np.float64) for b in biases.arrays]
    first, old = right.values[0], node.inputs[2] if len(node.inputs) > 2 else None
    rank = kernels[0].ndim

    def written(source: ir.Value, kernel: Array, bias: Array | None, count: int) -> ir.Value:
        inputs = [source, widener.store(kernel, first)]
        if bias is not None and old is not None:
            inputs.append(widener.store(bias, old))
        return widener.op(node, inputs, {"group": count} if count != groups else None)[0]

    if isinstance(left, Same) and groups == 1:
        value = written(
            left.value, np.concatenate(kernels), None if each is None else np.concatenate(each), 1
        )
        return [shaped(Wide(value, 1, rank, tuple(len(k) for k in kernels)), node.outputs[0])]
    if not isinstance(left, Wide) or left.axis != 1 or left.rank != rank:
        raise Unlike(f"Conv '{node.name}' reads what cannot be put side by side")
    if groups == 1:
        value = written(
            left.value, np.concatenate(kernels, axis=1), None if each is None else np.asarray(sum(each)), 1
        )
        return [Total(value)]
    if left.size % groups or len({len(k) for k in kernels}) > 1:
        raise Unlike(f"the groups of Conv '{node.name}' differ")
    bias = None if each is None else np.concatenate(each)
    value = written(left.value, np.concatenate(kernels), bias, groups * widener.count)
    return [shaped(Wide(value, 1, rank, tuple(len(k) for k in kernels)), node.outputs[0])]
