"""Coupling rules of operators that move data: reshapes, transposes, joins, cuts, look-ups, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling_pointwise import broadcast
from lamina.analysis.coupling_relation import (
    Relation,
    constant,
    int_attribute,
    ints_attribute,
    text_attribute,
)


def reshape(relation: Relation) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: axes are products of common factors.

    Both shapes are cut where their leading products agree; inside such a segment the sizes of the factors are
    the ratios of successive trailing products of both sides. Where those do not divide, the segment stays.
    """
    x, out = relation.input(0), relation.output(0)
    relation.aside(*relation.node.inputs[1:])
    before, after = relation.shape(x) or (), relation.shape(out) or ()
    if 0 in before:
        relation.freeze_all("the tensor is empty")
        return
    for left, right in segments(before, after):
        trailing = sorted({*_trailing(before, left), *_trailing(after, right)})
        if any(b % a for a, b in itertools.pairwise(trailing)):
            for value, axes in ((x, left), (out, right)):
                for axis in axes:
                    relation.freeze(value, axis, "sizes before and after have no common factors")
            continue
        bounds = list(itertools.pairwise(trailing))[::-1]
        factors = [(outer, relation.atom(outer // inner)) for inner, outer in bounds]
        for value, shape, axes in ((x, before, left), (out, after, right)):
            for axis in axes:
                inner = math.prod(shape[a] for a in axes if a > axis)
                own = [atom for outer, atom in factors if inner < outer <= inner * shape[axis]]
                relation.split(value, axis, own, "channelwise")


def _trailing(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    products = [1]
    for axis in reversed(axes):
        products.append(products[-1] * shape[axis])
    return products


def segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of the two shapes with equal products, as short as possible."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        if i == len(before) or j == len(after):  # what is left has size 1
            found.append((list(range(i, len(before))), list(range(j, len(after)))))
            break
        while (not left and not right) or a != b:
            if (a <= b and i < len(before)) or j == len(after):
                left.append(i)
                a, i = a * before[i], i + 1
            else:
                right.append(j)
                b, j = b * after[j], j + 1
        found.append((left, right))
    return found


def transpose(relation: Relation) -> None:
    """Transpose: axes change places."""
    x, out = relation.input(0), relation.output(0)
    shape = relation.shape(x) or ()
    order = ints_attribute(relation.node, "perm") or list(range(len(shape)))[::-1]
    for place, axis in enumerate(order):
        atom = relation.atom(shape[axis])
        relation.tie(x, axis, atom, role="channelwise")
        relation.tie(out, place, atom)


def concat(relation: Relation) -> None:
    """Concat: along its axis each input is a range of the output."""
    out = relation.output(0)
    shape = relation.shape(out) or ()
    axis = int_attribute(relation.node, "axis") % max(1, len(shape))
    _pass_others(relation, relation.node.inputs, relation.node.outputs, {axis})
    start = 0
    for value in relation.node.inputs:
        size = (relation.shape(value) or shape)[axis]
        _range(relation, value, out, axis, start, size)
        start += size


def split(relation: Relation) -> None:
    """Split: along its axis each output is a range of the input."""
    x = relation.input(0)
    relation.aside(relation.input(1))
    rank = len(relation.shape(x) or ())
    axis = int_attribute(relation.node, "axis") % max(1, rank)
    _pass_others(relation, [x], relation.node.outputs, {axis})
    start = 0
    for value in relation.node.outputs:
        size = (relation.shape(value) or (0,) * rank)[axis]
        _range(relation, value, x, axis, start, size)
        start += size


def _range(
    relation: Relation, part: ir.Value | None, whole: ir.Value | None, axis: int, start: int, size: int
) -> None:
    """``part`` is ``whole[start : start + size]`` along an axis, which may have size 1 in either."""
    if size == 1 and (relation.shape(whole) or ())[axis] > 1:
        # trap: a part of one channel cannot lose it, and a tie on it would be left out
        relation.freeze(whole, axis, "the only channel of a part", np.arange(start, start + 1))
        return
    if size:
        atom = relation.atom(size)
        relation.tie(part, axis, atom)
        relation.tie(whole, axis, atom, index=np.arange(size), positions=np.arange(start, start + size))


def _pass_others(
    relation: Relation, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value], apart: set[int]
) -> None:
    """Tie all axes but those in ``apart`` one to one."""
    shape = relation.shape(inputs[0]) or ()
    for axis, size in enumerate(shape):
        if axis not in apart:
            atom = relation.atom(size)
            for value in (*inputs, *outputs):
                relation.tie(value, axis, atom)


def slice_(relation: Relation) -> None:
    """Slice with constant bounds: the output is a stride of the input; computed bounds freeze their axes."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(*relation.node.inputs[1:])
    ranges = slice_ranges(relation.node, relation.shape(x) or ())
    if ranges is None:
        relation.freeze_all("the sliced axes are computed")
        return
    _pass_others(relation, [x], [v for v in (out,) if v is not None], set(ranges))
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
    axis = int_attribute(relation.node, "axis") % max(1, len(shape))
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


def expand(relation: Relation) -> None:
    """Expand: an axis that grows from 1 may be cut by asking for less."""
    relation.aside(relation.input(1))
    broadcast(relation, relation.node.inputs[:1], relation.output(0))


def tile(relation: Relation) -> None:
    """Tile: index i of the output is index i % size of the input."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(relation.input(1))
    for axis, size in enumerate(relation.shape(x) or ()):
        made = (relation.shape(out) or ())[axis]
        if size == 1 < made:
            relation.freeze(out, axis, "copies of one channel")
            continue
        atom = relation.atom(size)
        relation.tie(x, axis, atom)
        relation.tie(out, axis, atom, index=np.arange(made) % size)


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
            or (size != made and text_attribute(node, "mode", "constant") != "constant")
        ):
            relation.freeze(x, axis, "padding that crops or repeats")
            relation.freeze(out, axis, "padding that crops or repeats")
        else:
            _range(relation, x, out, axis, start, size)


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


def resize(relation: Relation) -> None:
    """Resize: axes that keep their size are tied, the others mix neighbours."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(*relation.node.inputs[1:])
    if text_attribute(relation.node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        relation.freeze_all("a crop is resized")
        return
    if "axes" in relation.node.attributes:
        relation.freeze_all("only some axes are listed")
        return
    for axis, size in enumerate(relation.shape(x) or ()):
        if size == (relation.shape(out) or ())[axis]:
            atom = relation.atom(size)
            relation.tie(x, axis, atom)
            relation.tie(out, axis, atom)


def space_to_depth(relation: Relation) -> None:
    """SpaceToDepth, DepthToSpace: a channel is one in every pixel of a block."""
    x, out = relation.input(0), relation.output(0)
    block = int_attribute(relation.node, "blocksize", 1) ** 2
    few, many = (x, out) if relation.node.op_type == "SpaceToDepth" else (out, x)
    channels = (relation.shape(few) or (1, 1))[1]
    batch, atom = relation.atom((relation.shape(x) or (1,))[0]), relation.atom(channels)
    relation.tie(x, 0, batch)
    relation.tie(out, 0, batch)
    if channels == 1:
        return
    relation.tie(few, 1, atom)
    at = np.arange(channels * block)
    by_channel = text_attribute(relation.node, "mode", "DCR") == "CRD"
    relation.tie(many, 1, atom, index=at // block if by_channel else at % channels)


def constant_of_shape(relation: Relation) -> None:
    """ConstantOfShape: all elements are equal, any may go."""
    relation.aside(relation.input(0))
    for axis in range(len(relation.shape(relation.output(0)) or ())):
        relation.free(relation.output(0), axis)


def shape_of(relation: Relation) -> None:
    """Shape: reads no channels; what it says is restored when its input shrinks."""
    relation.aside(relation.input(0), relation.output(0))


def triangle(relation: Relation) -> None:
    """Trilu: rows and columns stay."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(relation.input(1))
    rank = len(relation.shape(x) or ())
    _pass_others(relation, [x], [v for v in (out,) if v is not None], {rank - 2, rank - 1})
