"""Coupling rules of operators that move data: reshapes, transposes, joins, cuts, copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling_pointwise import broadcast
from lamina.analysis.coupling_relation import Relation


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
    order = relation.node.attributes.get_ints("perm") or list(range(len(shape)))[::-1]
    for place, axis in enumerate(order):
        atom = relation.atom(shape[axis])
        relation.tie(x, axis, atom, role="channelwise")
        relation.tie(out, place, atom)


def concat(relation: Relation) -> None:
    """Concat: along its axis each input is a range of the output."""
    out = relation.output(0)
    shape = relation.shape(out) or ()
    axis = relation.node.attributes.get_int("axis", 0) % max(1, len(shape))
    relation.through([*relation.node.inputs, out], other_axes(relation, [axis]))
    start = 0
    for value in relation.node.inputs:
        size = (relation.shape(value) or shape)[axis]
        tie_range(relation, value, out, axis, start, size)
        start += size


def split(relation: Relation) -> None:
    """Split: along its axis each output is a range of the input."""
    x = relation.input(0)
    relation.aside(relation.input(1))
    rank = len(relation.shape(x) or ())
    axis = relation.node.attributes.get_int("axis", 0) % max(1, rank)
    relation.through([x, *relation.node.outputs], other_axes(relation, [axis]))
    start = 0
    for value in relation.node.outputs:
        size = (relation.shape(value) or (0,) * rank)[axis]
        tie_range(relation, value, x, axis, start, size)
        start += size


def tie_range(
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


def other_axes(relation: Relation, apart: Iterable[int]) -> list[int]:
    """Axes of the first input but those in ``apart``."""
    return sorted(set(range(len(relation.shape(relation.input(0)) or ()))) - set(apart))


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


def resize(relation: Relation) -> None:
    """Resize: axes that keep their size are tied, the others mix neighbours."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(*relation.node.inputs[1:])
    if relation.node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        relation.freeze_all("a crop is resized")
        return
    if "axes" in relation.node.attributes:
        relation.freeze_all("only some axes are listed")
        return
    sizes = zip(relation.shape(x) or (), relation.shape(out) or (), strict=True)
    relation.through([x, out], [axis for axis, (size, made) in enumerate(sizes) if size == made])


def space_to_depth(relation: Relation) -> None:
    """SpaceToDepth, DepthToSpace: a channel is one in every pixel of a block."""
    x, out = relation.input(0), relation.output(0)
    block = relation.node.attributes.get_int("blocksize", 1) ** 2
    few, many = (x, out) if relation.node.op_type == "SpaceToDepth" else (out, x)
    channels = (relation.shape(few) or (1, 1))[1]
    relation.through([x, out], [0])
    if channels == 1:
        return
    atom = relation.atom(channels)
    relation.tie(few, 1, atom)
    at = np.arange(channels * block)
    by_channel = relation.node.attributes.get_string("mode", "DCR") == "CRD"
    relation.tie(many, 1, atom, index=at // block if by_channel else at % channels)


def constant_of_shape(relation: Relation) -> None:
    """ConstantOfShape: all elements are equal, any may go."""
    relation.aside(relation.input(0))
    for axis in range(len(relation.shape(relation.output(0)) or ())):
        relation.free(relation.output(0), axis)


def shape_of(relation: Relation) -> None:
    """Shape: reads no channels; what it says is restored when its input shrinks."""
    relation.aside(relation.output(0))
    for axis in range(len(relation.shape(relation.input(0)) or ())):
        relation.free(relation.input(0), axis)


def triangle(relation: Relation) -> None:
    """Trilu: rows and columns stay."""
    x, out = relation.input(0), relation.output(0)
    relation.aside(relation.input(1))
    rank = len(relation.shape(x) or ())
    relation.through([x, out], range(rank - 2))
