"""Residual streams: the values that layer normalizations read, joined by sums, and who writes to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.passes.fold.channels import channels_of, link, linked_output
from lamina.passes.fold.graph import attribute, constant, is_op, normalized_axis, rank_of

_SHAPES = ("Shape", "Size")


@dataclass
class Stream:
    """One residual stream, every value of which is the sum of what linear writers give.

    Attributes:
        readers: The layer normalizations that read it.
        constants: What makes it zero-mean when it is: weights, biases, tables; each with its channel axis.
        obstacle: The first reason why it cannot be centred.
        axes: Its values, each with its channel axis.
        roles: The operands, as node and index, through which ``constants`` enter it.
    """

    readers: list[ir.Node] = field(default_factory=list)
    constants: dict[ir.Value, int] = field(default_factory=dict)
    obstacle: str | None = None
    axes: dict[ir.Value, int] = field(default_factory=dict)
    roles: set[tuple[ir.Node, int]] = field(default_factory=set)

    def refuse(self, reason: str) -> None:
        """Keep the first reason; the walk goes on, so that one stream is walked once."""
        self.obstacle = self.obstacle or reason


def label(node: ir.Node) -> str:
    """How a reason names a node."""
    return f"{node.op_type} '{node.name}'"


def plain_layer_norm(node: ir.Node | None) -> bool:
    """Whether ``node`` is a LayerNormalization over the last axis that gives only its result."""
    if node is None or not is_op(node, "LayerNormalization") or any(v.name for v in node.outputs[1:]):
        return False
    return normalized_axis(attribute(node, "axis", -1), rank_of(node.inputs[0])) == -1


def stream_of(norm: ir.Node) -> Stream:
    """Walk the residual stream that a plain layer normalization reads, to its ends. Reads only."""
    stream = Stream()
    start = norm.inputs[0]
    pending: list[tuple[ir.Value, int]] = [] if start is None else [(start, -1)]
    while pending:
        value, axis = pending.pop()
        if value in stream.axes:
            if stream.axes[value] != axis:
                stream.refuse(f"'{value.name}' is read with its channels on two axes")
            continue
        stream.axes[value] = axis
        pending.extend(_behind(value, axis, stream))
        if value not in stream.constants:
            pending.extend(_ahead(value, axis, norm.graph, stream))
    for value in stream.constants:
        _check_constant(value, stream)
    return stream


def _behind(value: ir.Value, axis: int, stream: Stream) -> Iterator[tuple[ir.Value, int]]:
    """The values whose sum ``value`` is; what computes it linearly is noted as a writer."""
    node = value.producer()
    if constant(value) is not None:
        stream.constants[value] = axis
        return
    if node is None:
        stream.refuse(f"the input '{value.name}' writes to it")
        return
    carried = link(node, axis)
    if carried is not None:
        stream.roles.update((node, i) for i in carried)
        yield from ((v, a) for i, a in carried.items() if (v := node.inputs[i]) is not None)
        return
    size = channels_of(value, axis)
    found = "the number of its channels is unknown" if size is None else _written(node, axis, size)
    if isinstance(found, str):
        stream.refuse(found)
        return
    for index, along in found.items():
        weight = node.inputs[index]
        stream.roles.add((node, index))
        if weight is not None and stream.constants.setdefault(weight, along) != along:
            stream.refuse(f"'{weight.name}' is used with its channels on two axes")


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
    if is_op(node, "LayerNormalization"):
        return _normalized(node, axis)
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


def _normalized(node: ir.Node, axis: int) -> dict[int, int] | str:
    """A normalization's own output has no mean only if its gain is the same for all channels."""
    gain = constant(node.inputs[1])
    if axis != -1 or not plain_layer_norm(node) or gain is None or np.ptp(gain) != 0:
        return (
            f"{label(node)} writes to it (post-norm), and its gain differs between channels,"
            " so that its output has a mean"
        )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return f"{label(node)} writes to it with a computed bias"
    return {} if bias is None else {2: -1}


def _ahead(value: ir.Value, axis: int, graph: Any, stream: Stream) -> Iterator[tuple[ir.Value, int]]:
    """The sums that ``value`` enters; a reader that sees its mean is an obstacle."""
    if value.is_graph_output():
        stream.refuse(f"it leaves as the output '{value.name}'")
    for use in value.uses():
        node = use.node
        if node.graph is not graph:
            stream.refuse(f"{label(node)} of a subgraph reads it")
        elif is_op(node, *_SHAPES):
            continue
        elif plain_layer_norm(node) and use.idx == 0 and axis == -1:
            stream.readers.append(node)
        else:
            after = linked_output(node, use.idx, axis)
            if after is None:
                stream.refuse(f"{label(node)} reads it and is no layer normalization over its channels")
            else:
                yield node.outputs[0], after


def _check_constant(value: ir.Value, stream: Stream) -> None:
    """Whether centring a constant is seen by this stream only, or changes nothing."""
    array = constant(value)
    if array is None or array.dtype != np.float32:
        stream.refuse(f"'{value.name}' writes to it and is not a float32 constant")
        return
    others = [u.node for u in value.uses() if (u.node, u.idx) not in stream.roles]
    axis = stream.constants[value]
    if (others or value.is_graph_output()) and np.any(array.mean(axis=axis, dtype=np.float64) != 0):
        reader = label(others[0]) if others else "the interface"
        stream.refuse(f"'{value.name}' writes to it, and {reader} reads the same weight")
