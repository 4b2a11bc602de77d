"""Take single slices of a tensor itself, not of its transposition."""

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
    consumers,
    is_op,
    sole_consumer,
    substitute,
    sweep,
)
from lamina.passes.fold.views import order_of, reshape_target, sizes
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class _Match:
    readers: list[ir.Node]  # the Gathers
    axes: list[int]  # what they gather along then
    reshape: ir.Node | None = None
    dims: tuple[int, ...] = ()  # the shape they read then, where a Reshape stands in between


@dataclass(frozen=True)
class DropGatheredTranspose(LocalFold):
    """Replace Gather(Transpose(x), i) by Gather(x, i) along the axis that was moved.

    A channel shuffle is split into its halves like this: Reshape, Transpose, Reshape, two Gathers. The second
    Reshape may then only split dims, or join dims that stay neighbours.

    Fires: every reader is a Gather of one slice (a scalar index); the dims that are left keep their order.
    Refuses: other readers; an order that changes; unknown dims where a Reshape stands in between.
    Effect: Exact.
    Cost: O(nodes): the readers of a transposition are looked at once.
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = ("Transpose",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """A transposition, and the Gathers behind it."""
        value, perm = node.outputs[0], order_of(node)
        if perm is None or value.is_graph_output() or node.inputs[0] is None:
            return None
        reader = sole_consumer(value)
        if reader is not None and is_op(reader, "Reshape") and reader.graph is node.graph:
            return _behind_reshape(node, perm, reader)
        readers = _gathers(node, value)
        if readers is None or isinstance(readers, str):
            return readers
        axes = _moved(readers, perm)
        return "the dims that are left change their order" if axes is None else _Match(readers, axes)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Read what was transposed."""
        source, where = node.inputs[0], node.name or node.op_type
        if match.reshape is not None:
            result = match.reshape.outputs[0]
            target = rewriter.constant(np.array(match.dims, np.int64), f"{result.name}_shape")
            shape = ir.Shape(d if d > 0 else None for d in match.dims)
            result.shape = shape
            source = substitute(rewriter, result, "Reshape", [source, target]).outputs[0]
        for reader, axis in zip(match.readers, match.axes, strict=True):
            if match.reshape is None:
                reader.replace_input_with(0, source)
            reader.attributes["axis"] = ir.AttrInt64("axis", axis)
        sweep(rewriter, [node])
        rewriter.record(self.name, where, f"{len(match.readers)} slices taken before the transposition")


def _gathers(node: ir.Node, value: ir.Value) -> list[ir.Node] | str | None:
    """The readers of ``value``, if they all take one slice of it."""
    readers = consumers(value)
    if value.is_graph_output() or not readers or not any(is_op(r, "Gather") for r in readers):
        return None
    for reader in readers:
        index = constant(reader.inputs[1]) if is_op(reader, "Gather") else None
        if index is None or index.ndim or reader.inputs[0] is not value or reader.graph is not node.graph:
            return "something else reads the transposition"
    return readers


def _moved(readers: list[ir.Node], perm: tuple[int, ...]) -> list[int] | None:
    """The axes before the transposition, if taking a slice along each leaves the others in order."""
    axes = [perm[attribute(r, "axis", 0) % len(perm)] for r in readers]
    for axis in set(axes):
        rest = [p for p in perm if p != axis]
        if rest != sorted(rest):
            return None
    return axes


def _behind_reshape(node: ir.Node, perm: tuple[int, ...], reshape: ir.Node) -> _Match | str | None:
    readers = _gathers(node, reshape.outputs[0])
    if readers is None or isinstance(readers, str):
        return readers
    before, after = sizes(node.outputs[0]), sizes(reshape.outputs[0])
    if before is None or after is None or 0 in before:
        return "the shapes are not known"
    split = regrouped(before, after, perm)
    if split is None:
        return "the reshape joins dims that were not neighbours"
    dims, order = split
    target = reshape_target(node.inputs[0], dims)  # type: ignore[arg-type]
    axes = _moved(readers, order)
    if axes is None or target is None:
        return "the dims that are left change their order"
    return _Match(readers, axes, reshape, tuple(target))


def regrouped(
    before: list[int], after: list[int], perm: tuple[int, ...]
) -> tuple[list[int], tuple[int, ...]] | None:
    """A reshape and a permutation that do what transposing by ``perm`` and then reshaping does.

    Args:
        before: The dims that transposing gave.
        after: The dims that reshaping them gave.
        perm: The permutation.

    Returns:
        The dims to reshape to first, and the permutation to apply then; None where there are none.
    """
    groups: list[tuple[list[int], list[int]]] = []  # axes of ``before`` and of ``after`` that hold the same
    i = j = 0
    while i < len(before) or j < len(after):
        left, right, a, b = list[int](), list[int](), 1, 1
        while not left or not right or a != b:
            if (a <= b and i < len(before)) or (j == len(after) and i < len(before)):
                left.append(i)
                a, i = a * before[i], i + 1
            elif j < len(after):
                right.append(j)
                b, j = b * after[j], j + 1
            else:
                break
        if a != b:
            return None
        groups.append((left, right))
    for left, _ in groups:
        came = [perm[k] for k in left if before[k] != 1]
        if came != list(range(came[0], came[0] + len(came))) if came else False:
            return None
    homes = [min((perm[k] for k in left if before[k] != 1), default=-1) for left, _ in groups]
    ranked = sorted(range(len(groups)), key=lambda g: (homes[g], g))
    placed = [axis for g in ranked for axis in groups[g][1]]
    return [after[axis] for axis in placed], tuple(placed.index(axis) for axis in range(len(after)))
