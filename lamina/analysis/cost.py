"""What a program costs on paper for given inputs: arithmetic, parameters, bytes, peak activation memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lamina.analysis.flops import Tensors, count_operations
from lamina.analysis.roofline import VIEWS, operator_bytes, tensor_bytes
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes


@dataclass(frozen=True)
class OperatorCost:
    """One operator.

    Attributes:
        name: Node name.
        kind: Operator type.
        flops: Floating-point operations, a multiply-add counted as 2.
        macs: Multiply-adds among them.
        parameters: Elements of the trained weights it reads (a shared weight counts at each reader).
        weight_bytes: Their stored bytes.
        activation_bytes: Bytes of activations it reads and writes.
        bytes_moved: What it reads and writes, weights included, when nothing is fused
            (:func:`lamina.analysis.roofline.operator_bytes`): a view moves nothing, Gather the rows it takes.
    """

    name: str
    kind: str
    flops: int
    macs: int
    parameters: int
    weight_bytes: int
    activation_bytes: int
    bytes_moved: int = 0


@dataclass(frozen=True)
class CostResult:
    """The program's costs for one set of input shapes.

    Attributes:
        flops: Sum over operators.
        macs: Sum over operators.
        parameters: Weight elements; each weight counts once, however many operators read it.
        weight_bytes: Stored bytes of all weights, each once.
        peak_activation_bytes: Most bytes of activations alive at once when operators run in the program's
            order: inputs live until their last use, outputs to the end, views share their source. A runtime
            that works in place or fuses needs less.
        operators: One entry a node, in order.
        estimated: Operator types without a rule, counted as one operation an output element.
        tensors: Shape and dtype of every tensor of the run that was counted.
    """

    flops: int
    macs: int
    parameters: int
    weight_bytes: int
    peak_activation_bytes: int
    operators: tuple[OperatorCost, ...]
    estimated: tuple[str, ...] = ()
    tensors: Tensors = field(default_factory=dict, repr=False)

    @property
    def bytes_moved(self) -> int:
        """Sum over operators."""
        return sum(o.bytes_moved for o in self.operators)


def cost(program: Program, feeds: Mapping[str, np.ndarray]) -> CostResult:
    """Count what running ``program`` on inputs shaped like ``feeds`` takes.

    Shapes are those of a real run. Nodes inside subgraphs (If, Loop) are not looked into: their operator
    counts as one operation an output element and is listed in ``estimated``.

    Args:
        program: The program.
        feeds: One array an input; indices among them must be valid.

    Raises:
        BackendError: The program does not run on these feeds.
    """
    tensors = observed_shapes(program, feeds)
    weights = program.graph.initializers
    operators, estimated = [], set()
    for node in program.graph:
        flops, macs, known = count_operations(node, tensors)
        if not known:
            estimated.add(node.op_type)
        operators.append(_operator(node, flops, macs, weights, tensors))
    return CostResult(
        flops=sum(o.flops for o in operators),
        macs=sum(o.macs for o in operators),
        parameters=parameters(program),
        weight_bytes=weight_bytes(program),
        peak_activation_bytes=_peak(program.graph, tensors),
        operators=tuple(operators),
        estimated=tuple(sorted(estimated)),
        tensors=tensors,
    )


def parameters(program: Program) -> int:
    """Elements of all weights: floating constants, and integer ones an operator dequantizes or multiplies.

    Constants nobody reads, index tables and shape constants do not count; a shared weight counts once.
    """
    return sum(_size(v) for v in _weights(program.graph))


def weight_bytes(program: Program) -> int:
    """Stored bytes of what :func:`parameters` counts."""
    return sum(_bytes(v) for v in _weights(program.graph))


def _weights(graph: ir.Graph) -> list[ir.Value]:
    return [v for v in graph.initializers.values() if v.uses() and _is_weight(v)]


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None:
        return False
    if tensor.dtype.is_floating_point():
        return True
    return tensor.dtype.bitwidth <= 8 and tensor.dtype not in (ir.DataType.BOOL, ir.DataType.STRING)


def _size(value: ir.Value) -> int:
    return (
        int(np.prod(value.const_value.shape.numpy(), dtype=np.int64)) if value.const_value is not None else 0
    )


def _bytes(value: ir.Value) -> int:
    return int(value.const_value.nbytes) if value.const_value is not None else 0


def _operator(
    node: ir.Node, flops: int, macs: int, weights: Mapping[str, ir.Value], tensors: Tensors
) -> OperatorCost:
    read = {v.name: v for v in node.inputs if v is not None and v.name}
    own = [v for name, v in read.items() if name in weights and _is_weight(v)]
    moved = [n for n in read if n not in weights] + [v.name for v in node.outputs if v.name]
    return OperatorCost(
        name=node.name or "",
        kind=node.op_type,
        flops=flops,
        macs=macs,
        parameters=sum(_size(v) for v in own),
        weight_bytes=sum(_bytes(v) for v in own),
        activation_bytes=sum(tensor_bytes(n, tensors) for n in moved),
        bytes_moved=operator_bytes(node, tensors),
    )


def _peak(graph: ir.Graph, tensors: Tensors) -> int:
    """Most activation bytes alive at once; one sweep over nodes."""
    owner: dict[ir.Value, ir.Value] = {}
    last: dict[ir.Value, int] = {}
    nodes = list(graph)
    for step, node in enumerate(nodes):
        if node.op_type in VIEWS and node.inputs and node.inputs[0] is not None:
            source = node.inputs[0]
            owner[node.outputs[0]] = owner.get(source, source)
        for value in _reads(node):
            last[owner.get(value, value)] = step
        for value in node.outputs:
            last.setdefault(owner.get(value, value), step)
    for value in graph.outputs:
        last[owner.get(value, value)] = len(nodes)
    weights = set(graph.initializers.values())
    ends: dict[int, list[ir.Value]] = {}
    for value, step in last.items():
        ends.setdefault(step, []).append(value)
    alive = sum(tensor_bytes(v.name or "", tensors) for v in graph.inputs if v not in weights)
    peak = alive
    for step, node in enumerate(nodes):
        alive += sum(tensor_bytes(v.name or "", tensors) for v in node.outputs if v not in owner)
        peak = max(peak, alive)
        alive -= sum(tensor_bytes(v.name or "", tensors) for v in ends.get(step, ()) if v not in weights)
    return peak


def _reads(node: ir.Node) -> list[ir.Value]:
    """Values a node reads, those its subgraphs capture included."""
    values = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                values += [v for v in inner.inputs if v is not None]
    return values
