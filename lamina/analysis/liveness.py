"""Which activations are in memory while each operator runs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lamina.analysis.flops import Tensors
from lamina.analysis.roofline import VIEWS, tensor_bytes
from lamina.ir.names import reads


def live_bytes(graph: ir.Graph, tensors: Tensors) -> list[int]:
    """Bytes of activations alive while each node runs, when nodes run in the graph's order.

    Alive at a node are its outputs and whatever it, a later node or the interface still reads. Inputs are
    there from the start (those nobody reads stay to the end), a result nobody reads is gone after the node
    that makes it, a view shares the memory of what it shows, weights are not counted. What a subgraph makes
    inside is not looked into; what it captures counts as read by its node.

    Cost: O(nodes + edges).

    Args:
        graph: A main graph.
        tensors: Shape and dtype of its tensors; what is missing counts as nothing.

    Returns:
        One number a node, in order.
    """
    nodes = list(graph)
    owner = _owners(nodes)
    last = _last_steps(graph, nodes, owner)
    ends: dict[int, list[ir.Value]] = {}
    for value, step in last.items():
        ends.setdefault(step, []).append(value)
    weights = set(graph.initializers.values())
    alive = sum(tensor_bytes(v.name or "", tensors) for v in graph.inputs if v not in weights)
    found = []
    for step, node in enumerate(nodes):
        alive += sum(tensor_bytes(v.name or "", tensors) for v in node.outputs if v not in owner)
        found.append(alive)
        alive -= sum(tensor_bytes(v.name or "", tensors) for v in ends.get(step, ()) if v not in weights)
    return found


def _owners(nodes: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
    """View -> the value whose memory it shows."""
    owner: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        source = node.inputs[0] if node.op_type in VIEWS and node.inputs else None
        if source is not None:
            owner[node.outputs[0]] = owner.get(source, source)
    return owner


def _last_steps(
    graph: ir.Graph, nodes: Sequence[ir.Node], owner: dict[ir.Value, ir.Value]
) -> dict[ir.Value, int]:
    """Value with memory of its own -> the last step that needs it; past the end for the interface."""
    last: dict[ir.Value, int] = {}
    for step, node in enumerate(nodes):
        for value in reads(node):
            last[owner.get(value, value)] = step
        for value in node.outputs:
            last.setdefault(owner.get(value, value), step)
    for value in graph.outputs:
        last[owner.get(value, value)] = len(nodes)
    return last
