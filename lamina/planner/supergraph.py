"""The supergraph: one model that can run every candidate; a candidate is a vector of flags.

Each choice becomes an ONNX ``If`` on one element of a boolean input: an option's nodes in one branch, what
was there before in the other. Nested choices nest. One session is built; a candidate costs one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Executable, Feeds
from lamina.errors import BackendError
from lamina.ir.opset import raise_opset
from lamina.ir.rewriter import Rewriter
from lamina.planner.apply import required_opset
from lamina.planner.plan import Move
from lamina.planner.space import Choice, Genome, Space

FLAGS = "lamina_flags"
Reader = tuple[ir.Node, int]  # a node and which of its inputs


@dataclass
class Supergraph:
    """A program with every option behind a flag.

    Attributes:
        space: The choices, in flag order.
        model: The ONNX program; its input :data:`FLAGS` is bool, one element an option of a choice.
        executable: The compiled model; set it before :meth:`run`.
    """

    space: Space
    model: ir.Model
    executable: Executable | None = None

    def flags(self, genome: Sequence[int]) -> np.ndarray:
        """The flag vector of a genome, bool ``[options in all, at least 1]``."""
        pairs = zip(self.space.choices, genome, strict=True)
        flags = [gene == k + 1 for choice, gene in pairs for k in range(len(choice.options))]
        return np.asarray(flags or [False], dtype=np.bool_)

    def run(self, genome: Genome, feeds: Feeds) -> dict[str, np.ndarray]:
        """Outputs of the candidate on one batch.

        Raises:
            BackendError: The supergraph was not compiled, or the runtime failed.
        """
        if self.executable is None:
            raise BackendError("the supergraph is not compiled", advice="set its executable first")
        return self.executable.run({**feeds, FLAGS: self.flags(genome)})


def build_supergraph(space: Space) -> Supergraph:
    """Put every option of every choice behind an ``If``.

    Linear in nodes and options; float weights are shared with the program. The given program is not changed.
    """
    model = space.program.clone().model
    every = [Move(c.site, o) for c in space.choices for o in c.options]
    raise_opset(model, max(required_opset(every), space.program.opset))
    builder = _Builder(model, space)
    for index in sorted(range(len(space.choices)), key=lambda i: len(space.choices[i].span)):
        builder.wrap(index)
    return Supergraph(space, model)


@dataclass(frozen=True)
class _Emitted:
    """An option's nodes in a graph of their own, and by output of its site the node that hands it out."""

    rewriter: Rewriter
    values: dict[str, ir.Node]


