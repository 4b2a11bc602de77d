"""Residual streams: the values that normalizations read, joined by sums, who writes to them and who reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.channels import channels_of, link, linked_output
from lamina.passes.fold.graph import (
    LocalFold,
    Operators,
    attribute,
    constant,
    is_op,
    normalized_axis,
    rank_of,
)

_SHAPES = ("Shape", "Size")


@dataclass
class Stream:
    """One residual stream, every value of which is the sum of what linear writers give.

    Attributes:
        readers: The normalizations that read it.
        constants: What a linear map over its channels is folded into: weights, biases, tables; each with
            the axes that are its channels.
        obstacle: The first reason why no map can be folded into it.
        axes: Its values, each with its channel axis.
        roles: The operands, as node and index, that are ``constants`` or values of it; each with its axes.
    """

    readers: list[ir.Node] = field(default_factory=list)
    constants: dict[ir.Value, set[int]] = field(default_factory=dict)
    obstacle: str | None = None
    axes: dict[ir.Value, int] = field(default_factory=dict)
    roles: dict[tuple[ir.Node, int], set[int]] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        """Keep the first reason; the walk goes on, so that one stream is walked once."""
        self.obstacle = self.obstacle or reason

    def weigh(self, node: ir.Node, index: int, axis: int) -> None:
        """Note that ``axis`` of a constant operand is the channels."""
        value = node.inputs[index]
        self.roles.setdefault((node, index), set()).add(axis)
        if value is not None:
            self.constants.setdefault(value, set()).add(axis)


def label(node: ir.Node) -> str:
    """How a reason names a node."""
    return f"{node.op_type} '{node.name}'"


def plain_norm(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is such a normalization over the last axis that gives only its result."""
    if node is None or not is_op(node, *op_types) or any(v.name for v in node.outputs[1:]):
        return False
    return normalized_axis(attribute(node, "axis", -1), rank_of(node.inputs[0])) == -1


class Walk:
    """The walk of one residual stream to its ends; reads only.

    A subclass says what a linear map over the channels, the same for all of the stream, may pass and where
    it ends: :meth:`carried` and :meth:`handed` beyond operators that commute with every such map,
    :meth:`written` for those who write, :meth:`read` for those who read, :meth:`check` for constants.

    Args:
        graph: Where the stream is; whoever reads it elsewhere is an obstacle.
    """

    only_reader: ClassVar[str] = ""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.stream = Stream()

    def run(self, start: ir.Value) -> Stream:
        """The stream that ``start`` belongs to, whose channels lie along its last axis."""
        stream = self.stream
        pending = [(start, -1)]
        while pending:
            value, axis = pending.pop()
            if value in stream.axes:
                if stream.axes[value] != axis:
                    stream.refuse(f"'{value.name}' is read with its channels on two axes")
                continue
            stream.axes[value] = axis
            pending.extend(self._behind(value, axis))
            if value not in stream.constants:
                pending.extend(self._ahead(value, axis))
        for value in stream.constants:
            self.check(value)
        return stream

    def carried(self, node: ir.Node, axis: int) -> dict[int, int] | None:
        """The operands that hold the channels of ``node``'s output, each with its axis."""
        return link(node, axis)

    def handed(self, node: ir.Node, index: int, axis: int) -> int | None:
        """The axis of the output that ``axis`` of an operand becomes."""
        return linked_output(node, index, axis)

    def written(self, node: ir.Node, axis: int, size: int) -> dict[int, int] | str:
        """The operands a linear writer gets its channels from, each with its axis; or why it is none."""
        return _written(node, axis, size)

    def read(self, node: ir.Node, index: int, axis: int) -> bool:
        """Whether the stream may end at this reader, which is noted then."""
        raise NotImplementedError

    def check(self, value: ir.Value) -> None:
        """Refuse where a constant cannot take the map, or somebody else would see it."""
        raise NotImplementedError

    def _behind(self, value: ir.Value, axis: int) -> Iterator[tuple[ir.Value, int]]:
        """The values whose sum ``value`` is; what computes it linearly is noted as a writer."""
        stream, node = self.stream, value.producer()
        if constant(value) is not None:
            stream.constants.setdefault(value, set()).add(axis)
            return
        if node is None:
            stream.refuse(f"the input '{value.name}' writes to it")
            return
        carried = self.carried(node, axis)
        if carried is not None:
            for index, along in carried.items():
                stream.roles.setdefault((node, index), set()).add(along)
                if (operand := node.inputs[index]) is not None:
                    yield operand, along
            return
        size = channels_of(value, axis)
        found = "the number of its channels is unknown" if size is None else self.written(node, axis, size)
        if isinstance(found, str):
            stream.refuse(found)
            return
        for index, along in found.items():
            stream.weigh(node, index, along)

    def _ahead(self, value: ir.Value, axis: int) -> Iterator[tuple[ir.Value, int]]:
        """The sums that ``value`` enters; a reader that would see the map is an obstacle."""
        stream = self.stream
        if value.is_graph_output():
            stream.refuse(f"it leaves as the output '{value.name}'")
        for use in value.uses():
            node = use.node
            if node.graph is not self.graph:
                stream.refuse(f"{label(node)} of a subgraph reads it")
            elif is_op(node, *_SHAPES) or self.read(node, use.idx, axis):
                continue
            else:
                after = self.handed(node, use.idx, axis)
                if after is None:
                    stream.refuse(f"{label(node)} reads it and is {self.only_reader}")
                else:
                    yield node.outputs[0], after


