"""Sort channels by size, so that weights that share a scale in blocks are of like size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling import ChannelGroup, Member, coupled_groups
from lamina.analysis.coupling_relation import Relation
from lamina.analysis.coupling_rules import relation_of
from lamina.analysis.coupling_symmetry import broken_by, reordered
from lamina.errors import LaminaError
from lamina.ir.examples import synthesize
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.shapes import observed_shapes
from lamina.passes.fold.channels import replace_constant
from lamina.passes.pass_ import Effect, Fold, Refusal, Rounding

_NUMBERS = "fiub"


@dataclass(frozen=True)
class _Sorted:
    """A group of channels, in which order they come, and what speaks against it."""

    group: ChannelGroup
    order: np.ndarray
    obstacle: str | None


@dataclass(frozen=True)
class SortChannels(Fold):
    """Permute coupled channels, largest first: hidden channels, channels in all heads alike, the stream's.

    The columns of what makes a channel, the rows of what sums over it and every table, gain and bias along
    it move together, so the function stays. A channel's size is the norm of the weights that sum over it;
    where none does (queries and keys), of those that make it. Blocks along a reduction then hold weights of
    like size. Not applied by itself: nothing gets faster.

    Channels and their partners are those of :mod:`lamina.analysis.coupling`: two channels that a rotary
    embedding turns together are one unit, and move with their columns of its tables. Whole heads move too.

    Fires: groups whose permutation commutes with every operator
    (:func:`lamina.analysis.coupling_symmetry.broken_by`).
    Refuses: all others, and weights in types of less than a byte.
    Effect: Rounding: sums run in another order.
    Cost: that of the analysis, which runs the model twice on a small input, and a copy of each weight.
    Source: Trukhanov, Soloveychik 2024, arXiv:2403.20137, sec. 3. Deviates: there keys and queries alone are
    sorted, for a cache in blocks; here whatever weights in blocks are along.
    """

    effect: ClassVar[Effect] = Rounding(ulps=256)
    paper: ClassVar[str] = "arXiv:2403.20137"
    wants: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN")

    def apply(self, rewriter: Rewriter) -> None:
        """Permute the weights of one group after the other; groups of one axis cut it in different ways."""
        values = dict(rewriter.graph.initializers)
        arrays: dict[str, np.ndarray] = {}
        for found in _groups(rewriter.model):
            if found.obstacle is not None or _in_order(found.order):
                continue
            for (name, axis), source in reordered(found.group, found.order).items():
                if name in values:
                    old = arrays[name] if name in arrays else _array(values[name])
                    arrays[name] = old.take(source, axis=axis)
            count, weights = found.group.units, len(found.group.weights)
            rewriter.record(self.name, found.group.name, f"{count} channels of {weights} weights sorted")
        for name, array in arrays.items():
            replace_constant(rewriter, values[name], array, "sorted")

    def refusals(self, model: ir.Model) -> list[Refusal]:
        """The groups that are left as they are, with the reason."""
        return [
            Refusal(self.name, f.group.name, f.obstacle) for f in _groups(model) if f.obstacle is not None
        ]


def _groups(model: ir.Model) -> Iterator[_Sorted]:
    """Every coupled group of a model that runs."""
    try:
        program = Program(model, example=synthesize(model))
        found = coupled_groups(program)
        tensors = observed_shapes(program, program.example)
    except LaminaError:  # it does not run on made-up inputs: nothing is known of its shapes
        return
    relations = [relation_of(node, tensors) for node in program.graph]
    for group in found.groups:
        order = np.argsort(-_sizes(group, program), kind="stable")
        yield _Sorted(group, order, None if _in_order(order) else _obstacle(group, order, program, relations))


def _obstacle(
    group: ChannelGroup, order: np.ndarray, program: Program, relations: list[Relation]
) -> str | None:
    for member in group.weights:
        if _array(program.graph.initializers[member.name]).dtype.kind not in _NUMBERS:
            return f"'{member.name}' is kept in less than a byte an element"
    where = broken_by(relations, reordered(group, order))
    return None if where is None else f"{where} may tell its channels apart"


def _sizes(group: ChannelGroup, program: Program) -> np.ndarray:
    """Size of each unit, float64 ``[units]``; the same to the bit whatever order other channels are in."""
    members = [m for m in group.weights if m.role == "in"] or [m for m in group.weights if m.role == "out"]
    total = np.zeros(group.units)
    for member in members:
        total += _squares(member, _array(program.graph.initializers[member.name]))
    return total


def _squares(member: Member, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in _NUMBERS:
        return np.zeros(len(member.indices))
    rows = np.moveaxis(array, member.axis, 0).reshape(member.size, -1).astype(np.float64)
    units = np.square(rows)[member.indices].reshape(len(member.indices), -1)
    summed: np.ndarray = np.sort(units, axis=1).sum(axis=1)
    return summed


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _in_order(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())
