"""Operators outside ONNX's own domain: what they do with their subgraphs is their own affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from lamina.ir.names import every_node

STANDARD = frozenset({"", "ai.onnx"})
_GRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


@contextmanager
def opaque_subgraphs_hidden(model: ir.Model) -> Iterator[None]:
    """Take the subgraphs of other domains' operators out of sight of whatever walks over nodes.

    trap: FlexAttention's modifiers are functions of their inputs alone: an initializer that is lifted out of
    one is out of its reach. Values that such a subgraph reads keep their uses meanwhile.
    """
    owners = [n for n in every_node(model.graph) if n.domain not in STANDARD and _has_subgraphs(n)]
    attributes = [dict(n.attributes) for n in owners]
    for node in owners:
        for name in [a.name for a in node.attributes.values() if a.type in _GRAPHS]:
            del node.attributes[name]
    try:
        yield
    finally:
        for node, whole in zip(owners, attributes, strict=True):
            node.attributes.clear()
            node.attributes.update(whole)


def _has_subgraphs(node: ir.Node) -> bool:
    return any(a.type in _GRAPHS for a in node.attributes.values())
