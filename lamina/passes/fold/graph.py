"""What the folds share: constants, use lists, replacing one value, and removing what became dead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.names import every_node as every_node
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Fold, Refusal

_STANDARD = ("", "ai.onnx")


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.op_type in op_types and node.domain in _STANDARD


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The content of a value nobody can override, or None: initializers, and Constant nodes' tensors."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        producer = value.producer()
        attribute = producer.attributes.get("value") if is_op(producer, "Constant") and producer else None
        tensor = None if attribute is None else attribute.value
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None, rank: int | None = None) -> float | None:
    """The number a one-element constant holds, if broadcasting it cannot raise a rank of ``rank``.

    With an unknown rank only rank 0 is certain not to; a scalar that adds dimensions is not one.
    """
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = constant(value)
    if array is None or array.ndim > (rank or 0) or array.dtype.kind not in "fiu":
        return None
    return float(array.reshape(()))


def rank_of(value: ir.Value | None) -> int | None:
    """The rank of ``value`` where it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, each once, in the order of use."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, or None where several do, nobody does, or the interface shows it."""
    if value.is_graph_output():
        return None
    readers = consumers(value)
    return readers[0] if len(readers) == 1 else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a two-input node; None where both are ``value``."""
    first, second = node.inputs[0], node.inputs[1]
    if first is value:
        return None if second is value else second
    return first


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or ``default`` where the node does not state it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def normalized_axis(axis: int, rank: int | None) -> int | None:
    """``axis`` counted from the end (-1 is the last), or None where the rank is unknown and it matters."""
    if axis < 0:
        return axis
    return None if rank is None else axis - rank


def sweep(rewriter: Rewriter, nodes: Iterable[ir.Node]) -> None:
    """Remove ``nodes`` and their producers as far as nobody reads them any more."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.graph is not rewriter.graph or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        producers = [v.producer() for v in node.inputs if v is not None]
        rewriter.remove([node])
        pending.extend(p for p in dict.fromkeys(producers) if p is not None)


def substitute(
    rewriter: Rewriter,
    old: ir.Value,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """Replace ``old`` by the output of a new node, which takes over the names of ``old`` and its producer.

    The new node stands where the old one stood; what fed only the old one is removed.
    """
    producer = old.producer()
    if producer is None:
        raise ValueError(f"'{old.name}' has no producer to replace")
    label, name = producer.name or op_type, old.name or op_type
    producer.name, old.name = rewriter.fresh(f"{label}_before"), rewriter.fresh(f"{name}_before")
    node = ir.node(op_type, list(inputs), dict(attributes or {}), name=label)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, old.shape, old.type
    rewriter.at(producer).insert(node)
    was_output = old.is_graph_output()
    if was_output:  # the rewriter gives an interface output the name of the value it replaces
        old.name = name
    rewriter.replace_uses(old, output)
    sweep(rewriter, [producer])
    return node


class Operators:
    """The standard operators of one graph, as it is now, by their types."""

    def __init__(self, graph: ir.Graph) -> None:
        self._found: dict[str, list[tuple[int, ir.Node]]] = {}
        for place, node in enumerate(graph):
            if node.domain in _STANDARD:
                self._found.setdefault(node.op_type, []).append((place, node))

    def named(self, op_types: Iterable[str]) -> list[ir.Node]:
        """Those of these types, in the graph's order."""
        groups = [self._found[op] for op in op_types if op in self._found]
        found = groups[0] if len(groups) == 1 else sorted([pair for group in groups for pair in group])
        return [node for _, node in found]


@dataclass(frozen=True)
class LocalFold(Fold):
    """A fold that looks at one node's neighbourhood at a time: linear in the graph.

    A subclass names its ``anchors`` and says in ``match`` what it found there: a match, a reason why a near
    miss is left alone, or None. ``rewrite`` may not refuse.
    """

    anchors: ClassVar[tuple[str, ...]] = ()

    def match(self, node: ir.Node) -> Any | str | None:
        """What was found at ``node``: a match, the reason of a refusal, or None. Reads only."""
        raise NotImplementedError

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Apply ``match``."""
        raise NotImplementedError

    def _found(self, graph: ir.Graph, operators: Operators | None = None) -> Iterator[tuple[ir.Node, Any]]:
        operators = Operators(graph) if operators is None else operators
        for node in operators.named(self.anchors):
            found = self.match(node) if node.graph is graph else None  # an earlier rewrite may have taken it
            if found is not None:
                yield node, found

    def fires(self, model: ir.Model, operators: Operators | None = None) -> bool:
        """Whether there is anything to rewrite; stops at the first match."""
        return any(not isinstance(found, str) for _, found in self._found(model.graph, operators))

    def idle(self, model: ir.Model, operators: Operators | None = None) -> bool:
        """Whether nothing matches; ``operators`` are those of the main graph, where the caller has them."""
        return not self.fires(model, operators)

    def refusals(self, model: ir.Model) -> list[Refusal]:
        """The near misses, with their reasons."""
        pairs = [(n, f) for n, f in self._found(model.graph) if isinstance(f, str)]
        return [Refusal(self.name, node.name or node.op_type, reason) for node, reason in pairs]

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite every match, a node that stays as often as it matches."""
        rewriter.require_opset(self.minimum_opset)
        for node, first in self._found(rewriter.graph):
            found = first
            while found is not None and not isinstance(found, str):
                self.rewrite(node, found, rewriter)
                found = self.match(node) if node.graph is rewriter.graph else None
