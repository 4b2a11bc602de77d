"""Coupled channel groups: which indices of which axes of which tensors must be cut together.

A unit is the least that can be cut: a channel of every convolution of a residual chain, a head of an
attention, one channel in each group of a channel shuffle. Units that run through the same tensors form a
group; any of them may go, as long as one stays. The idea is DepGraph's (Fang et al. 2023, arXiv:2301.12900),
there between layers of known kinds; here an operator ties indices of axes, so that joins, cuts, reshapes and
strided maps are followed exactly, and what no rule knows stays.

Cost: every weight axis spreads its labels once; O(labelled indices x ways of cutting factored axes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling_relation import Axis, Frozen, Relation, Role
from lamina.analysis.coupling_rules import relation_of
from lamina.analysis.coupling_search import Labels, Search
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes

# Of several roles a weight's axis has, the one that is told.
_TELLING: tuple[Role, ...] = ("out", "in", "table", "bias", "scale", "channelwise", "activation")
_ALL_GONE = "nothing would be left"


@dataclass(frozen=True)
class Layout:
    """``index(unit, j) = offset + unit * step + j * stride`` for j < block.

    A plain channel is step 1, block 1; the columns a channel has behind Flatten are step H*W, block H*W,
    stride 1; a channel of a shuffle over g groups is step 1, block g, stride C/g.
    """

    offset: int
    step: int
    block: int
    stride: int


@dataclass(frozen=True)
class Member:
    """One axis a group runs through.

    Attributes:
        name: Of a weight or an activation.
        axis: Axis of it, not negative.
        role: ``out`` (makes the channels), ``in`` (sums over them), ``bias``, ``scale``, ``table`` (an
            embedding), ``channelwise`` (another constant), ``activation``.
        size: Of the axis.
        indices: int [units, k]: what of the axis goes with each unit, ascending.
    """

    name: str
    axis: int
    role: Role
    size: int
    indices: np.ndarray

    @property
    def layout(self) -> Layout | None:
        """The index map in closed form; None where it has none."""
        units, block = self.indices.shape
        first = self.indices[0]
        stride = int(first[1] - first[0]) if block > 1 else 1
        step = int(self.indices[1, 0] - first[0]) if units > 1 else block * stride
        found = Layout(int(first[0]), step, block, stride)
        made = found.offset + step * np.arange(units)[:, None] + stride * np.arange(block)
        return found if bool((made == self.indices).all()) else None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that run through the same tensors.

    Attributes:
        name: After the weight that makes them, and what it is cut into.
        units: How many there are.
        members: Every weight and activation axis, weights first, each in order of the graph.
        inexact: Why cutting units is not the same as zeroing what sums over them (a mean over fewer
            channels, a softmax); empty where the two are equal.
        contracted: (node, input, axis) at which the channels are summed over: zeroing there is equal to
            cutting unless ``inexact`` says otherwise.
        choices: (node, input or output, axis) -> number of the factor a factored axis is cut along. Two
            groups that choose differently on one axis cannot be cut in one go.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    inexact: tuple[str, ...] = ()
    contracted: tuple[tuple[str, str, int], ...] = ()
    choices: Mapping[tuple[str, str, int], int] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[Member, ...]:
        """Members with stored elements."""
        return tuple(m for m in self.members if m.role != "activation")

    def parameters(self, sizes: Mapping[str, int]) -> float:
        """Weight elements one unit takes with it when only it is cut.

        Args:
            sizes: Weight name -> elements.
        """
        kept: dict[str, float] = {}
        for m in self.weights:
            kept[m.name] = kept.get(m.name, 1.0) * (1 - m.indices.shape[1] / m.size)
        return sum(sizes[name] * (1 - share) for name, share in kept.items())


@dataclass(frozen=True)
class FrozenChannels:
    """Channels of a weight that must stay.

    Attributes:
        name: The weight.
        axis: Its axis.
        count: How many indices.
        reason: Why, naming the operator that holds them.
    """

    name: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True)
class CouplingResult:
    """What :func:`coupled_groups` found.

    Attributes:
        groups: In order of the weights that make their channels. An axis that can be cut in two ways
            (heads, or channels inside every head) is in a group for each.
        frozen: Weight axes no group covers, with the reason.
        shapes: Shape of every tensor the indices hold for.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenChannels, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def of(self, name: str, axis: int) -> tuple[ChannelGroup, ...]:
        """The groups that run through an axis of a tensor."""
        return tuple(g for g in self.groups if any((m.name, m.axis) == (name, axis) for m in g.members))


