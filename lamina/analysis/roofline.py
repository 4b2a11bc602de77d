"""Bytes moved, arithmetic intensity and the place under the machine's roof, by operator and by part.

Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance model" (CACM 52:4):
attainable time = max(flops / peak, bytes / bandwidth); the larger term says what binds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from lamina.analysis.flops import Tensors
from lamina.backends.roof import Roof
from lamina.ir.names import subgraphs

# Output shares the memory of the first input: nothing moves.
VIEWS = frozenset(("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout"))
# Reads of the first input only what it writes.
_PICKS = frozenset(("Gather", "GatherElements", "GatherND", "Slice", "Split", "Compress"))
# Look at a shape, not at the data.
_SHAPES = frozenset(("Shape", "Size"))
_CONSTANTS = frozenset(("Constant",))
Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Position:
    """Where a piece of work stands under the roof.

    Attributes:
        seconds: Attainable time: no run can be faster, unless its data come out of a cache.
        bound: ``compute`` where arithmetic takes the larger share, else ``memory``.
    """

    seconds: float
    bound: Bound


def tensor_bytes(name: str, tensors: Tensors) -> int:
    """Bytes of a tensor; 0 where it is unknown (an omitted output, a sequence)."""
    if name not in tensors:
        return 0
    shape, dtype = tensors[name]
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def operator_bytes(node: ir.Node, tensors: Tensors) -> int:
    """Bytes one operator reads and writes when nothing is fused and no cache helps.

    Each distinct input (weights and captures of subgraphs included) is read once, each output written once.
    Views move nothing; Gather, Slice and Split read of their data what they write; Shape reads no data.
    """
    if node.op_type in VIEWS or node.op_type in _CONSTANTS:
        return 0
    written = sum(tensor_bytes(v.name or "", tensors) for v in node.outputs)
    read = dict.fromkeys(v for v in _reads(node) if v.name)
    first = node.inputs[0] if node.inputs else None
    if node.op_type in _SHAPES:
        return written
    if node.op_type in _PICKS and first is not None:
        read.pop(first, None)
        written += min(written, tensor_bytes(first.name or "", tensors))
    return written + sum(_stored_bytes(v, tensors) for v in read)


def crossing_bytes(nodes: Iterable[ir.Node], tensors: Tensors) -> int:
    """Bytes that cross the border of a set of nodes: the least any fusion of them moves.

    What they read from outside, weights included, once each (of a table only Gather and its kin read, what
    they take); what they make and others, or the interface, read, once each. Reads of shapes do not count.
    """
    members = list(nodes)
    inside = {id(n) for node in members for n in (node, *_inner(node))}
    whole: dict[ir.Value, int] = {}
    picked: dict[ir.Value, int] = {}
    for node in members:
        if node.op_type in _SHAPES or node.op_type in _CONSTANTS:
            continue
        for position, value in enumerate(_reads(node)):
            producer = value.producer()
            if not value.name or (producer is not None and id(producer) in inside):
                continue
            if node.op_type in _PICKS and position == 0:
                taken = sum(tensor_bytes(v.name or "", tensors) for v in node.outputs)
                picked[value] = picked.get(value, 0) + taken
            else:
                whole[value] = _stored_bytes(value, tensors)
    total = sum(whole.values())
    total += sum(min(n, _stored_bytes(v, tensors)) for v, n in picked.items() if v not in whole)
    for value in (v for node in members for v in node.outputs):
        if value.is_graph_output() or any(id(user) not in inside for user in value.consumers()):
            total += tensor_bytes(value.name or "", tensors)
    return total


def intensity(flops: int, moved: int) -> float | None:
    """FLOP/byte; None where nothing moves."""
    return flops / moved if moved else None


def position(work: Collection[tuple[int, int]], roof: Roof) -> Position | None:
    """Where operators that run one after the other stand under the roof.

    seconds = sum of max(flops / peak, bytes / bandwidth); bound by what has the larger sum.

    Args:
        work: (flops, bytes moved) of each operator.
        roof: The machine's.

    Returns:
        None where there is nothing to do at all.
    """
    compute = [flops / roof.flops_per_s for flops, _ in work]
    memory = [moved / roof.bytes_per_s for _, moved in work]
    seconds = sum(map(max, compute, memory))
    if not seconds:
        return None
    return Position(seconds, "compute" if sum(compute) >= sum(memory) else "memory")


def roof_share(place: Position | None, latency_s: float | None) -> float | None:
    """Attainable over measured time: 1 is at the roof.

    More than 1 where data came out of a cache, or where one kernel does the work of several operators in a
    single pass; kernels not named after an operator are not in its time.
    """
    return place.seconds / latency_s if place is not None and latency_s else None


def _stored_bytes(value: ir.Value, tensors: Tensors) -> int:
    """Bytes as stored: packed 4-bit weights take half a byte an element."""
    if value.const_value is not None:
        return int(value.const_value.nbytes)
    return tensor_bytes(value.name or "", tensors)


def _inner(node: ir.Node) -> list[ir.Node]:
    return [n for graph in subgraphs(node) for n in graph.all_nodes()]


def _reads(node: ir.Node) -> list[ir.Value]:
    """Values a node reads, those its subgraphs capture from outside included."""
    values = [v for v in node.inputs if v is not None]
    for graph in subgraphs(node):
        inner = list(graph.all_nodes())
        own = {id(v) for n in inner for v in n.outputs} | {id(v) for v in graph.inputs}
        own |= {id(v) for v in graph.initializers.values()}
        values += [v for n in inner for v in n.inputs if v is not None and id(v) not in own]
        values += [v for v in graph.outputs if id(v) not in own]
    return values
