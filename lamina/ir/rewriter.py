"""The one way a graph is changed: names stay unique, uses stay right, every change is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.names import every_node


@dataclass(frozen=True)
class Rewrite:
    """One recorded change: which pass did what at which node, and why."""

    pass_name: str
    where: str
    why: str


class _Index:
    """Nodes by name, and the names that are taken; read off the model when first asked for."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._read = False
        self._nodes: dict[str, ir.Node] = {}
        self._names: set[str] = set()

    @property
    def nodes(self) -> dict[str, ir.Node]:
        self._fill()
        return self._nodes

    @property
    def names(self) -> set[str]:
        self._fill()
        return self._names

    def add(self, node: ir.Node) -> None:
        if self._read and node.name:
            self._nodes[node.name] = node

    def drop(self, nodes: Iterable[ir.Node]) -> None:
        for node in nodes if self._read else ():
            if node.name:
                self._nodes.pop(node.name, None)

    def _fill(self) -> None:
        if self._read:
            return
        self._read = True
        graph = self._model.graph
        self._names.update(graph.initializers, (v.name for v in graph.inputs if v.name))
        for node in every_node(graph):
            if node.name:
                self._nodes[node.name] = node
                self._names.add(node.name)
            self._names.update([v.name for v in node.outputs if v.name])


class Rewriter:
    """Changes one graph (the main graph, or a subgraph being built) of a cloned program.

    Args:
        model: The model being changed; owns opsets.
        graph: The graph new nodes go into; the main graph when omitted.
        parent: A rewriter to share the table of names with, so that they stay unique over subgraphs.
        nodes: All nodes of the model as it is now, subgraphs included, where the caller has them at hand.

    Attributes:
        nodes: All nodes of the model where that is known, else None. Whoever was given them and changes the
            graph says anew what they are.
    """

    def __init__(
        self,
        model: ir.Model,
        graph: ir.Graph | None = None,
        *,
        parent: Rewriter | None = None,
        nodes: list[ir.Node] | None = None,
    ) -> None:
        self.model = model
        self.graph = model.graph if graph is None else graph
        self.records: list[Rewrite] = [] if parent is None else parent.records
        self.nodes = nodes
        self._anchor: ir.Node | None = None
        self._index: _Index = _Index(model) if parent is None else parent._index

    # -- look-ups -----------------------------------------------------------------------------------

    def node(self, name: str) -> ir.Node:
        """The node called ``name``.

        Raises:
            PassError: There is none (any more).
        """
        try:
            return self._index.nodes[name]
        except KeyError:
            raise PassError(
                f"no node is called '{name}'", advice="the plan belongs to another model"
            ) from None

    def has_node(self, name: str) -> bool:
        """Whether a node called ``name`` is in the model."""
        return name in self._index.nodes

    def fresh(self, hint: str) -> str:
        """A name nothing in the model has, made from ``hint``; it is taken from now on."""
        name, i, taken = hint, 1, self._index.names
        while name in taken:
            name, i = f"{hint}_{i}", i + 1
        taken.add(name)
        return name

    # -- building -----------------------------------------------------------------------------------

    def at(self, anchor: ir.Node | None) -> Rewriter:
        """Insert what follows right before ``anchor`` (None: at the end of the graph). Returns self."""
        self._anchor = anchor
        return self

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
    ) -> ir.Value:
        """Add one node and return its first output (all of them are ``value.producer().outputs``)."""
        label = self.fresh(name or f"lamina_{op_type}")
        node = ir.node(
            op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs, name=label
        )
        for i, value in enumerate(node.outputs):
            value.name = self.fresh(f"{label}_out" if i == 0 else f"{label}_out{i}")
        if dtype is not None:
            node.outputs[0].dtype = dtype
        if shape is not None:
            node.outputs[0].shape = shape
        self.insert(node)
        return node.outputs[0]

    def insert(self, node: ir.Node) -> None:
        """Add a node that already has a unique name at the anchor."""
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._anchor, node)
        self._index.add(node)

    def constant(self, array: np.ndarray, name: str, *, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer to the graph; ``dtype`` is needed for int4, uint4 and bfloat16 only."""
        label = self.fresh(name)
        # trap: np.ascontiguousarray makes a scalar 1-D, and QLinear kernels want scalar scales
        tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=label)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        value = ir.Value(name=label, shape=shape, type=kind, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    # -- changing -----------------------------------------------------------------------------------

    def replace_uses(self, old: ir.Value, new: ir.Value, *, keep: Iterable[ir.Node] = ()) -> None:
        """Make every reader of ``old``, subgraphs and graph outputs included, read ``new``.

        An interface output keeps its name: an Identity carries it when ``new`` cannot be renamed.
        """
        kept = set(keep)
        # Others know it by its name, so it cannot take an output's; the node it replaces does not count.
        shared = any(use.node is not old.producer() for use in new.uses())
        for use in tuple(old.uses()):
            if use.node not in kept:
                use.node.replace_input_with(use.idx, new)
        for i, output in enumerate(self.graph.outputs):
            if output is old:
                self._move_output(i, old, new, shared)

    def _move_output(self, index: int, old: ir.Value, new: ir.Value, shared: bool) -> None:
        name, shape, kind = old.name, old.shape, old.type
        old.name = self.fresh(f"{name}_before")
        carrier = new
        outside = new.is_graph_input() or new.is_initializer() or new.producer() is None
        if shared or outside or new.is_graph_output():
            anchor, self._anchor = self._anchor, None
            carrier = self.op("Identity", [new], name=f"{name}_identity")
            self._anchor = anchor
        carrier.name = name
        carrier.shape = shape if shape is not None else carrier.shape
        carrier.type = kind if kind is not None else carrier.type
        self.graph.outputs[index] = carrier

    def remove(self, nodes: Iterable[ir.Node]) -> None:
        """Remove nodes nobody outside the set reads."""
        doomed = list(nodes)
        self._index.drop(doomed)
        if doomed:
            self.graph.remove(doomed, safe=True)

    def rename(self, node: ir.Node, name: str, outputs: Sequence[str | None] = ()) -> None:
        """Give a node and its outputs the names of nodes and values that are gone; None leaves an output's.

        Raises:
            PassError: A node of that name is in the model.
        """
        if self.has_node(name):
            raise PassError(f"a node is called '{name}'", advice="remove it before its name is given away")
        self._index.drop([node])
        node.name = name
        self._index.add(node)
        for value, label in zip(node.outputs, outputs, strict=False):
            if label is not None:
                value.name = label

    def forget(self, nodes: Iterable[ir.Node]) -> None:
        """Drop nodes from the index without touching the graph (they moved to a subgraph elsewhere)."""
        self._index.drop(nodes)

    def require_opset(self, version: int) -> None:
        """Raise unless the model's default opset is at least ``version`` (see ``lamina.ir.opset``)."""
        have = self.model.opset_imports.get("", 1)
        if have < version:
            raise PassError(
                f"this needs opset {version}, the program has {have}", advice="raise_opset() it first"
            )

    def record(self, pass_name: str, where: str, why: str) -> None:
        """Note a change for the report."""
        self.records.append(Rewrite(pass_name, where, why))