def coupled_groups(program: Program, feeds: Mapping[str, np.ndarray] | None = None) -> CouplingResult:
    """Find every group of channels that can be cut, and say what holds the others.

    Interface tensors keep their shape. Operators without a rule, subgraphs and random or stateful operators
    freeze the axes they touch; so do positions of convolutions, samples and tokens, which end at the
    interface.

    Args:
        program: Left unchanged.
        feeds: Inputs that give the concrete shapes; its example when omitted. Only axes of static size
            are ever cut, so the groups hold for other batch sizes and lengths too.

    Raises:
        BackendError: The program does not run on these feeds.
    """
    tensors = observed_shapes(program, program.example if feeds is None else feeds)
    relations = [relation_of(node, tensors) for node in program.graph]
    finder = _Finder(program, relations, {n: shape for n, (shape, _) in tensors.items()})
    for axis in _seeds(program, relations):
        finder.look(axis)
    return finder.result()


def _seeds(program: Program, relations: list[Relation]) -> list[Axis]:
    """Axes of trained weights: those that make channels first, each in order of the graph."""
    weights = program.graph.initializers
    found: dict[Axis, None] = {}
    for producing in (True, False):
        for relation in relations:
            for axis, role in relation.roles.items():
                value = weights[axis[0]]
                if (role == "out") == producing and _trained(value):
                    found.setdefault(axis)
    return list(found)


