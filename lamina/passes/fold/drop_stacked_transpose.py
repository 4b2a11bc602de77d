"""Stack tensors along the axis that a transposition would move them to."""

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
)
from lamina.passes.fold.views import PLAIN, keeps_order, order_of, reshape_target
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class _Part:
    value: ir.Value
    source: ir.Value
    op_type: str
    numbers: list[int]  # the new axes, or the new shape


@dataclass(frozen=True)
class _Match:
    concat: ir.Node
    parts: tuple[_Part, ...]
    axis: int
    perm: tuple[int, ...]


@dataclass(frozen=True)
class DropStackedTranspose(LocalFold):
    """Replace Transpose(Concat(Unsqueeze(a), Unsqueeze(b), ...)) by the same without the Transpose.

    A channel shuffle of two halves is written like this. Also for a Reshape in place of an Unsqueeze, where
    the transposition moves only dims of 1 of what it gives.

    Fires: every part is unsqueezed or reshaped for this Concat alone.
    Refuses: a part that is not, or that the transposition would have to copy; a sum read elsewhere.
    Effect: Exact.
    Cost: O(nodes and inputs).
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = ("Transpose",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The Concat before ``node`` and how its parts can be shaped instead."""
        value, perm = node.inputs[0], order_of(node)
        concat = None if value is None else value.producer()
        if value is None or perm is None or concat is None or not is_op(concat, "Concat"):
            return None
        if not any(v is not None and is_op(v.producer(), *PLAIN) for v in concat.inputs):
            return None
        if sole_consumer(value) is not node:
            return "the stack is read elsewhere"
        axis = attribute(concat, "axis", 0) % len(perm)
        parts = []
        for part in concat.inputs:
            found = None if part is None else _part(concat, part, axis, perm)
            if found is None:
                return "a part is not reshaped for the stack alone, or would have to be transposed"
            parts.append(found)
        return _Match(concat, tuple(parts), perm.index(axis), perm)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the parts in their new shapes, and the Concat in place of the transposition."""
        where, result, written = node.name or node.op_type, node.outputs[0], dict[ir.Value, ir.Value]()
        for part in match.parts:
            if part.value not in written:
                shape = part.value.shape
                part.value.shape = None if shape is None else ir.Shape([shape[i] for i in match.perm])
                numbers = rewriter.constant(np.array(part.numbers, np.int64), f"{part.value.name}_shape")
                new = substitute(rewriter, part.value, part.op_type, [part.source, numbers])
                written[part.value] = new.outputs[0]
        inputs = [written[part.value] for part in match.parts]
        substitute(rewriter, result, "Concat", inputs, {"axis": match.axis})
        rewriter.record(self.name, where, f"{len(inputs)} parts stacked along axis {match.axis}")


def _part(concat: ir.Node, value: ir.Value, axis: int, perm: tuple[int, ...]) -> _Part | None:
    node = value.producer()
    source = None if node is None else node.inputs[0]
    if node is None or source is None or not is_op(node, *PLAIN) or sole_consumer(value) is not concat:
        return None
    rest = [p for p in perm if p != axis]
    axes = constant(node.inputs[1]) if node.op_type == "Unsqueeze" else None
    if axes is not None and rest == sorted(rest) and [a % len(perm) for a in axes.reshape(-1)] == [axis]:
        return _Part(value, source, "Unsqueeze", [perm.index(axis)])
    if rank_of(value) != len(perm) or value.shape is None or not keeps_order(perm, value):
        return None
    target = reshape_target(source, [value.shape[i] for i in perm])
    return None if target is None else _Part(value, source, "Reshape", target)
