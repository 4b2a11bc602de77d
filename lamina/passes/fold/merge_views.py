"""Merge operators that only reshape, one behind the other or with elementwise operators between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import (
    LocalFold,
    attribute,
    constant,
    is_op,
    rank_of,
    sole_consumer,
    substitute,
    sweep,
)
from lamina.passes.fold.heads import packed, permutation
from lamina.passes.fold.views import (
    VIEWS,
    axis_in,
    is_elementwise,
    is_view,
    reshape_target,
    same_shape,
    sizes,
    viewed_shape,
)
from lamina.passes.pass_ import Effect, Exact

_HEADS = ((0, 2, 1, 3), (0, 2, 3, 1))


@dataclass(frozen=True)
class _Step:
    """An operator between the two: the dims of its new result, and its new axis where it has one."""

    node: ir.Node
    dims: tuple[Any, ...]
    axis: int | None = None


@dataclass(frozen=True)
class _Match:
    first: ir.Node
    source: ir.Value
    between: tuple[_Step, ...]
    target: list[int] | None  # None: the shape is the source's again


@dataclass(frozen=True)
class MergeViews(LocalFold):
    """Replace two operators that only reshape by one Reshape, or by nothing.

    Such are Reshape, Flatten, Squeeze, Unsqueeze, a Transpose that moves only dims of 1, and a Gather of the
    only slice there is. Elementwise operators, and a Gather along an axis that the first one keeps, may stand
    between the two: they then read what the first one read.

    Fires: nobody else reads what lies between, or nothing is left to do.
    Refuses: a shape that constants cannot say (two unknown dims that moved; a dim of 0); a value in between
    that is read elsewhere; a transposition that lays out attention heads, which another fold looks for.
    Effect: Exact.
    Cost: O(nodes): a chain of elementwise operators is followed from its end only.
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = VIEWS

    def match(self, node: ir.Node) -> _Match | str | None:
        """The reshaping operator that stands before ``node``."""
        value = node.inputs[0]
        if value is None or not is_view(node):
            return None
        between, first = _above(value)
        if first is None or not is_view(first) or first.graph is not node.graph:
            return None
        source, middle = first.inputs[0], first.outputs[0]
        if source is None:
            return None
        if lays_out_heads(first) or lays_out_heads(node):
            return "it lays out attention heads"
        steps = _steps(source, middle, between)
        if steps is None:
            return None
        result = node.outputs[0]
        shape = viewed_shape(node) if result.is_graph_output() else result.shape
        alone = sole_consumer(middle) is not None
        if not between and same_shape(source, shape):
            return None if _is_stuck(node, source) else _Match(first, source, (), None)
        if not alone:
            return "the value in between is read elsewhere"
        if between and _ends_as(steps, shape):
            return _Match(first, source, steps, None)
        target = reshape_target(_Shaped(steps[-1].dims) if between else source, shape)  # type: ignore[arg-type]
        if target is None:
            return "no constant says the merged shape"
        return _Match(first, source, steps, target)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Read the source instead, and write the one Reshape that is left."""
        where, result, first = node.name or node.op_type, node.outputs[0], match.first
        now = match.source
        if match.between:
            top = match.between[0].node
            top.replace_input_with(list(top.inputs).index(first.outputs[0]), match.source)
        for step in match.between:
            if step.axis is not None:
                step.node.attributes["axis"] = ir.AttrInt64("axis", step.axis)
            now = step.node.outputs[0]
            now.shape = ir.Shape(step.dims)
        if match.target is None:
            rewriter.replace_uses(result, now)
            rewriter.remove([node])
        else:
            shape = rewriter.constant(np.array(match.target, np.int64), f"{result.name}_shape")
            substitute(rewriter, result, "Reshape", [now, shape])
        sweep(rewriter, [first])
        what = "undo each other" if match.target is None else "merged"
        rewriter.record(self.name, where, f"{first.op_type} and {node.op_type} {what}")

    def apply(self, rewriter: Rewriter) -> None:
        """Sweep until nothing matches; every match removes an operator."""
        before = -1
        while before != len(rewriter.records):
            before = len(rewriter.records)
            super().apply(rewriter)


@dataclass(frozen=True)
class _Shaped:
    """What :func:`reshape_target` reads of a value that is not there yet."""

    shape: tuple[Any, ...]


def _above(value: ir.Value) -> tuple[list[ir.Node], ir.Node | None]:
    """The operators that reshaping may pass, from the top, and what stands above them."""
    between: list[ir.Node] = []
    node = value.producer()
    while node is not None and not is_view(node) and _passes(node) and sole_consumer(value) is not None:
        source = _data(node)
        if source is None:
            return between, None
        between.insert(0, node)
        value, node = source, source.producer()
    if between and sole_consumer(value) is None:
        return between, None
    return between, node


def _passes(node: ir.Node) -> bool:
    source = _data(node)
    if source is None:
        return False
    return _gathers(node) or is_elementwise(node, source, (rank_of(source),))


def _gathers(node: ir.Node) -> bool:
    return is_op(node, "Gather") and constant(node.inputs[0]) is None and constant(node.inputs[1]) is not None


def _data(node: ir.Node) -> ir.Value | None:
    """The one input of ``node`` that is not constant."""
    found = [v for v in node.inputs if v is not None and constant(v) is None]
    return found[0] if len(found) == 1 else None


def _steps(source: ir.Value, middle: ir.Value, between: list[ir.Node]) -> tuple[_Step, ...] | None:
    """What the operators in between become when they read ``source``; None where one cannot."""
    if not between:
        return ()
    if source.shape is None or middle.shape is None:
        return None
    dims, old, found = tuple(source.shape), middle, []
    for node in between:
        axis = None
        if is_op(node, "Gather"):
            moved = _gathered(node, old, dims)
            if moved is None:
                return None
            axis, dims = moved
        elif not is_elementwise(node, old, (rank_of(old), len(dims))):
            return None
        found.append(_Step(node, dims, axis))
        old = node.outputs[0]
    return tuple(found)


def _gathered(node: ir.Node, old: ir.Value, dims: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]] | None:
    have, indices = sizes(old), constant(node.inputs[1])
    if have is None or indices is None or not all(isinstance(d, int) for d in dims):
        return None
    axis = axis_in(have, attribute(node, "axis", 0) % len(have), list(dims))
    return None if axis is None else (axis, (*dims[:axis], *indices.shape, *dims[axis + 1 :]))


def _ends_as(steps: tuple[_Step, ...], shape: Any) -> bool:
    return shape is not None and same_shape(_Shaped(steps[-1].dims), shape)  # type: ignore[arg-type]


def _is_stuck(node: ir.Node, source: ir.Value) -> bool:
    """Whether removing ``node`` would cost an Identity, which carries its output's name."""
    producer = source.producer()
    fixed = source.is_graph_output() or producer is None or producer.graph is not node.graph
    return node.outputs[0].is_graph_output() and (fixed or len(source.uses()) > 1)


def lays_out_heads(node: ir.Node) -> bool:
    """Whether a Transpose splits heads off, puts them together, or turns the keys of an attention."""
    if not is_op(node, "Transpose") or node.inputs[0] is None:
        return False
    if any(packed(node.outputs[0], perm) is not None for perm in _HEADS):
        return True
    if permutation(node) == _HEADS[0] and _multiplies_two(node.inputs[0].producer()):
        return True
    reader = sole_consumer(node.outputs[0])
    return _multiplies_two(reader)


def _multiplies_two(node: ir.Node | None) -> bool:
    return node is not None and is_op(node, "MatMul") and all(constant(v) is None for v in node.inputs)
