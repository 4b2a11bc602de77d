"""Names: every node and value of a captured program has one of its own; interface names are never touched."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_GRAPH, _GRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS


class _Table:
    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def take(self, name: str) -> bool:
        if not name or name in self._taken:
            return False
        self._taken.add(name)
        return True

    def fresh(self, hint: str) -> str:
        name, i = hint, self._next.get(hint, 0)
        while not self.take(name):
            i += 1
            name = f"{hint}_{i}"
        self._next[hint] = i
        return name


def make_names_unique(model: ir.Model) -> None:
    """Give every node and value of ``model`` a unique name, in place, subgraphs included.

    An omitted optional output keeps the empty name: naming it would ask the operator to compute it.
    """
    values, nodes = _Table(), _Table()
    fixed: set[ir.Value] = set()
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value not in fixed:
            values.take(value.name or "")
            fixed.add(value)
    for value in _values(model.graph):
        if value in fixed:
            continue
        fixed.add(value)
        if not value.name and not value.uses() and not value.is_graph_output():
            value.name = ""
        elif not values.take(value.name or ""):
            value.name = values.fresh(value.name or _hint(value))
    for node in every_node(model.graph):
        if not nodes.take(node.name or ""):
            output = next((v.name for v in node.outputs if v.name), "")
            node.name = nodes.fresh(node.name or (f"{node.op_type}_{output}" if output else node.op_type))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from tuple(graph.initializers.values())
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
        for subgraph in subgraphs(node):
            yield from _values(subgraph)


def _hint(value: ir.Value) -> str:
    producer = value.producer()
    return f"{producer.op_type}_out" if producer is not None else "value"


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes, in the attributes' order."""
    for attribute in node.attributes.data.values():
        if attribute.type is _GRAPH and not attribute.is_ref():
            yield attribute.value
        elif attribute.type is _GRAPHS and not attribute.is_ref():
            yield from attribute.value


def every_graph(graph: ir.Graph) -> list[ir.Graph]:
    """``graph`` and all of its subgraphs, outer ones first: ``Model.graphs`` at a fraction of its cost."""
    found = [graph]
    for node in every_node(graph):
        if node.attributes.data:
            found.extend(subgraphs(node))
    return found


def every_node(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of ``graph`` and of its subgraphs, each before the nodes inside it.

    ``Graph.all_nodes`` gives the same at several times the cost, which counts where little else is done.
    """
    for node in graph:
        yield node
        for attribute in node.attributes.data.values():
            if attribute.type is _GRAPH and not attribute.is_ref():
                yield from every_node(attribute.value)
            elif attribute.type is _GRAPHS and not attribute.is_ref():
                for inner in attribute.value:
                    yield from every_node(inner)
