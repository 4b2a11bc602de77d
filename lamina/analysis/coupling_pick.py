"""Coupling rules of operators that take or add a part of an axis: Slice, Gather, Pad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling_layout import other_axes, tie_range
from lamina.analysis.coupling_relation import Relation, constant


def slice_(relation: Relation) -> None:
    """Slice with constant bounds: the output is a stride of the input; computed bounds freeze their axes."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(*relation.node.inputs[1:])
    ranges = slice_ranges(relation.node, relation.shape(x) or ())
    if ranges is None:
        relation.freeze_all("the sliced axes are computed")
        return
    relation.through([x, out], other_axes(relation, ranges))
    for axis, taken in ranges.items():
        if taken is None:
            relation.freeze(x, axis, "the bounds of the slice are computed")
            relation.freeze(out, axis, "the bounds of the slice are computed")
        elif len(taken) == 1 and (relation.shape(x) or ())[axis] > 1:
            relation.freeze(x, axis, "the only channel of a slice", taken)
        elif len(taken):
            atom = relation.atom(len(taken))
            relation.tie(x, axis, atom, index=np.arange(len(taken)), positions=taken)
            relation.tie(out, axis, atom)


def slice_ranges(node: ir.Node, shape: Sequence[int]) -> dict[int, np.ndarray | None] | None:
    """Axis -> indices a Slice takes (None: computed); None where the axes themselves are computed."""
    given = [constant(v) if v is not None else None for v in (*node.inputs, *[None] * 5)[1:5]]
    starts, ends, axes, steps = given
    count = next((len(a) for a in (starts, ends) if a is not None), None)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        if axes is None:
            return None
        count = len(axes)
    elif count is None:
        count = len(shape)
    listed = [int(a) % len(shape) for a in axes] if axes is not None else list(range(count))
    if len(node.inputs) < 5 or node.inputs[4] is None:
        steps = np.ones(count, dtype=np.int64)
    found: dict[int, np.ndarray | None] = {}
    for i, axis in enumerate(listed):
        if starts is None or ends is None or steps is None:
            found[axis] = None
        else:
            found[axis] = np.arange(shape[axis])[
                _bounds(int(starts[i]), int(ends[i]), int(steps[i]), shape[axis])
            ]
    return found


def _bounds(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's bounds as Python's: both clamp, but an end far below zero means the beginning."""
    if step < 0 and end < -size:
        return slice(start, None, step)
    return slice(start, end, step)


def gather(relation: Relation) -> None:
    """Gather: constant indices are a map of the axis; computed ones freeze it (a table's rows)."""
    x, indices, out = relation.input(0), relation.input(1), relation.output(0)
    shape, looked = relation.shape(x) or (), relation.shape(indices) or ()
    axis = relation.node.attributes.get_int("axis", 0) % max(1, len(shape))
    taken = constant(indices)
    for i, size in enumerate(shape):
        if i != axis:
            atom = relation.atom(size)
            relation.tie(x, i, atom, role="table")
            relation.tie(out, i if i < axis else i + len(looked) - 1, atom)
    if taken is None or len(looked) > 1:
        relation.freeze(x, axis, "rows are looked up by computed indices")
        for i, size in enumerate(looked):
            atom = relation.atom(size)
            relation.tie(indices, i, atom)
            relation.tie(out, axis + i, atom)
        return
    relation.aside(indices)
    at = taken.reshape(-1).astype(np.int64) % shape[axis]
    if len(at) == 1:
        relation.freeze(x, axis, "the only channel of a look-up", at)
        return
    atom = relation.atom(shape[axis])
    relation.tie(x, axis, atom, role="table")
    relation.tie(out, axis, atom, index=at)


def pad(relation: Relation) -> None:
    """Pad with a constant: the input is a range of the output; padded channels may go, the pads shrink."""
    node, x, out = relation.node, relation.input(0), relation.output(0)
    relation.aside(*node.inputs[1:])
    before = pads_before(node, len(relation.shape(x) or ()))
    if before is None:
        relation.freeze_all("the pads are computed")
        return
    for axis, size in enumerate(relation.shape(x) or ()):
        made = (relation.shape(out) or ())[axis]
        start = before[axis]
        if (
            start < 0
            or start + size > made
            or (size != made and node.attributes.get_string("mode", "constant") != "constant")
        ):
            relation.freeze(x, axis, "padding that crops or repeats")
            relation.freeze(out, axis, "padding that crops or repeats")
        else:
            tie_range(relation, x, out, axis, start, size)


def pads_before(node: ir.Node, rank: int) -> list[int] | None:
    """Elements a Pad adds before each axis; None where they are computed."""
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes: list[int] = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = constant(node.inputs[3])
        if given is None:
            return None
        axes = [int(a) % rank for a in given]
    if pads is None:
        return None
    before = [0] * rank
    for i, axis in enumerate(axes):
        before[axis] = int(pads[i])
    return before
