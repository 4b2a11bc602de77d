"""A hidden width: channels that operators make, others compute each by itself, and one sums over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lamina.ir.program import Program

Side = Literal["made", "read"]


@dataclass(frozen=True)
class Operand:
    """A weight with an axis along a group's channels.

    Attributes:
        node: Place of the node that reads it, in :attr:`Hidden.nodes`.
        place: Which of its inputs.
        axis: The axis.
        side: ``made``: it makes, shifts or scales the channels; ``read``: it sums over them.
    """

    node: int
    place: int
    axis: int
    side: Side


@dataclass(frozen=True)
class HiddenGroup:
    """The channels of one hidden width.

    Attributes:
        name: As :func:`lamina.analysis.coupling.coupled_groups` calls it.
        units: How many channels.
        value: Name of the activation that is summed over.
        axis: Axis of its activations: 1 for images, -1 for tokens.
        makes: Places of the nodes whose outputs hold the channels.
        operands: Every weight along them.
    """

    name: str
    units: int
    value: str
    axis: int
    makes: tuple[int, ...]
    operands: tuple[Operand, ...]

    def vectors(self, arrays: Mapping[tuple[int, int], np.ndarray], side: Side) -> np.ndarray:
        """All weights of a side, float64 ``[units, n]``; ``arrays``: operand (node, place) -> array."""
        rows = [
            np.moveaxis(arrays[o.node, o.place], o.axis, 0).reshape(self.units, -1)
            for o in self.operands
            if o.side == side
        ]
        return np.concatenate(rows, axis=1).astype(np.float64)


@dataclass(frozen=True)
class Hidden:
    """Hidden widths that share operators, and the nodes from the first that makes them to the last reader.

    Attributes:
        name: The branch they are in, where they are all of it; else with the first node's name.
        kind: ``mlp`` or ``conv``.
        nodes: Names, in execution order; the last one makes the only value others read.
        wiring: For each node and input: the place of the node that makes it, or -1.
        inputs: Activations read from elsewhere.
        output: The value the last node makes.
        weights: Names of the weights that change.
        groups: The widths.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    wiring: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...]
    groups: tuple[HiddenGroup, ...]

    def arrays(self, program: Program) -> dict[tuple[int, int], np.ndarray]:
        """(node, place) -> weight, of every operand."""
        nodes = {n.name: n for n in program.graph}
        found = {}
        for operand in (o for g in self.groups for o in g.operands):
            value = nodes[self.nodes[operand.node]].inputs[operand.place]
            assert value is not None
            assert value.const_value is not None
            found[operand.node, operand.place] = value.const_value.numpy()
        return found
