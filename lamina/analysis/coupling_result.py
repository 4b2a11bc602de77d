"""What the coupling analysis finds: groups of channels, the axes they run through, and what must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lamina.analysis.coupling_relation import Role


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
