"""Replace an If whose condition is constant by the branch it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.names import every_node, subgraphs
from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import constant, is_op
from lamina.passes.pass_ import Effect, Exact, Fold, Refusal


@dataclass(frozen=True)
class FoldConstantIf(Fold):
    """Put the nodes of the taken branch where the If stands, in subgraphs too, and forget the other branch.

    Fires: If with a condition of one element that nobody can override; nested ones as well.
    Refuses: a condition that is computed or overridable.
    Effect: Exact.
    Cost: O(nodes of the graph and its subgraphs).
    """

    effect: ClassVar[Effect] = Exact()

    def fires(self, model: ir.Model) -> bool:
        """Whether an If, outside of others that fold, has a constant condition."""
        return any(is_op(n, "If") and _taken(n) is not None for n in every_node(model.graph))

    def idle(self, model: ir.Model) -> bool:
        """Whether there is none."""
        return not self.fires(model)

    def refusals(self, model: ir.Model) -> list[Refusal]:
        """The Ifs that are decided at run time."""
        found = [n for n in every_node(model.graph) if is_op(n, "If") and _taken(n) is None]
        return [Refusal(self.name, n.name or "If", "its condition is not constant") for n in found]

    def apply(self, rewriter: Rewriter) -> None:
        """Inline from the outside in."""
        self._visit(list(rewriter.graph), rewriter, rewriter)

    def _visit(self, nodes: list[ir.Node], here: Rewriter, top: Rewriter) -> None:
        for node in nodes:
            branch = _taken(node) if is_op(node, "If") else None
            if branch is not None:
                where = node.name or "If"
                inner = _inline(node, branch, here)
                top.record(
                    self.name, where, f"its condition is constant: {len(inner)} nodes of one branch stay"
                )
                self._visit(inner, here, top)
                continue
            for graph in subgraphs(node):
                self._visit(list(graph), Rewriter(top.model, graph, parent=top), top)


def _taken(node: ir.Node) -> ir.Graph | None:
    """The branch an If certainly takes."""
    condition = constant(node.inputs[0]) if node.inputs else None
    if condition is None or condition.size != 1:
        return None
    attribute = node.attributes.get("then_branch" if bool(condition.reshape(())) else "else_branch")
    return None if attribute is None or attribute.is_ref() else attribute.as_graph()


def _inline(node: ir.Node, branch: ir.Graph, rewriter: Rewriter) -> list[ir.Node]:
    """Move the content of ``branch`` to where ``node`` is, which goes; returns the nodes that moved."""
    graph, results = rewriter.graph, list(branch.outputs)
    for name, value in list(branch.initializers.items()):
        branch.initializers.pop(name)
        value.name = rewriter.fresh(name)
        graph.register_initializer(value)
    branch.outputs.clear()
    moved = list(branch)
    branch.remove(moved)
    graph.insert_before(node, moved)
    for other in subgraphs(node):
        _detach(other, rewriter)
    rewriter.at(node)
    for output, result in zip(node.outputs, results, strict=True):
        _hand_over(output, result, rewriter)
    rewriter.remove([node])
    return moved


def _hand_over(output: ir.Value, result: ir.Value, rewriter: Rewriter) -> None:
    producer = result.producer()
    if result.type is None:
        result.type = output.type
    if result.shape is None and output.shape is not None:
        result.shape = output.shape.copy()
    foreign = producer is None or producer.graph is not rewriter.graph
    if output.is_graph_output() and foreign:  # a subgraph hands out only what its own nodes make
        result = rewriter.op("Identity", [result], dtype=output.dtype, shape=output.shape)
    rewriter.replace_uses(output, result)


def _detach(graph: ir.Graph, rewriter: Rewriter) -> None:
    """Make the nodes of a graph that goes read nothing, so that nobody counts them as readers."""
    for node in graph.all_nodes():
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)
    rewriter.forget(graph.all_nodes())
