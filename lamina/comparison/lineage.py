"""Which tensors of a graph depend on which: what bisection walks."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lamina.ir.names import subgraphs
from lamina.ir.program import Program
from lamina.ir.skeleton import feedable


class Lineage:
    """The tensors nodes of the main graph compute, in order of computation.

    Args:
        program: What to look at; it is not changed.
    """

    def __init__(self, program: Program) -> None:
        values = [v for node in program.graph for v in node.outputs if v.name]
        self.position: dict[str, int] = {v.name or "": i for i, v in enumerate(values)}
        self.values: dict[str, ir.Value] = {v.name or "": v for v in values}
        self._reads: dict[ir.Node, tuple[str, ...]] = {}

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Every tensor the named ones are computed from, they themselves not included."""
        found: set[str] = set()
        queue = [n for n in names if n in self.values]
        while queue:
            node = self.values[queue.pop()].producer()
            for name in () if node is None else self._of(node):
                if name not in found:
                    found.add(name)
                    queue.append(name)
        return found

    def inputs_of(self, name: str) -> tuple[str, ...]:
        """The tensors the node that computes ``name`` reads, those its subgraphs capture included."""
        node = self.values[name].producer()
        return () if node is None else self._of(node)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The names in order of computation."""
        return sorted(names, key=lambda n: self.position[n])

    def _of(self, node: ir.Node) -> tuple[str, ...]:
        if node not in self._reads:
            read = {v.name for v in node.inputs if v is not None and v.name}
            for graph in subgraphs(node):
                for inner in graph.all_nodes():
                    read.update(v.name for v in inner.inputs if v is not None and v.name)
                read.update(v.name for v in graph.outputs if v.name)
            # Names are unique over subgraphs, so what is not computed here is an inner or a constant value.
            self._reads[node] = tuple(n for n in sorted(read) if n in self.values)
        return self._reads[node]


def observable(value: ir.Value) -> bool:
    """Whether a runtime can hand the value out as an array."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype is None or feedable(value.dtype)


def exposed(program: Program, names: Iterable[str]) -> ir.Model:
    """A clone of the model whose only outputs are the named values of the main graph."""
    model = program.model.clone()
    known = {v.name: v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    del model.graph.outputs[:]
    model.graph.outputs.extend(known[name] for name in names)
    return model
