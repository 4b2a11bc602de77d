"""Hidden channels that may be merged: the neurons of an MLP, the channels between two convolutions.

A coupled channel group (:mod:`lamina.analysis.coupling`) qualifies where every channel is computed by itself
between the operators that make it and the one that sums over it. Then the weights in front may be averaged
and those behind be summed, and of channels that are equal nothing is lost.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis import coupling_pointwise as pointwise
from lamina.analysis.coupling import ChannelGroup, CouplingResult, coupled_groups
from lamina.analysis.coupling_rules import RULES
from lamina.errors import BackendError
from lamina.ir.branches import Branch, find_branches
from lamina.ir.program import Program
from lamina.passes.neurons.hidden import Hidden, HiddenGroup, Operand, Side

Refused = tuple[str, str]

# Operators that compute every channel by itself, with constants that lie along the channels.
POINTWISE = frozenset(name for name, rule in RULES.items() if rule is pointwise.elementwise) | {
    "Clip",
    "Cast",
}
_LINEAR = ("MatMul", "Gemm", "Conv")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def hidden_sites(program: Program) -> tuple[tuple[Hidden, ...], tuple[Refused, ...]]:
    """Every place where hidden channels may be merged, and (where, reason) of those where not.

    Found once a program: it is run on its example for the shapes. A program that does not run has no sites.
    """
    kept = _FOUND.get(id(program))
    if kept is not None and kept[0]() is program:
        return kept[1]
    key = id(program)
    owner = weakref.ref(program, lambda _: _FOUND.pop(key, None))
    found = _find(program)
    _FOUND[key] = owner, found
    return found


_Found = tuple[tuple[Hidden, ...], tuple[Refused, ...]]
_FOUND: dict[int, tuple[weakref.ref[Program], _Found]] = {}


def _find(program: Program) -> _Found:
    try:
        coupling = coupled_groups(program)
    except BackendError as error:
        return (), (("the program", f"its channels are not known, as it does not run: {error.what}"),)
    finder = _Finder(program, coupling)
    return tuple(finder.sites()), tuple(finder.refusals)


class _Refuse(Exception):
    pass


@dataclass
class _Part:
    """One group as found: nodes by place in the graph, operands with such places."""

    group: ChannelGroup
    nodes: list[int]
    operands: list[Operand]
    makes: list[int]
    axis: int
    value: str
    kind: str


class _Finder:
    def __init__(self, program: Program, coupling: CouplingResult) -> None:
        self._coupling = coupling
        self._graph = list(program.graph)
        self._place = {node: i for i, node in enumerate(self._graph)}
        self._values = {v.name: v for n in self._graph for v in (*n.inputs, *n.outputs) if v is not None}
        self._branches = find_branches(program).branches
        self.refusals: list[Refused] = []

    def sites(self) -> Iterator[Hidden]:
        """Groups that qualify, joined where they share operators."""
        parts = []
        for group in self._coupling.groups:
            try:
                parts.append(self._part(group))
            except _Refuse as reason:
                self.refusals.append((group.name, str(reason)))
        self.refusals += self._held()
        found: list[tuple[Hidden, Branch | None]] = []
        for joined in _joined(parts):
            try:
                found.append(self._site(joined))
            except _Refuse as reason:
                self.refusals.append((joined[0].group.name, str(reason)))
        counts: dict[str, int] = {}
        for _, branch in found:
            if branch is not None:
                counts[branch.name] = counts.get(branch.name, 0) + 1
        for site, branch in found:
            yield _named(site, branch, alone=branch is not None and counts[branch.name] == 1)

    def _held(self) -> Iterator[Refused]:
        """Why the channels other weights make must stay."""
        for held in self._coupling.frozen:
            value = self._values.get(held.name)
            for use in () if value is None else value.uses():
                if use.node.op_type in _LINEAR and held.axis == _made_axis(use.node, use.idx, value):
                    yield held.name, held.reason
                    break

    # -- one group ----------------------------------------------------------------------------------

    def _part(self, group: ChannelGroup) -> _Part:
        if group.inexact:
            raise _Refuse(group.inexact[0])
        hits: dict[str, int] = {}
        for member in group.members:
            whole = member.indices.shape == (member.size, 1) and member.size == group.units
            if not whole or not (member.indices[:, 0] == np.arange(member.size)).all():
                raise _Refuse(f"a unit is more or less than one channel of '{member.name}'")
            if member.name in hits:
                raise _Refuse(f"two axes of '{member.name}' are the same channels")
            hits[member.name] = member.axis
        self._off_stream(hits)
        nodes = self._touching(hits)
        part = _Part(group, nodes, [], [], 0, "", "mlp")
        for place in nodes:
            self._read(part, place, hits)
        if not part.value:
            raise _Refuse("nothing sums over its channels")
        return part

    def _off_stream(self, hits: Mapping[str, int]) -> None:
        for branch in self._branches:
            if branch.output in hits or branch.skip in hits:
                raise _Refuse(f"its channels are those of the residual stream at '{branch.name}'")

    def _touching(self, hits: Mapping[str, int]) -> list[int]:
        found: set[int] = set()
        for name in hits:
            value = self._values[name]
            for node in (*(use.node for use in value.uses()), value.producer()):
                if node is None:
                    continue
                if node not in self._place:
                    raise _Refuse(f"a subgraph reads '{name}'")
                found.add(self._place[node])
        return sorted(found)

    def _read(self, part: _Part, place: int, hits: Mapping[str, int]) -> None:
        """Take in one node, or refuse."""
        node = self._graph[place]
        what = f"{node.op_type} '{node.name}'"
        if len(node.outputs) != 1:
            raise _Refuse(f"{what} has several outputs")
        if node.op_type in _LINEAR and not node.domain:
            self._linear(part, place, hits)
        elif node.op_type in POINTWISE:
            for k, value in enumerate(node.inputs):
                if value is not None and value.name in hits and value.is_initializer():
                    part.operands.append(self._operand(place, k, hits, "made"))
        else:
            raise _Refuse(f"{what} does not compute every channel by itself")
        made = node.outputs[0].name or ""
        if made in hits:
            axis = hits[made]
            if axis != 1 and axis != len(self._coupling.shapes[made]) - 1:
                raise _Refuse(f"the channels of '{made}' lie on axis {axis}")
            part.makes.append(place)

    def _linear(self, part: _Part, place: int, hits: Mapping[str, int]) -> None:
        node = self._graph[place]
        what = f"{node.op_type} '{node.name}'"
        at = (
            0
            if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[0].is_initializer()
            else 1
        )
        weight, data = node.inputs[at], node.inputs[1 - at]
        if weight is None or data is None or not weight.is_initializer():
            raise _Refuse(f"{what} multiplies two activations")
        if at == 0:
            raise _Refuse(f"the weight of {what} stands on the left")
        if node.op_type == "Conv":
            part.kind = "conv"
            if node.attributes.get_int("group", 1) != 1:
                raise _Refuse(f"{what} is a grouped convolution")
        reads, makes = data.name in hits, node.outputs[0].name in hits
        if weight.name not in hits or reads == makes:
            raise _Refuse(f"{what} reads and makes the same channels")
        axis = hits[data.name or ""] if reads else hits[node.outputs[0].name or ""]
        rank = len(self._coupling.shapes[(data if reads else node.outputs[0]).name or ""])
        part.axis = 1 if node.op_type == "Conv" else -1
        if axis != part.axis % rank:
            raise _Refuse(f"{what} has its channels on axis {axis}")
        part.operands.append(self._operand(place, 1, hits, "read" if reads else "made"))
        if reads:
            part.value = data.name or ""
        elif len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].name in hits:
            part.operands.append(self._operand(place, 2, hits, "made"))

    def _operand(self, place: int, k: int, hits: Mapping[str, int], side: Side) -> Operand:
        value = self._graph[place].inputs[k]
        assert value is not None
        if value.is_graph_input() or value.is_graph_output():
            raise _Refuse(f"weight '{value.name}' is part of the interface")
        if value.const_value is None or value.const_value.dtype not in _FLOATS:
            raise _Refuse(f"weight '{value.name}' is not floating")
        return Operand(place, k, hits[value.name or ""], side)

    # -- groups that share operators ----------------------------------------------------------------

    def _site(self, parts: Sequence[_Part]) -> tuple[Hidden, Branch | None]:
        places = sorted({p for part in parts for p in part.nodes})
        nodes = [self._graph[p] for p in places]
        local = {p: i for i, p in enumerate(places)}
        inside = {node.outputs[0]: i for i, node in enumerate(nodes)}
        escaping = [
            v for v in inside if v.is_graph_output() or any(self._outside(u.node, local) for u in v.uses())
        ]
        if len(escaping) != 1 or inside[escaping[0]] != len(nodes) - 1:
            raise _Refuse("its channels are read by several operators")
        branch = self._branch([n.name or "" for n in nodes])
        read = [v for n in nodes for v in n.inputs if v is not None and v not in inside]
        operands = {(o.node, o.place) for part in parts for o in part.operands}
        weights = [self._graph[p].inputs[k] for p, k in sorted(operands)]
        groups = tuple(
            HiddenGroup(
                part.group.name,
                part.group.units,
                part.value,
                part.axis,
                tuple(local[p] for p in part.makes),
                tuple(Operand(local[o.node], o.place, o.axis, o.side) for o in part.operands),
            )
            for part in parts
        )
        site = Hidden(
            name=nodes[0].name or "",
            kind="conv" if any(part.kind == "conv" for part in parts) else "mlp",
            nodes=tuple(n.name or "" for n in nodes),
            wiring=tuple(tuple(-1 if v is None else inside.get(v, -1) for v in n.inputs) for n in nodes),
            inputs=tuple(dict.fromkeys(v.name or "" for v in read if not v.is_initializer())),
            output=escaping[0].name or "",
            weights=tuple(dict.fromkeys(v.name or "" for v in weights if v is not None)),
            groups=groups,
        )
        return site, branch

    def _outside(self, node: ir.Node, local: Mapping[int, int]) -> bool:
        place = self._place.get(node)
        return place is None or place not in local

    def _branch(self, names: Sequence[str]) -> Branch | None:
        """The innermost branch that holds all of the nodes."""
        home = None
        for branch in self._branches:
            shared = set(branch.nodes).intersection(names)
            if shared and len(shared) < len(names):
                raise _Refuse(f"its channels cross the border of '{branch.name}'")
            if shared and (home is None or len(branch.nodes) < len(home.nodes)):
                home = branch
        return home


def _joined(parts: Iterable[_Part]) -> list[list[_Part]]:
    """Groups in lots that share no node with each other."""
    lots: list[list[_Part]] = []
    for part in parts:
        own = set(part.nodes)
        near = [lot for lot in lots if any(own.intersection(p.nodes) for p in lot)]
        lots = [lot for lot in lots if lot not in near]
        lots.append([*(p for lot in near for p in lot), part])
    return sorted(lots, key=lambda lot: min(p.nodes[0] for p in lot))


def _named(site: Hidden, branch: Branch | None, *, alone: bool) -> Hidden:
    if branch is None:
        return site
    name = branch.name if alone else f"{branch.name}/{site.nodes[0]}"
    return Hidden(**{**site.__dict__, "name": name})


def _made_axis(node: ir.Node, place: int, value: ir.Value | None) -> int:
    """The axis of a weight along the channels it makes; -1 where it is no weight of the node."""
    if value is None or value.const_value is None or place != 1:
        return -1
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB")):
        return 0
    return len(value.const_value.shape) - 1
