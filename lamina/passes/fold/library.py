"""Running passes of onnx_ir and onnxscript without the mistakes that are known of them.

Nodes a library pass must not touch get a domain of their own while it runs: no pattern, no evaluator and no
common-subexpression table knows it. New nodes get the name of the node whose output they produce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import constant, every_node
from lamina.passes.pass_ import Fold

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


def is_fenced(node: ir.Node) -> bool:
    """Whether a node is random, stateful, in training mode, or of a domain nothing is known about."""
    if node.domain not in _STANDARD or node.op_type in _RANDOM:
        return True
    if node.op_type == "BatchNormalization":  # trap: the fusion rules do not look at training_mode
        return bool(node.attributes.get_int("training_mode", 0)) or len(node.outputs) > 1
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        mode = constant(node.inputs[2])
        return mode is None or bool(mode.any())
    if node.op_type == "CastLike" and node.attributes:  # trap: onnxscript's Cast forgets saturate=0
        return True
    return any(not v.name for v in node.outputs)  # trap: CSE would let a left-out output stand for a used one


def is_stuck_identity(node: ir.Node) -> bool:
    """Whether removing this Identity would lose an output's name: the interface or a subgraph needs it."""
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type != "Identity" or source is None or not result.is_graph_output():
        return False
    producer = source.producer()
    while producer is not None and producer.op_type == "Identity" and producer.graph is node.graph:
        source = producer.inputs[
            0
        ]  # trap: the Identity in between goes first, and its source is what is left
        if source is None:
            return True
        producer = source.producer()
    return source.is_graph_output() or producer is None or producer.graph is not node.graph


@contextmanager
def protected(model: ir.Model) -> Iterator[None]:
    """Hide fenced nodes from library passes."""
    hidden = [n for n in every_node(model.graph) if is_fenced(n) or is_stuck_identity(n)]
    domains = [n.domain for n in hidden]
    for i, node in enumerate(hidden):
        node.domain = f"lamina.fenced.{i}"
    try:
        yield
    finally:
        for node, domain in zip(hidden, domains, strict=True):
            node.domain = domain


def adopt_names(model: ir.Model, owners: dict[str, str], rewriter: Rewriter) -> None:
    """Name what a library added: a node after the node that gave its output before, else freshly."""
    known, used = set(owners.values()), set()
    newcomers: list[ir.Node] = []
    for node in every_node(model.graph):
        if node.name in known and node.name not in used:
            used.add(node.name)
        else:
            newcomers.append(node)
    for node in newcomers:
        label = next((owners[v.name] for v in node.outputs if v.name in owners), None)
        if label is None or label in used:
            label = rewriter.fresh(f"lamina_{node.op_type}")
        node.name = label
        used.add(label)
        for i, value in enumerate(node.outputs):
            if value.name is None:
                value.name = rewriter.fresh(f"{label}_out{i or ''}")


@dataclass(frozen=True)
class LibraryFold(Fold):
    """A fold whose work a library does; ``run`` calls it on the model in place."""

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        raise NotImplementedError

    def apply(self, rewriter: Rewriter) -> None:
        """Run the library pass behind the fence, then restore names and record what it removed."""
        model = rewriter.model
        nodes = list(every_node(model.graph))
        owners = {v.name: n.name for n in nodes for v in n.outputs if v.name and n.name}
        nodes_before = {n.name: n.op_type for n in nodes}
        weights_before = len(model.graph.initializers)
        with protected(model):
            self.run(model)
        adopt_names(model, owners, rewriter)
        self._record(rewriter, nodes_before, weights_before)

    def _record(self, rewriter: Rewriter, before: dict[str | None, str], weights_before: int) -> None:
        after = {n.name: n.op_type for n in every_node(rewriter.model.graph)}
        for name, op_type in before.items():
            now = after.get(name)
            if now != op_type:
                why = f"{op_type} was removed" if now is None else f"{op_type} became {now}"
                rewriter.record(self.name, name or op_type, why)
        gone = weights_before - len(rewriter.model.graph.initializers)
        if gone > 0:
            rewriter.record(self.name, "initializers", f"{gone} fewer")


def common(name: str, *arguments: Any, **options: Any) -> ir.passes.InPlacePass:
    """A pass of ``onnx_ir.passes.common``; imported late because it pulls in the onnx package."""
    from onnx_ir.passes import common as passes

    found: ir.passes.InPlacePass = getattr(passes, name)(*arguments, **options)
    return found