class _Builder:
    """Wraps choices from the innermost out, keeping track of where each original node and value went."""

    def __init__(self, model: ir.Model, space: Space) -> None:
        self.model, self.space = model, space
        self.rewriter = Rewriter(model)
        originals = list(model.graph)
        # Before any value is renamed or moved: what sites call the values.
        self.name_of = {v: v.name or "" for n in originals for v in n.outputs}
        self._free_interface()
        originals = list(model.graph)
        self.original = {n.name or "": n for n in originals}
        self.made_by = {v: n for n in originals for v in n.outputs}
        self.position = {n: i for i, n in enumerate(originals)}
        self.holder = {n: n for n in originals}  # original node -> the top-level node it is in now
        self.owner = _owners(originals)  # subgraph -> the node that runs it
        self.stands_for: dict[ir.Value, ir.Value] = {}  # output of an If -> original value
        self.flags = self._split_flags()
        # Before anything is wrapped: an option may look at how the nodes of its site hang together. What it
        # reads from outside is rewired like any other reader when that is wrapped in turn.
        self.emitted = [[self._emit(c, k) for k in range(len(c.options))] for c in space.choices]

    def _free_interface(self) -> None:
        """Put an Identity before each interface output, so that every value a choice makes may move."""
        for value in tuple(self.model.graph.outputs):
            if value.producer() is None:
                continue  # an input handed out: it keeps its name, and no choice makes it
            copy = self.rewriter.op("Identity", [value], name="lamina_interface")
            name, kind, shape = value.name, value.type, value.shape
            value.name = self.rewriter.fresh(f"{name}_before")
            copy.name, copy.type, copy.shape = name, kind, shape
            self.model.graph.outputs[self.model.graph.outputs.index(value)] = copy

    def _split_flags(self) -> list[list[ir.Value]]:
        counts = [len(c.options) for c in self.space.choices]
        total = max(sum(counts), 1)
        flags = ir.Value(name=FLAGS, shape=ir.Shape([total]), type=ir.TensorType(ir.DataType.BOOL))
        self.rewriter.at(next(iter(self.model.graph), None))
        sizes = self.rewriter.constant(np.ones(total, np.int64), "lamina_flag_sizes")
        self.model.graph.inputs.append(flags)
        first = self.rewriter.op(
            "Split", [flags, sizes], {"axis": 0}, outputs=total, name="lamina_flag_split"
        )
        self.rewriter.at(None)
        node = first.producer()
        values = iter(node.outputs if node else ())
        return [[next(values) for _ in range(count)] for count in counts]

    def wrap(self, index: int) -> None:
        """Replace what the choice governs by a chain of Ifs that ends in the untouched nodes."""
        choice = self.space.choices[index]
        held = {self.holder[self.original[name]] for name in choice.span}
        nodes = sorted(held, key=lambda n: self.position[n])
        readers = self._outside_readers(nodes)
        outputs = list(readers)
        if not outputs:  # nobody reads what the choice governs, and an If without outputs is not valid
            for emitted in self.emitted[index]:
                emitted.rewriter.graph.remove(list(emitted.rewriter.graph), safe=True)
            return
        graphs = [self._option_graph(choice, emitted, outputs) for emitted in self.emitted[index]]
        place = ir.node("Identity", [self.flags[index][0]], name="lamina_place")
        self.model.graph.insert_after(nodes[-1], place)
        self.model.graph.remove(nodes)
        rest = ir.Graph([], outputs, nodes=nodes, name=self.rewriter.fresh("lamina_keep"))
        for k in reversed(range(len(choice.options))):
            top = self._if(self.flags[index][k], graphs[k], rest, outputs, choice)
            if k:
                rest = ir.Graph([], list(top.outputs), nodes=[top], name=self.rewriter.fresh("lamina_else"))
        self.rewriter.at(place).insert(top)
        self.model.graph.remove(place, safe=True)
        self.rewriter.at(None)
        for (old, uses), new in zip(readers.items(), top.outputs, strict=True):
            self.stands_for[new] = self.stands_for.get(old, old)
            for node, position in uses:
                node.replace_input_with(position, new)
        self.position[top] = self.position[nodes[-1]]
        for name in choice.span:
            self.holder[self.original[name]] = top

    def _outside_readers(self, nodes: Sequence[ir.Node]) -> dict[ir.Value, list[Reader]]:
        """Values made by ``nodes`` that others read, with those uses."""
        inside = set(nodes)
        found: dict[ir.Value, list[Reader]] = {}
        for node in nodes:
            for value in node.outputs:
                uses = [(use.node, use.idx) for use in value.uses() if self._top(use.node) not in inside]
                if uses:
                    found[value] = uses
        return found

    def _top(self, node: ir.Node) -> ir.Node:
        while node.graph is not None and isinstance(node.graph, ir.Graph) and node.graph in self.owner:
            node = self.owner[node.graph]
        return node

    def _emit(self, choice: Choice, k: int) -> _Emitted:
        graph = ir.Graph([], [], nodes=[], name=self.rewriter.fresh("lamina_option"))
        inner = Rewriter(self.model, graph, parent=self.rewriter)
        nodes = {name: self.original[name] for name in choice.site.nodes}
        values = choice.transform.emit(choice.site, choice.options[k], inner, nodes)
        # An Identity reads even what was there before, so that it follows when that is wrapped.
        passed = [inner.op("Identity", [v], name="lamina_pass").producer() for v in values]
        return _Emitted(
            inner, {n: p for n, p in zip(choice.site.outputs, passed, strict=True) if p is not None}
        )

    def _option_graph(self, choice: Choice, emitted: _Emitted, outputs: Sequence[ir.Value]) -> ir.Graph:
        inner = emitted.rewriter
        known = {name: node.outputs[0] for name, node in emitted.values.items()}
        results = [self._rebuild(v, known, choice, inner) for v in outputs]
        inner.graph.outputs.extend(inner.op("Identity", [value], name="lamina_pass") for value in results)
        return inner.graph

    def _rebuild(
        self, value: ir.Value, known: dict[str, ir.Value], choice: Choice, inner: Rewriter
    ) -> ir.Value:
        """The option's version of a value: emitted, or the node of the span that makes it, copied.

        Copied are nodes behind the site, and what escapes a dropped branch beside its sum (a cache).
        """
        first = self.stands_for.get(value, value)
        maker, name = self.made_by.get(first), self.name_of.get(first, "")
        if name in known:
            return known[name]
        if maker is None or maker.name not in choice.span:
            return value
        inputs = [None if v is None else self._rebuild(v, known, choice, inner) for v in maker.inputs]
        attributes = {key: attr.value for key, attr in maker.attributes.items()}
        copy = inner.op(maker.op_type, inputs, attributes, domain=maker.domain, outputs=len(maker.outputs))
        made = copy.producer()
        for old, new in zip(maker.outputs, made.outputs if made else (), strict=True):
            known[self.name_of[old]] = new
        return known[name]

    def _if(
        self, flag: ir.Value, then: ir.Graph, other: ir.Graph, outputs: Sequence[ir.Value], choice: Choice
    ) -> ir.Node:
        name = self.rewriter.fresh(f"lamina_if_{choice.site.name}")
        branches = {"then_branch": then, "else_branch": other}
        node = ir.node("If", [flag], branches, num_outputs=len(outputs), name=name)
        for made, old in zip(node.outputs, outputs, strict=True):
            made.name, made.type, made.shape = self.rewriter.fresh(f"{old.name}_chosen"), old.type, old.shape
        self.owner[then] = self.owner[other] = node
        return node


def _owners(nodes: Iterable[ir.Node]) -> dict[ir.Graph, ir.Node]:
    owners: dict[ir.Graph, ir.Node] = {}
    for node in nodes:
        for attribute in node.attributes.values():
            if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                graphs = (
                    attribute.as_graphs()
                    if attribute.type == ir.AttributeType.GRAPHS
                    else [attribute.as_graph()]
                )
                for graph in graphs:
                    owners[graph] = node
                    owners.update(_owners(graph))
    return owners
