"""What options store: bytes of their weights, and of the nodes and names around them in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.planner.apply import required_opset
from lamina.planner.plan import Move
from lamina.planner.space import Space

# Of a tensor in the file beside its data and name: tags, lengths, type and dims.
_TENSOR = 14
# Of a node: its tag and length in the graph; of each of its outputs, the type and dims that are said of it.
_NODE, _OUTPUT = 3, 24


def stored_bytes(space: Space) -> list[list[int]]:
    """Bytes of the weights each option of each choice stores, read off what it emits."""
    return _emitted(space, lambda graph: sum(_tensors(graph.initializers.values())))


def written_bytes(space: Space) -> list[list[int]]:
    """Bytes that each option adds to the file: its weights, nodes and names, less the nodes of the site.

    Exporters leave hundreds of bytes of metadata on a node; of a model of half a megabyte in 8 bits that was
    a twentieth.
    """
    nodes = {n.name or "": n for n in space.program.graph}
    own = [site_framing(space.program, nodes, c.site.nodes, c.site.weights) for c in space.choices]
    made = _emitted(space, lambda graph: sum(_tensors(graph.initializers.values())) + _framing(graph))
    return [[given - before for given in row] for row, before in zip(made, own, strict=True)]


def site_framing(
    program: Program, nodes: Mapping[str, ir.Node], site: Iterable[str], weights: Iterable[str]
) -> int:
    """Bytes of a site's own nodes, and of the headers of those weights that it alone reads."""
    names = set(site)
    found = sum(_node(nodes[name]) for name in names if name in nodes)
    for weight in weights:
        value = program.graph.initializers.get(weight)
        if value is not None and all(use.node.name in names for use in value.uses()):
            found += _header(value)
    return found


def _framing(graph: ir.Graph) -> int:
    return sum(_node(n) for n in graph) + sum(_header(v) for v in graph.initializers.values())


def _emitted(space: Space, measure: Callable[[ir.Graph], int]) -> list[list[int]]:
    """A measure of the graph that each option of each choice emits."""
    model = space.program.clone().model
    every = [Move(c.site, o) for c in space.choices for o in c.options]
    raise_opset(model, max(required_opset(every), space.program.opset))
    rewriter = Rewriter(model)
    found = []
    for choice in space.choices:
        nodes = {name: rewriter.node(name) for name in choice.site.nodes}
        row = []
        for option in choice.options:
            scratch = ir.Graph([], [], nodes=[], name="lamina_scratch")
            choice.transform.emit(choice.site, option, Rewriter(model, scratch, parent=rewriter), nodes)
            row.append(measure(scratch))
        found.append(row)
    return found


def _tensors(values: Iterable[ir.Value]) -> Iterable[int]:
    return [v.const_value.nbytes for v in values if v.const_value is not None]


def _header(value: ir.Value) -> int:
    return _TENSOR + len(value.name or "")


def _node(node: ir.Node) -> int:
    said = sum(_OUTPUT + len(v.name or "") for v in node.outputs)
    return _NODE + int(ir.to_proto(node).ByteSize()) + said
