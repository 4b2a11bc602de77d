"""What one operator says about its tensors' axes: which indices of which axes are the same channel.

An *atom* is one index variable of an operator: the contracted one of a MatMul, the group of a Conv. A *tie*
says which index of an atom each index of an axis is. An axis made of several variables (the channels of a
grouped convolution are group and channel inside it; a reshaped axis is heads and width) has a tie for each,
and they are alternatives: an axis can be cut along one of its factors at a time. An axis an operator says
nothing of is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from lamina.analysis.flops import Tensors

Axis = tuple[str, int]
Role = Literal["out", "in", "bias", "scale", "table", "channelwise", "activation"]


@dataclass(frozen=True)
class Tie:
    """Index ``positions[k]`` of an axis is index ``index[k]`` of an atom.

    Attributes:
        axis: Value name and axis.
        atom: Number of the atom.
        positions: int [k], of the axis, each at most once.
        index: int [k], of the atom.
    """

    axis: Axis
    atom: int
    positions: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Frozen:
    """Indices of an axis that must stay, and why."""

    axis: Axis
    positions: np.ndarray
    reason: str


@dataclass
class Relation:
    """The ties of one node.

    Attributes:
        node: The node.
        tensors: Shape and dtype of every value.
        atoms: Size of each atom.
        ties: All axes' active ties.
        choices: Axis -> its alternatives; such ties are not in ``ties``.
        frozen: Indices that must stay.
        roles: What a weight's axis is to this node.
        contracted: Axes that are summed over: a zero there counts as much as nothing.
        inexact: Axis -> why removing its channels is not the same as zeroing them.
    """

    node: ir.Node
    tensors: Tensors
    atoms: list[int] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    choices: dict[Axis, list[Tie]] = field(default_factory=dict)
    frozen: list[Frozen] = field(default_factory=list)
    roles: dict[Axis, Role] = field(default_factory=dict)
    contracted: list[Axis] = field(default_factory=list)
    inexact: dict[Axis, str] = field(default_factory=dict)
    _said: set[Axis] = field(default_factory=set)
    _aside: set[str] = field(default_factory=set)

    # -- what a rule reads --------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Concrete shape; None where the value is absent or no tensor."""
        known = self.tensors.get(value.name or "") if value is not None else None
        return None if known is None else known[0]

    def input(self, index: int) -> ir.Value | None:
        """An input; None where it is omitted."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def output(self, index: int) -> ir.Value | None:
        """An output; None where it is omitted."""
        value = self.node.outputs[index] if index < len(self.node.outputs) else None
        return value if value is not None and value.name else None

    # -- what a rule says ---------------------------------------------------------------------------

    def atom(self, size: int) -> int:
        """A new index variable."""
        self.atoms.append(int(size))
        return len(self.atoms) - 1

    def tie(
        self,
        value: ir.Value | None,
        axis: int,
        atom: int,
        *,
        index: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        role: Role | None = None,
    ) -> None:
        """Tie an axis, or some indices of it, to an atom; an axis of size 1 has nothing to cut."""
        shape = self.shape(value)
        if value is None or shape is None or shape[axis] == 1:
            return
        key = self._say(value, axis, len(shape), role)
        at = np.arange(shape[axis]) if positions is None else positions
        self.ties.append(Tie(key, atom, at, at if index is None else index))

    def split(
        self,
        value: ir.Value | None,
        axis: int,
        atoms: Sequence[int],
        role: Role | None = None,
        *,
        cut: Sequence[int] | None = None,
    ) -> None:
        """Tie an axis to several atoms in mixed radix, the last one running fastest.

        Args:
            value: Its axis has the product of the atoms' sizes.
            axis: The axis.
            atoms: The factors, outermost first.
            role: As for :meth:`tie`.
            cut: Factors it may be cut along; all of them when omitted.
        """
        shape = self.shape(value)
        if value is None or shape is None or shape[axis] == 1:
            return
        key = self._say(value, axis, len(shape), role)
        positions, inner = np.arange(shape[axis]), 1
        ties = []
        for atom in reversed(atoms):
            size = self.atoms[atom]
            if size > 1 and (cut is None or atom in cut):
                ties.append(Tie(key, atom, positions, positions // inner % size))
            inner *= size
        if not ties:
            self.freeze(value, axis, "a single channel that cannot be divided")
        elif len(ties) == 1:
            self.ties += ties
        else:
            self.choices[key] = ties[::-1]

    def freeze(
        self, value: ir.Value | None, axis: int, reason: str, positions: np.ndarray | None = None
    ) -> None:
        """Say that an axis, or some indices of it, must stay."""
        shape = self.shape(value)
        if value is None or shape is None or shape[axis] == 1:
            return
        key = self._say(value, axis, len(shape), None)
        at = np.arange(shape[axis]) if positions is None else positions
        self.frozen.append(Frozen(key, at, f"{reason} ({self.node.op_type} '{self.node.name}')"))

    def free(self, value: ir.Value | None, axis: int) -> None:
        """Say that an axis may be cut as far as this operator is concerned."""
        if value is not None:
            self._say(value, axis, len(self.shape(value) or ()), None)

    def aside(self, *values: ir.Value | None) -> None:
        """Say that these are shapes, bounds or scalars: no channels."""
        self._aside.update(v.name for v in values if v is not None and v.name)

    def contract(self, value: ir.Value | None, axis: int) -> None:
        """Say that an axis is summed over."""
        if value is not None:
            self.contracted.append((value.name or "", axis % max(1, len(self.shape(value) or ()))))

    def note(self, value: ir.Value | None, axis: int, reason: str) -> None:
        """Say why a zeroed channel of this axis is not the same as a removed one."""
        if value is not None:
            key = (value.name or "", axis % max(1, len(self.shape(value) or ())))
            self.inexact[key] = f"{reason} ({self.node.op_type} '{self.node.name}')"

    def freeze_all(self, reason: str) -> None:
        """Freeze every axis this node touches, those captured by subgraphs included."""
        for value in self._values():
            for axis in range(len(self.shape(value) or ())):
                self.freeze(value, axis, reason)

    def finish(self) -> Relation:
        """Freeze what the rule said nothing of."""
        for value in self._values():
            if value.name in self._aside:
                continue
            for axis in range(len(self.shape(value) or ())):
                if (value.name or "", axis) not in self._said:
                    self.freeze(value, axis, f"no channels on axis {axis} of '{value.name}'")
        return self

    def _say(self, value: ir.Value, axis: int, rank: int, role: Role | None) -> Axis:
        key = (value.name or "", axis % rank)
        self._said.add(key)
        if role is not None and value.is_initializer():
            self.roles.setdefault(key, role)
        return key

    def _values(self) -> list[ir.Value]:
        from lamina.ir.names import subgraphs

        values = [v for v in (*self.node.inputs, *self.node.outputs) if v is not None and v.name]
        for graph in subgraphs(self.node):
            values += [v for n in graph.all_nodes() for v in n.inputs if v is not None and v.name]
            values += [v for v in graph.outputs if v.name]
        return list(dict.fromkeys(values))


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer nobody can override."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def ints_attribute(node: ir.Node, name: str) -> list[int] | None:
    """A list of integers; None where it is absent."""
    found = node.attributes.get(name)
    return None if found is None else list(found.as_ints())


def text_attribute(node: ir.Node, name: str, default: str) -> str:
    """A text attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_string()
