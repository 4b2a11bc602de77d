"""Recognize a decomposed layer normalization and write the standard operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import (
    LocalFold,
    consumers,
    is_op,
    other_input,
    rank_of,
    scalar,
    sole_consumer,
    substitute,
)
from lamina.passes.fold.normalizations import affine_constant, averaged_axes, root_of, squared
from lamina.passes.pass_ import Effect, Rounding

_Array = np.ndarray[Any, Any]
_ELSEWHERE = "the difference is not divided by its root, or a value on the way is read elsewhere"


@dataclass(frozen=True)
class _Centred:
    """The value x - mean(x), and the nodes that make it."""

    x: ir.Value
    mean: ir.Value
    axes: int
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Normalized:
    """The value (x - mean) / sqrt(variance + epsilon), with what was multiplied and added on the way."""

    result: ir.Value
    nodes: tuple[ir.Node, ...]
    weight: ir.Value | None = None
    bias: ir.Value | None = None


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    found: _Normalized
    epsilon: float
    dims: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class FuseLayerNormalization(LocalFold):
    """Replace (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * weight + bias by ``LayerNormalization``.

    Fires: float32; means over the last axes, kept; Mul or Pow for the square; Sqrt and Div, Sqrt and
    Reciprocal, Pow 0.5 or -0.5; the weight multiplied to the root or to the quotient, TensorFlow's
    x * s + (bias - mean * s) too; weight and bias constants of the shape of the normalized axes.
    Refuses: other axes; unknown dimensions; another data type; a value on the way that is read elsewhere.
    Effect: Rounding, some ulps of max|y|; more where |mean| is far above the deviation, as before.
    Cost: O(ReduceMean nodes).
    Source: Ba et al. 2016, arXiv:1607.06450, eq. 3.
    """

    effect: ClassVar[Effect] = Rounding(ulps=32)
    paper: ClassVar[str] = "arXiv:1607.06450"
    minimum_opset: ClassVar[int] = 17
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The normalization around a ReduceMean of the square of a difference from the mean."""
        difference = squared(node.inputs[0])
        centred = None if difference is None else _centred(difference)
        if centred is None or difference is None:
            return None
        rank = rank_of(centred.x)
        shift = sole_consumer(node.outputs[0])
        if rank is None or shift is None or not is_op(shift, "Add"):
            return None
        epsilon = scalar(other_input(shift, node.outputs[0]), rank)
        if epsilon is None or averaged_axes(node, rank) != centred.axes:
            return "its two means are not over the same last axes, kept, plus a number"
        dims = _last_dims(centred.x, centred.axes)
        if dims is None or centred.x.dtype is not ir.DataType.FLOAT:
            return "it is not float32 with known last dimensions"
        found = _normalized(centred, difference, shift.outputs[0], dims, rank)
        square = node.inputs[0].producer() if node.inputs[0] is not None else None
        if found is None or square is None or not _enclosed((square, node, shift, *found.nodes)):
            return _ELSEWHERE
        return _Match(centred.x, found, epsilon, dims, rank)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the operator; without a weight it gets one of ones, which the operator demands."""
        found = _with_affine(match.found, match.dims, match.rank)
        where = found.result.producer().name  # type: ignore[union-attr]  # a result has one
        weight = _shaped(found.weight, match, rewriter, "weight")
        if weight is None:
            weight = rewriter.constant(np.ones(match.dims, np.float32), "lamina_norm_ones")
        bias = _shaped(found.bias, match, rewriter, "bias")
        inputs = [match.x, weight] if bias is None else [match.x, weight, bias]
        attributes = {"axis": -len(match.dims), "epsilon": match.epsilon}
        substitute(rewriter, found.result, "LayerNormalization", inputs, attributes)
        rewriter.record(self.name, where or "LayerNormalization", "decomposed layer normalization")


def _centred(value: ir.Value | None) -> _Centred | None:
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Sub"):
        return None
    x, mean = node.inputs
    average = None if mean is None else mean.producer()
    if x is None or mean is None or average is None or not is_op(average, "ReduceMean"):
        return None
    rank = rank_of(x)
    axes = averaged_axes(average, rank) if rank is not None and average.inputs[0] is x else None
    return None if axes is None else _Centred(x, mean, axes, (average, node))


def _last_dims(value: ir.Value, count: int) -> tuple[int, ...] | None:
    dims = () if value.shape is None else tuple(value.shape)[-count:]
    known = tuple(d for d in dims if isinstance(d, int))
    return known if len(known) == count else None


def _normalized(
    centred: _Centred, difference: ir.Value, variance: ir.Value, dims: tuple[int, ...], rank: int
) -> _Normalized | None:
    """What divides ``difference`` by the root of ``variance``, in any of its spellings."""
    root = root_of(variance)
    if root is None:
        return None
    nodes = (*centred.nodes, *root.nodes)
    readers = consumers(root.value)
    if not root.inverse:
        node = readers[0] if len(readers) == 1 else None
        divides = node is not None and is_op(node, "Div") and node.inputs[1] is root.value
        if not divides or node is None or node.inputs[0] is root.value:
            return None
        above = _same_difference(node.inputs[0], difference, centred)
        return None if above is None else _Normalized(node.outputs[0], (*nodes, *above, node))
    scale, weight = root.value, None
    if len(readers) == 1 and is_op(readers[0], "Mul"):
        other = other_input(readers[0], scale)
        if affine_constant(other, dims, rank) is not None:
            weight, scale = other, readers[0].outputs[0]
            nodes = (*nodes, readers[0])
    return _multiplied(centred, difference, scale, weight, nodes, dims, rank)


def _multiplied(
    centred: _Centred,
    difference: ir.Value,
    scale: ir.Value,
    weight: ir.Value | None,
    nodes: tuple[ir.Node, ...],
    dims: tuple[int, ...],
    rank: int,
) -> _Normalized | None:
    """(x - mean) * scale, or x * scale + (bias - mean * scale)."""
    readers = consumers(scale)
    if not all(is_op(r, "Mul") for r in readers):
        return None
    if len(readers) == 1:
        above = _same_difference(other_input(readers[0], scale), difference, centred)
        if above is None:
            return None
        return _Normalized(readers[0].outputs[0], (*nodes, *above, readers[0]), weight)
    products = {other_input(r, scale): r for r in readers}
    scaled, offset = products.get(centred.x), products.get(centred.mean)
    if len(readers) != 2 or scaled is None or offset is None:
        return None
    return _shifted(scaled, offset, (*nodes, scaled, offset), weight, dims, rank)


def _shifted(
    scaled: ir.Node,
    offset: ir.Node,
    nodes: tuple[ir.Node, ...],
    weight: ir.Value | None,
    dims: tuple[int, ...],
    rank: int,
) -> _Normalized | None:
    """X * scale - mean * scale, or x * scale + (bias - mean * scale)."""
    shift = sole_consumer(offset.outputs[0])
    total = sole_consumer(scaled.outputs[0])
    if shift is None or total is None or not is_op(shift, "Sub") or shift.inputs[1] is not offset.outputs[0]:
        return None
    if shift is total and shift.inputs[0] is scaled.outputs[0]:
        return _Normalized(shift.outputs[0], (*nodes, shift), weight)
    if not is_op(total, "Add") or other_input(total, scaled.outputs[0]) is not shift.outputs[0]:
        return None
    if affine_constant(shift.inputs[0], dims, rank) is None:
        return None
    return _Normalized(total.outputs[0], (*nodes, shift, total), weight, shift.inputs[0])


def _same_difference(
    value: ir.Value | None, difference: ir.Value, centred: _Centred
) -> tuple[ir.Node, ...] | None:
    """The nodes behind ``value`` where it is x - mean, computed once more or not."""
    if value is difference:
        return ()
    again = _centred(value)
    same = again is not None and again.x is centred.x and again.axes == centred.axes
    return again.nodes if same and again is not None else None


def _enclosed(nodes: tuple[ir.Node, ...]) -> bool:
    """Whether nothing but ``nodes``, the last one's result aside, reads what they compute."""
    members, graph = set(nodes), nodes[0].graph
    inner = [v for n in nodes[:-1] for v in n.outputs]
    hidden = all(not v.is_graph_output() and all(r in members for r in consumers(v)) for v in inner)
    return hidden and all(n.graph is graph for n in nodes)


def _with_affine(found: _Normalized, dims: tuple[int, ...], rank: int) -> _Normalized:
    """``found`` with the weight and bias that follow it taken in."""
    result, weight, bias = found.result, found.weight, found.bias
    graph = found.nodes[0].graph
    node = sole_consumer(result)
    if weight is None and bias is None and node is not None and node.graph is graph and is_op(node, "Mul"):
        other = other_input(node, result)
        if affine_constant(other, dims, rank) is not None:
            result, weight = node.outputs[0], other
            node = sole_consumer(result)
    if bias is None and node is not None and node.graph is graph and is_op(node, "Add"):
        other = other_input(node, result)
        if affine_constant(other, dims, rank) is not None:
            result, bias = node.outputs[0], other
    return _Normalized(result, found.nodes, weight, bias)


def _shaped(value: ir.Value | None, match: _Match, rewriter: Rewriter, role: str) -> ir.Value | None:
    """The constant, without ones in front of its shape: the operator wants just the normalized axes."""
    array = affine_constant(value, match.dims, match.rank)
    if value is None or array is None or value.shape == array.shape:
        return value
    return rewriter.constant(array, f"{value.name or role}_flat")
