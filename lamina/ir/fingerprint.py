"""A hash of what a model computes with: stable over node names, value names and node order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import onnx_ir as ir

_EMPTY = b"\0none"


def fingerprint(model: ir.Model) -> str:
    """32 hex digits over operators, attributes, weights, wiring and interface, in linear time.

    Interface names, dtypes and shapes count. Node names, inner value names, node order, documentation,
    metadata and nodes no output depends on do not.
    """
    graph = model.graph
    versions = dict(model.opset_imports)
    hasher = _Hasher(versions)
    known: dict[ir.Value, bytes] = {}
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    parts = [b"model"]
    for value in inputs:
        known[value] = _digest(b"input", (value.name or "").encode())
        parts.append(_port(value))
    hasher.graph(graph, known, depth=0)
    for value in graph.outputs:
        parts += [_port(value), known[value]]
    return _digest(*parts).hex()[:32]


def value_digests(models: Iterable[ir.Model]) -> list[dict[ir.Value, bytes]]:
    """For each model: main graph's value -> a hash of all that it is computed from.

    Values of two models with equal digests are equal on equal inputs. A tensor that models share is read
    once. Linear in the models and the distinct tensors.
    """
    tensors: dict[int, tuple[ir.TensorProtocol, bytes]] = {}
    found = []
    for model in models:
        hasher = _Hasher(dict(model.opset_imports))
        hasher._tensors = tensors
        graph = model.graph
        inputs = [v for v in graph.inputs if v.name not in graph.initializers]
        known = {v: _digest(b"input", (v.name or "").encode()) for v in inputs}
        hasher.graph(graph, known, depth=0)
        found.append(known)
    return found


def _port(value: ir.Value) -> bytes:
    shape = (
        "?"
        if value.shape is None
        else ",".join(str(d if isinstance(d, int) else d.value) for d in value.shape)
    )
    return f"{value.name}|{value.dtype}|{shape}".encode()


class _Hasher:
    def __init__(self, versions: dict[str, int]) -> None:
        self._versions = versions
        self._tensors: dict[int, tuple[ir.TensorProtocol, bytes]] = {}

    def graph(self, graph: ir.Graph, known: dict[ir.Value, bytes], depth: int) -> bytes:
        """Hash a graph whose outer values are in ``known``; fills in the values it defines."""
        for i, value in enumerate(graph.inputs):
            known.setdefault(value, _digest(b"argument", f"{depth}.{i}".encode()))
        for value in graph.initializers.values():
            if value.const_value is not None:
                known[value] = self._tensor(value.const_value)
        for node in graph:
            digest = self._node(node, known, depth)
            for i, value in enumerate(node.outputs):
                known[value] = _digest(digest, str(i).encode())
        return _digest(b"graph", *(known[v] for v in graph.outputs))

    def _node(self, node: ir.Node, known: dict[ir.Value, bytes], depth: int) -> bytes:
        version = self._versions.get(node.domain, 0)
        parts = [
            b"node",
            f"{node.domain}|{node.op_type}|{node.overload}|{version}|{len(node.outputs)}".encode(),
        ]
        parts += [_EMPTY if v is None else known[v] for v in node.inputs]
        for name in sorted(node.attributes):
            parts += [name.encode(), self._attribute(node.attributes[name], known, depth)]
        return _digest(*parts)

    def _attribute(self, attribute: ir.Attr, known: dict[ir.Value, bytes], depth: int) -> bytes:
        kind, value = attribute.type, attribute.value
        if attribute.is_ref():
            return _digest(b"ref", str(attribute.ref_attr_name).encode())
        if kind == ir.AttributeType.TENSOR:
            return self._tensor(value)
        if kind == ir.AttributeType.GRAPH:
            return self.graph(value, known, depth + 1)
        if kind == ir.AttributeType.TENSORS:
            return _digest(b"tensors", *(self._tensor(t) for t in value))
        if kind == ir.AttributeType.GRAPHS:
            return _digest(b"graphs", *(self.graph(g, known, depth + 1) for g in value))
        return _digest(kind.name.encode(), *_plain(value))

    def _tensor(self, tensor: ir.TensorProtocol) -> bytes:
        # Tied weights are read once. The tensor is kept too, so that its id stays its own.
        if id(tensor) not in self._tensors:
            shape = ",".join(map(str, tensor.shape.numpy()))
            head = f"tensor|{tensor.dtype.name}|{shape}|".encode()
            digest = hashlib.sha256(head)
            if tensor.dtype == ir.DataType.STRING:
                digest.update(_digest(*tensor.string_data()))  # type: ignore[attr-defined]
            else:
                digest.update(tensor.tobytes())
            self._tensors[id(tensor)] = (tensor, digest.digest())
        return self._tensors[id(tensor)][1]


def _plain(value: object) -> Iterable[bytes]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _plain(item)
    elif isinstance(value, float):
        yield struct.pack("<d", value)
    elif isinstance(value, bytes):
        yield value
    else:
        yield str(value).encode()


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
