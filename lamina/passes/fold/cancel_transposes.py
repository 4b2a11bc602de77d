"""Merge two transpositions with elementwise operators, or a Softmax, between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from lamina.passes.fold.merge_views import lays_out_heads
from lamina.passes.fold.views import is_elementwise, order_of
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    first: ir.Node
    between: tuple[ir.Node, ...]  # from the top
    perm: tuple[int, ...]  # the first
    both: tuple[int, ...]


@dataclass(frozen=True)
class CancelTransposes(LocalFold):
    """Replace Transpose(f(Transpose(x))) by f(x), transposed once if the two do not undo each other.

    Fires: f is a chain of elementwise operators (arithmetic with one number included), Softmax or LogSoftmax
    along the axis that moves, and nobody else reads what lies in between.
    Refuses: a value in between that is read elsewhere; a Softmax that would leave the last axis for nothing;
    a transposition that lays out attention heads, which another fold looks for.
    Effect: Rounding, <= 4 ulps of max|y|: vectorized kernels treat the last elements of a row by other code.
    Cost: O(nodes): a chain is followed from its end only.
    """

    effect: ClassVar[Effect] = Rounding(ulps=4)
    anchors: ClassVar[tuple[str, ...]] = ("Transpose",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The transposition above ``node``, with what lies between."""
        value, last = node.inputs[0], order_of(node)
        if value is None or last is None:
            return None
        between: list[ir.Node] = []
        above = value.producer()
        while above is not None and not is_op(above, "Transpose") and _passes(above, value, len(last)):
            source = _data(above)
            assert source is not None
            if sole_consumer(value) is None:
                return None
            between.append(above)
            value, above = source, source.producer()
        if above is None or not between or not is_op(above, "Transpose") or above.inputs[0] is None:
            return None
        perm = order_of(above)
        if perm is None or len(perm) != len(last):
            return None
        if sole_consumer(value) is None:
            return "the first transposition is read elsewhere"
        if lays_out_heads(above) or lays_out_heads(node):
            return "it lays out attention heads"
        both = tuple(perm[i] for i in last)
        undone = both == tuple(range(len(both)))
        if not undone and any(_axis(n, perm) not in (None, len(perm) - 1) for n in between):
            return "the softmax would leave the last axis"
        return _Match(above, tuple(reversed(between)), perm, both)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Let the chain read what was transposed first."""
        where, result, source = node.name or node.op_type, node.outputs[0], match.first.inputs[0]
        top, middle = match.between[0], match.first.outputs[0]
        top.replace_input_with(list(top.inputs).index(middle), source)
        back = [match.perm.index(i) for i in range(len(match.perm))]
        for inner in match.between:
            axis, output = _axis(inner, match.perm), inner.outputs[0]
            if axis is not None:
                inner.attributes["axis"] = ir.AttrInt64("axis", axis)
            if output.shape is not None:
                output.shape = ir.Shape([output.shape[i] for i in back])
        now = match.between[-1].outputs[0]
        if match.both == tuple(range(len(match.both))):
            rewriter.replace_uses(result, now)
            rewriter.remove([node])
        else:
            substitute(rewriter, result, "Transpose", [now], {"perm": list(match.both)})
        sweep(rewriter, [match.first])
        rewriter.record(
            self.name, where, f"merged with '{match.first.name}' past {len(match.between)} operators"
        )

    def apply(self, rewriter: Rewriter) -> None:
        """Sweep until nothing matches; every match removes a transposition."""
        before = -1
        while before != len(rewriter.records):
            before = len(rewriter.records)
            super().apply(rewriter)


def _data(node: ir.Node) -> ir.Value | None:
    """The one input of ``node`` that is not constant."""
    found = [v for v in node.inputs if v is not None and constant(v) is None]
    return found[0] if len(found) == 1 else None


def _passes(node: ir.Node, value: ir.Value, rank: int) -> bool:
    source = _data(node)
    if source is None or node.outputs[0] is not value:
        return False
    return is_op(node, "Softmax", "LogSoftmax") or is_elementwise(node, source, (rank_of(source) or rank,))


def _axis(node: ir.Node, perm: tuple[int, ...]) -> int | None:
    """The axis of a Softmax before the transposition; None for what has no axis."""
    if not is_op(node, "Softmax", "LogSoftmax"):
        return None
    return perm[attribute(node, "axis", -1) % len(perm)]
