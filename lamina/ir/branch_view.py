"""A graph as positions: who reads what, what carries data, and the region a value closes off."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import onnx_ir as ir

LOCAL_STEPS = 256  # what one walk may always cost
SHARED_STEPS = 20  # times the nodes: what all longer walks together may cost, so that the search is linear


def words(text: str) -> frozenset[str]:
    """The words of a text: tables of operators read better so."""
    return frozenset(text.split())


_CACHE_NAME = re.compile(r"present|past|cache|(^|[^a-z])kv([^a-z]|$)", re.IGNORECASE)
_MOVES = words(
    "Identity Cast Reshape Transpose Squeeze Unsqueeze Flatten Concat Slice Split Gather ScatterND "
    "ScatterElements Expand QuantizeLinear DequantizeLinear"
)
_WEIGHTED = {  # operator -> inputs that may hold its weight
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "FusedConv", "NhwcFusedConv"), (1,)),
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger", "FusedMatMul", "FusedGemm", "Einsum"), (0, 1)),
    **dict.fromkeys(("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (1,)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (3,)),
}
_CONTRIB_ATTENTION = ("Attention", "QAttention")  # com.microsoft: the projection is inside, input 1


class Flow(IntEnum):
    """What a value depends on."""

    CONSTANT = 0
    SHAPE = 1
    DATA = 2


class OutOfSteps(Exception):
    """A walk left its neighbourhood and the shared allowance is used up; no caller of this room sees it."""


@dataclass(frozen=True)
class Region:
    """Nodes whose every value leads to one value and nowhere else.

    Attributes:
        members: Positions of the nodes.
        reads: Values read from outside, initializers excluded, in order of use.
        cache_outputs: Interface outputs inside it that hold attention state.
    """

    members: frozenset[int]
    reads: tuple[ir.Value, ...]
    cache_outputs: tuple[ir.Value, ...] = ()


class GraphView:
    """Positions, readers and flow of the main graph; built once, in O(nodes + edges)."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = list(graph)
        self.reads: list[tuple[ir.Value, ...]] = []
        self.readers: dict[ir.Value, list[int]] = {}
        self.producer: dict[ir.Value, int] = {}
        self.outputs = frozenset(v for v in graph.outputs)
        self.interface = frozenset(v for v in graph.inputs if v.name not in graph.initializers)
        self.flow: dict[ir.Value, Flow] = {v: Flow.DATA for v in self.interface}
        self._weighted: set[int] = set()
        self.steps = 0  # of all walks so far: what tests hold against the size of the graph
        self.steps_left = max(SHARED_STEPS * len(self.nodes), 100_000)
        for position, node in enumerate(self.nodes):
            self._add(position, node)
        self.cache_tail: dict[int, ir.Value] = {}
        self.state_of: dict[ir.Value, frozenset[ir.Value]] = {}  # cache output -> cache inputs it extends
        self._find_state()

    def _add(self, position: int, node: ir.Node) -> None:
        captured = _captured(node, self.graph) if _has_subgraph(node) else ()
        reads = tuple(v for v in (*node.inputs, *captured) if v is not None)
        self.reads.append(reads)
        for value in dict.fromkeys(reads):
            self.readers.setdefault(value, []).append(position)
        flow = max((self.flow.get(v, Flow.CONSTANT) for v in reads), default=Flow.CONSTANT)
        if node.op_type in ("Shape", "Size") and flow is Flow.DATA:
            flow = Flow.SHAPE
        if flow is Flow.DATA and self._holds_weight(node):
            self._weighted.add(position)
        for value in node.outputs:
            self.producer[value] = position
            self.flow[value] = flow

    def is_data(self, value: ir.Value | None) -> bool:
        """Whether a value changes with the contents of the inputs, not with their shapes only."""
        return value is not None and self.flow.get(value, Flow.CONSTANT) is Flow.DATA

    def maker(self, value: ir.Value) -> ir.Node | None:
        """The node of the main graph that makes ``value``."""
        position = self.producer.get(value)
        return None if position is None else self.nodes[position]

    def is_weighted(self, position: int) -> bool:
        """Whether the node multiplies data with a weight: Conv, MatMul, Gemm, LSTM and their kin."""
        return position in self._weighted

    def _holds_weight(self, node: ir.Node) -> bool:
        slots = _WEIGHTED.get(node.op_type, ())
        if node.op_type in _CONTRIB_ATTENTION and node.domain == "com.microsoft":
            slots = (1,)
        inputs = [node.inputs[i] for i in slots if i < len(node.inputs)]
        return any(v is not None and self.flow.get(v, Flow.CONSTANT) is Flow.CONSTANT for v in inputs)

    def only_reader(self, value: ir.Value, position: int) -> bool:
        """Whether the node at ``position`` alone reads ``value``, and the interface does not show it."""
        return value not in self.outputs and self.readers.get(value) == [position]

    # -- walks ----------------------------------------------------------------------------------------

    def spend(self, spent: int) -> None:
        """Account for one step of a walk that already took ``spent``.

        Raises:
            OutOfSteps: The walk is long and the shared allowance is used up.
        """
        self.steps += 1
        if spent > LOCAL_STEPS:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise OutOfSteps

    def region(self, value: ir.Value, add: int) -> Region:
        """The region that ``value`` closes off, as read by the node at ``add``.

        Cost: its own nodes and edges, and those of its rim.

        Raises:
            OutOfSteps: It is too large.
        """
        start = self.producer.get(value)
        if start is None:
            return Region(frozenset(), (value,))
        barred: set[ir.Value] = set()
        seeds: set[int] = {start}
        while True:
            members, caches = self._grow(seeds, (value, add), barred)
            tails = {p for p, o in self.cache_tail.items() if o in caches} if caches else set()
            if not tails <= seeds | members:
                seeds |= tails
            elif caches and not (tails <= members and self._own_state(start, members, caches)):
                barred |= caches
                seeds = {start}
            else:
                break
        self._leave_out_shapes(members)
        ordered = tuple(o for o in self.graph.outputs if o in caches)
        return Region(frozenset(members), self._outside_reads(members, value), ordered)

    def _grow(
        self, seeds: set[int], exit_: tuple[ir.Value, int], barred: set[ir.Value]
    ) -> tuple[set[int], set[ir.Value]]:
        members: set[int] = set()
        caches: set[ir.Value] = set()
        heap = [-p for p in seeds]
        queued = set(seeds)
        heapq.heapify(heap)
        spent = 0
        while heap:
            position = -heapq.heappop(heap)
            spent += 1
            self.spend(spent)
            found = self._enclosed(position, members, exit_, barred)
            if found is None:
                continue
            caches |= found
            members.add(position)
            for value in self.reads[position]:
                producer = self.producer.get(value)
                if producer is not None and producer not in queued:
                    queued.add(producer)
                    heapq.heappush(heap, -producer)
        return members, caches

    def _enclosed(
        self, position: int, members: set[int], exit_: tuple[ir.Value, int], barred: set[ir.Value]
    ) -> set[ir.Value] | None:
        """Cache outputs the node feeds, or None where a value of it leaves the region."""
        found: set[ir.Value] = set()
        for value in self.nodes[position].outputs:
            if value in self.outputs:
                if value not in self.state_of or value in barred:
                    return None
                found.add(value)
            for reader in self.readers.get(value, ()):
                if reader in members or (value, reader) == exit_:
                    continue
                cache = self.cache_tail.get(reader)
                if cache is None or cache in barred:
                    return None
                found.add(cache)
        return found

    def _own_state(self, start: int, members: set[int], caches: set[ir.Value]) -> bool:
        """Whether the cache outputs, and the nodes that serve them alone, hold state of nobody else."""
        inputs = {v for o in caches for v in self.state_of[o]}
        if any(r not in members for v in inputs for r in self.readers.get(v, ())):
            return False
        serving, pending = set[int](), [start]
        while pending:
            position = pending.pop()
            if position in members and position not in serving:
                serving.add(position)
                pending.extend(self.producer[v] for v in self.reads[position] if v in self.producer)
        for position in members - serving:
            for value in self.reads[position]:
                if value in self.interface:
                    if any(r not in members for r in self.readers[value]):
                        return False
                elif self.is_data(value) and self.producer.get(value) not in members:
                    return False
        return True

    def _leave_out_shapes(self, members: set[int]) -> None:
        """Shape arithmetic and tables cut to length are ambient, unless they measure a member."""
        ambient: set[int] = set()
        kept_data: set[int] = set()
        for position in sorted(members):
            flow = max((self.flow[v] for v in self.nodes[position].outputs), default=Flow.DATA)
            reads_member = any(self.producer.get(v) in kept_data for v in self.reads[position])
            if flow is Flow.SHAPE and not reads_member:
                ambient.add(position)
            elif flow is not Flow.CONSTANT:
                kept_data.add(position)
        for position in sorted(members - kept_data - ambient, reverse=True):
            readers = {r for v in self.nodes[position].outputs for r in self.readers.get(v, ())}
            if readers & ambient:
                ambient.add(position)
        members -= ambient

    def _outside_reads(self, members: set[int], value: ir.Value) -> tuple[ir.Value, ...]:
        if not members:
            return (value,)
        reads: dict[ir.Value, None] = {}
        for position in sorted(members):
            for read in self.reads[position]:
                outside = read in self.interface or self.producer.get(read, position) not in members
                if outside and (read in self.interface or read in self.producer):
                    reads[read] = None
        return tuple(reads)

    # -- attention state on the interface -------------------------------------------------------------

    def _find_state(self) -> None:
        """Interface outputs that are caches: named so, or made by extending a cache the interface gives."""
        for output in self.graph.outputs:
            if self.is_data(output) and output in self.producer:
                state, attends = state_behind(output)
                if state or attends or (output.name and _CACHE_NAME.search(output.name)):
                    self.state_of[output] = state
        for output in self.state_of:
            self._mark_tail(output)

    def _mark_tail(self, output: ir.Value) -> None:
        """Nodes that only move state to a cache output; reading a value there does not let it escape."""
        start = self.producer[output]
        if self.readers.get(output) or self.nodes[start].op_type not in _MOVES:
            return
        tail: set[int] = set()
        heap = [-start]
        while heap and len(tail) < 32:
            position = -heapq.heappop(heap)
            node = self.nodes[position]
            values = [v for v in node.outputs if v is not output]
            closed = all(v not in self.outputs for v in values) and all(
                r in tail for v in values for r in self.readers.get(v, ())
            )
            if position in tail or node.op_type not in _MOVES or not (closed or position == start):
                continue
            tail.add(position)
            self.cache_tail[position] = output
            heap_reads = (self.producer.get(v) for v in self.reads[position] if self.is_data(v))
            for producer in heap_reads:
                if producer is not None:
                    heapq.heappush(heap, -producer)


