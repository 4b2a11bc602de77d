"""Running passes of onnx_ir and onnxscript without the mistakes that are known of them.

Nodes a library pass must not touch get a domain of their own while it runs: no pattern, no evaluator and no
common-subexpression table knows it. New nodes get the name of the node whose output they produce.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import onnx_ir as ir

from lamina.ir.opaque import STANDARD, opaque_subgraphs_hidden
from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import constant, every_node
from lamina.passes.pass_ import Fold

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_SOMETIMES = frozenset({"BatchNormalization", "CastLike", "Dropout", "SplitToSequence"})
_STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_NUMBERS = count()  # no two hidden nodes share a domain, so nothing takes one for the other


def is_fenced(node: ir.Node) -> bool:
    """Whether a node is random, stateful, in training mode, or of a domain nothing is known about."""
    op_type = node.op_type
    if node.domain not in _STANDARD or op_type in _RANDOM:
        return True
    if op_type in _SOMETIMES and _is_exception(node):
        return True
    return not all(
        [v.name for v in node.outputs]
    )  # trap: CSE would let a left-out output stand for a used one


def _is_exception(node: ir.Node) -> bool:
    """Whether an operator that libraries handle is used in a way that they get wrong."""
    if node.op_type == "BatchNormalization":  # trap: the fusion rules do not look at training_mode
        return bool(node.attributes.get_int("training_mode", 0)) or len(node.outputs) > 1
    if node.op_type == "CastLike":  # trap: onnxscript's Cast forgets saturate=0
        return bool(node.attributes)
    place = 2 if node.op_type == "Dropout" else 1
    if len(node.inputs) <= place or node.inputs[place] is None:
        return False
    known = constant(node.inputs[place])  # trap: onnxscript takes for granted that SplitToSequence's is known
    return known is None or (node.op_type == "Dropout" and bool(known.any()))


def stuck_identities(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The Identity nodes whose removal would lose an output name that the interface or a subgraph needs."""
    stuck, named = set(), set()
    for node in [n for n in nodes if n.op_type == "Identity"]:
        if not node.inputs or not node.outputs[0].is_graph_output():
            continue
        source = _source(node)
        producer = None if source is None else source.producer()
        if (
            source is None
            or source in named
            or source.is_graph_output()
            or producer is None
            or producer.graph is not node.graph
        ):
            stuck.add(node)
        else:
            named.add(source)  # trap: it takes this output's name, so a second output must keep its own
    return stuck


def _source(node: ir.Node) -> ir.Value | None:
    """What is left of an Identity's input when the Identity nodes before it, in its graph, are gone."""
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    while producer is not None and producer.op_type == "Identity" and producer.graph is node.graph:
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    return source


@contextmanager
def protected(model: ir.Model, nodes: Sequence[ir.Node] | None = None) -> Iterator[None]:
    """Hide fenced nodes and the subgraphs of opaque ones from library passes.

    Args:
        model: What the library is about to change.
        nodes: All of its nodes, where the caller has them at hand.
    """
    nodes = list(every_node(model.graph)) if nodes is None else nodes
    opaque = any([n.domain not in STANDARD and n.attributes.data for n in nodes])
    with opaque_subgraphs_hidden(model) if opaque else nullcontext():
        seen = list(every_node(model.graph)) if opaque else nodes
        stuck = stuck_identities(seen)
        with hidden([n for n in seen if n in stuck or is_fenced(n)]):
            yield


@contextmanager
def hidden(nodes: list[ir.Node]) -> Iterator[None]:
    """Give nodes a domain that nobody knows while a library runs."""
    domains = [n.domain for n in nodes]
    for node in nodes:
        node.domain = f"lamina.fenced.{next(_NUMBERS)}"
    try:
        yield
    finally:
        for node, domain in zip(nodes, domains, strict=True):
            node.domain = domain


def adopt_names(nodes: Sequence[ir.Node], owners: dict[str, str], rewriter: Rewriter) -> None:
    """Name what a library added: a node after the node that gave its output before, else freshly."""
    known, used = set(owners.values()), set[str]()
    names = {n.name for n in nodes}
    if len(names) == len(nodes) and names <= known:
        return  # all were there before
    newcomers: list[ir.Node] = []
    for node in nodes:
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
        before = {n.name: n.op_type for n in nodes}
        owners = {v.name: n.name for n in nodes for v in n.outputs if v.name and n.name}
        weights = len(model.graph.initializers)
        with protected(model, nodes):
            self.run(model)
        after = list(every_node(model.graph))
        adopt_names(after, owners, rewriter)
        self._record(rewriter, before, after, weights)

    def _record(
        self, rewriter: Rewriter, before: dict[str | None, str], nodes: list[ir.Node], weights_before: int
    ) -> None:
        after = {n.name: n.op_type for n in nodes}
        for name, op_type in before.items() if before != after else ():
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
