"""Merge a Slice with the Slice before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, constant, is_op, rank_of, sole_consumer, substitute
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class _Cut:
    start: int
    end: int
    step: int


@dataclass(frozen=True)
class _Match:
    inner: ir.Node
    source: ir.Value
    cuts: dict[int, _Cut]


@dataclass(frozen=True)
class MergeSlices(LocalFold):
    """Replace a Slice of a Slice by one.

    Fires: the bounds are constant, and the two cut different axes, or an axis of known size.
    Refuses: bounds that are computed; the first result read elsewhere; an axis of unknown size cut twice;
    axes counted from either end where the rank is unknown.
    Effect: Exact.
    Cost: O(nodes).
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = ("Slice",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The Slice before ``node``."""
        value = node.inputs[0]
        inner = None if value is None else value.producer()
        if value is None or inner is None or not is_op(inner, "Slice") or inner.inputs[0] is None:
            return None
        if sole_consumer(value) is not node:
            return "the first slice is read elsewhere"
        source = inner.inputs[0]
        first, second = _cuts(inner), _cuts(node)
        if first is None or second is None:
            return "a bound is computed, or an axis cut twice"
        rank = rank_of(source)
        if rank is not None:
            first, second = ({axis % rank: cut for axis, cut in c.items()} for c in (first, second))
        elif len({axis < 0 for axis in (*first, *second)}) > 1:
            return "axes are counted from either end, and the rank is unknown"
        merged = dict(first)
        for axis, cut in second.items():
            joined = cut if axis not in first else _joined(first[axis], cut, source, axis)
            if joined is None:
                return "an axis of unknown size is cut twice"
            merged[axis] = joined
        return _Match(inner, source, merged)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the one Slice."""
        where, result = node.name or node.op_type, node.outputs[0]
        axes = sorted(match.cuts)
        cuts = [match.cuts[axis] for axis in axes]
        columns = {
            "starts": [c.start for c in cuts],
            "ends": [c.end for c in cuts],
            "axes": axes,
            "steps": [c.step for c in cuts],
        }
        bounds = [
            rewriter.constant(np.array(numbers, np.int64), f"{result.name}_{name}")
            for name, numbers in columns.items()
        ]
        substitute(rewriter, result, "Slice", [match.source, *bounds])
        rewriter.record(self.name, where, f"merged with '{match.inner.name}' before it")


def _cuts(node: ir.Node) -> dict[int, _Cut] | None:
    """What a Slice cuts per axis; None where that is computed or says an axis twice."""
    values = [node.inputs[i] if i < len(node.inputs) else None for i in range(1, 5)]
    arrays = [constant(v) for v in values]
    if any(v is not None and a is None for v, a in zip(values, arrays, strict=True)):
        return None
    starts, ends, axes, steps = ([] if a is None else a.reshape(-1).tolist() for a in arrays)
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    rank = rank_of(node.inputs[0])
    if len({a % rank if rank else a for a in axes}) != len(starts) or not starts:
        return None
    return {a: _Cut(*cut) for a, *cut in zip(axes, starts, ends, steps, strict=True)}


def _joined(first: _Cut, second: _Cut, source: ir.Value, axis: int) -> _Cut | None:
    """One cut for two of an axis of known size; Python counts and clamps as the operator does."""
    size = source.shape[axis] if source.shape is not None else None
    if not isinstance(size, int):
        return None
    left = range(size)[first.start : first.end : first.step][second.start : second.end : second.step]
    if not left:
        return _Cut(0, 0, 1)
    # A stop before the first element is -1, which would count from the end.
    return _Cut(left.start, left.stop if left.stop >= 0 else -size - 1, left.step)