def state_behind(output: ir.Value) -> tuple[frozenset[ir.Value], bool]:
    """Interface inputs that are moved into a cache output; and whether an attention operator makes it."""
    found, attends, seen = set[ir.Value](), False, 0
    pending: list[ir.Value | None] = [output]
    while pending and seen < 48:
        value = pending.pop(0)
        seen += 1
        node = None if value is None else value.producer()
        if value is None or value.is_initializer():
            continue
        if node is None:
            if value.is_graph_input() and _alike(value, output):
                found.add(value)
        elif node.op_type in _MOVES:
            pending.extend(node.inputs)
        elif "Attention" in node.op_type and value is not node.outputs[0]:
            attends = True
            pending.extend(v for v in node.inputs if v is not None and v.is_graph_input())
    return frozenset(found), attends


def _alike(value: ir.Value, output: ir.Value) -> bool:
    if value.shape is None or output.shape is None:
        return value.dtype == output.dtype
    return value.dtype == output.dtype and len(value.shape) == len(output.shape) >= 3


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


def _captured(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """Values of the main graph that the node's subgraphs read."""
    for attribute in node.attributes.values():
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = tuple(attribute.as_graphs())
        for subgraph in graphs:
            yield from _of_graph(subgraph.outputs, graph)
            for inner in subgraph.all_nodes():
                yield from _of_graph((v for v in inner.inputs if v is not None), graph)


def _of_graph(values: Iterable[ir.Value], graph: ir.Graph) -> Iterator[ir.Value]:
    for value in values:
        maker = value.producer()
        if (maker is not None and maker.graph is graph) or (maker is None and _at_home(value, graph)):
            yield value


def _at_home(value: ir.Value, graph: ir.Graph) -> bool:
    if value.name and graph.initializers.get(value.name) is value:
        return True
    return value.is_graph_input() and value.graph is graph