class StreamFold(LocalFold):
    """A fold of whole streams: one finding a stream, however many normalizations read it.

    A subclass names the normalizations it starts from as its anchors, and walks from one in :meth:`walk`.
    """

    def walk(self, norm: ir.Node) -> Stream:
        """The stream that a normalization reads."""
        raise NotImplementedError

    def match(self, node: ir.Node) -> Stream | str | None:
        """The stream that a normalization reads, or what keeps the fold from it."""
        return self._verdict(self.walk(node)) if self._starts(node) else None

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite every stream, once all are walked: a reader of one may write to another."""
        rewriter.require_opset(self.minimum_opset)
        for node, found in list(self._found(rewriter.graph)):
            if not isinstance(found, str):
                self.rewrite(node, found, rewriter)

    def _starts(self, node: ir.Node) -> bool:
        source = node.inputs[0]
        return plain_norm(node, *self.anchors) and source is not None and source.dtype is ir.DataType.FLOAT

    def _found(self, graph: ir.Graph, operators: Operators | None = None) -> Iterator[tuple[ir.Node, Any]]:
        seen: set[ir.Node] = set()
        nodes: Iterable[ir.Node] = graph if operators is None else operators.named(self.anchors)
        for node in [n for n in nodes if is_op(n, *self.anchors)]:
            if node in seen or node.graph is not graph or not self._starts(node):
                continue
            stream = self.walk(node)
            seen.update(stream.readers)
            if (found := self._verdict(stream)) is not None:
                yield node, found

    def _verdict(self, stream: Stream) -> Stream | str | None:
        if stream.obstacle is None:
            return stream
        count = len(set(stream.readers))
        return f"{count} normalization{'s' if count > 1 else ''} of one residual stream: {stream.obstacle}"


def _written(node: ir.Node, axis: int, size: int) -> dict[int, int] | str:
    """The operands a linear writer gets its channels from, each with its axis; or why it is none."""
    if is_op(node, "MatMul") and axis == -1:
        return _weights(node, {1: -1}, size)
    if is_op(node, "Gemm") and axis == -1:
        return _weights(node, {1: -2 if attribute(node, "transB", 0) else -1, 2: -1}, size)
    rank = rank_of(node.outputs[0]) or 0
    if is_op(node, "Conv", "ConvTranspose") and axis == 1 - rank:
        if attribute(node, "group", 1) != 1:
            return f"{label(node)} writes to it in groups of channels"
        return _weights(node, {1: -rank if node.op_type == "Conv" else 1 - rank, 2: -1}, size)
    if is_op(node, "Mul", "Div"):
        return f"{label(node)} scales its channels: fold that into the weights before it first"
    return f"{label(node)} writes to it and is not linear with constant weights"


def _weights(node: ir.Node, axes: dict[int, int], size: int) -> dict[int, int] | str:
    found = {}
    for index, axis in axes.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None and index > 1:
            continue
        array = constant(value)
        if array is None or array.dtype != np.float32:
            return f"{label(node)} writes to it with a weight that is not a float32 constant"
        # trap: a MatMul with a vector sums the last axis away, so its output's last axis is another one
        if array.ndim < max(-axis, 2 if index == 1 else 1) or array.shape[axis] != size:
            return f"{label(node)} writes to it with a weight or bias that is broadcast over its channels"
        found[index] = axis
    return found