def _trained(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return False
    return tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8


class _Finder:
    """Collects groups seed by seed; what one seed has covered is no seed any more."""

    def __init__(
        self, program: Program, relations: list[Relation], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._weights = program.graph.initializers
        self._relations, self._shapes = relations, shapes
        sizes = {(n, a): size for n, shape in shapes.items() for a, size in enumerate(shape)}
        self._search = Search(relations, sizes)
        self._roles: dict[Axis, Role] = {}
        self._frozen: dict[Axis, list[Frozen]] = {}
        self._inexact: dict[Axis, list[str]] = {}
        self._contracted: dict[Axis, list[str]] = {}
        self._order: dict[str, int] = {}
        for relation in relations:
            self._take_in(relation)
        for ports, what in ((program.graph.inputs, "an input"), (program.graph.outputs, "an output")):
            for value in ports:
                for axis, size in enumerate(shapes.get(value.name or "", ())):
                    key = (value.name or "", axis)
                    held = Frozen(key, np.arange(size), f"{what} of the model ('{value.name}')")
                    self._frozen.setdefault(key, []).append(held)
        self._covered: dict[Axis, np.ndarray] = {}
        self._groups: dict[object, ChannelGroup] = {}
        self._held: dict[Axis, FrozenChannels] = {}
        self._names: set[str] = set()

    def _take_in(self, relation: Relation) -> None:
        for value in (*relation.node.inputs, *relation.node.outputs):
            if value is not None and value.name:
                self._order.setdefault(value.name, len(self._order))
        for axis, role in relation.roles.items():
            known = self._roles.get(axis, role)
            self._roles[axis] = min(known, role, key=_TELLING.index)
        for frozen in relation.frozen:
            self._frozen.setdefault(frozen.axis, []).append(frozen)
        for axis, reason in relation.inexact.items():
            self._inexact.setdefault(axis, []).append(reason)
        for axis in relation.contracted:
            self._contracted.setdefault(axis, []).append(relation.node.name or "")

    def look(self, seed: Axis) -> None:
        """Spread from what is not covered yet of a weight's axis."""
        size = self._shapes[seed[0]][seed[1]]
        covered = self._covered.setdefault(seed, np.zeros(size, dtype=bool))
        fresh = np.flatnonzero(~covered)
        if size < 2 or not len(fresh):
            return
        # What only one of several ways reaches may have other ways of its own.
        always: dict[Axis, np.ndarray] | None = None
        for labels in self._search.spread(seed, fresh):
            self._hold(labels)
            self._collect(seed, labels)
            reached = {axis: array >= 0 for axis, array in labels.axes.items()}
            if always is not None:
                reached = {axis: at & always[axis] for axis, at in reached.items() if axis in always}
            always = reached
        for axis, at in (always or {}).items():
            self._covered[axis] = self._covered.get(axis, np.zeros(len(at), dtype=bool)) | at

    def result(self) -> CouplingResult:
        """All groups, and the weight axes in none of them."""
        grouped = {(m.name, m.axis) for g in self._groups.values() for m in g.members}
        held = tuple(f for axis, f in self._held.items() if axis not in grouped)
        return CouplingResult(tuple(self._groups.values()), held, self._shapes)

    def _hold(self, labels: Labels) -> None:
        """Stick the labels of frozen indices, and of units that are a whole axis."""
        for axis, array in labels.axes.items():
            for frozen in self._frozen.get(axis, ()):
                labels.stick(array[frozen.positions], frozen.reason)
            merged = labels.of(array)
            if merged[0] >= 0 and (merged == merged[0]).all():
                labels.stick(merged[:1], f"{_ALL_GONE} of '{axis[0]}'")

    def _collect(self, seed: Axis, labels: Labels) -> None:
        runs: dict[int, list[tuple[Axis, np.ndarray]]] = {}
        stuck = {int(labels.root[label]): reason for label, reason in labels.stuck.items()}
        for axis, array in labels.axes.items():
            merged = labels.of(array)
            order = np.argsort(merged, kind="stable")
            found, starts = np.unique(merged[order], return_index=True)
            for label, at in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
                if label in stuck:
                    self._keep(axis, len(at), stuck[label])
                elif label >= 0:
                    runs.setdefault(label, []).append((axis, at))
        kinds: dict[tuple[tuple[Axis, int], ...], list[list[tuple[Axis, np.ndarray]]]] = {}
        for run in runs.values():
            run.sort(key=lambda item: (self._order[item[0][0]], item[0][1]))
            kinds.setdefault(tuple((axis, len(at)) for axis, at in run), []).append(run)
        for units in kinds.values():
            self._add(seed, units, labels)

    def _keep(self, axis: Axis, count: int, reason: str) -> None:
        if axis[0] in self._weights and _trained(self._weights[axis[0]]):
            known = self._held.get(axis)
            if known is None or known.count < count:
                self._held[axis] = FrozenChannels(*axis, count, reason)

    def _add(self, seed: Axis, units: list[list[tuple[Axis, np.ndarray]]], labels: Labels) -> None:
        axes = [axis for axis, _ in units[0]]
        order = sorted(range(len(axes)), key=lambda i: axes[i][0] not in self._weights)
        units.sort(key=lambda run: int(run[order[0]][1][0]))
        members = []
        for place in order:
            axis = axes[place]
            indices = np.stack([run[place][1] for run in units])
            role = self._roles.get(axis, "channelwise") if axis[0] in self._weights else "activation"
            members.append(Member(*axis, role, self._shapes[axis[0]][axis[1]], indices))
        key = tuple((m.name, m.axis, m.indices.tobytes()) for m in members)
        if key in self._groups:
            return
        reasons = dict.fromkeys(r for axis in axes for r in self._inexact.get(axis, ()))
        held = {(n, axis): atom for (n, axis), atom in labels.chosen.items() if axis in set(axes)}
        self._groups[key] = ChannelGroup(
            name=self._name(members, seed),
            units=len(units),
            members=tuple(members),
            inexact=tuple(reasons),
            contracted=tuple((node, *axis) for axis in axes for node in self._contracted.get(axis, ())),
            choices={(self._relations[n].node.name or "", *axis): atom for (n, axis), atom in held.items()},
        )

    def _name(self, members: list[Member], seed: Axis) -> str:
        """The first weight that makes the channels, and a number where it makes several groups."""
        made = [m.name for m in members if m.role == "out"] or [seed[0]]
        name, count = made[0], 1
        while name in self._names:
            count += 1
            name = f"{made[0]}/{count}"
        self._names.add(name)
        return name
