"""Cut units of coupled channel groups out of a program: weights get smaller, its interface stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling import ChannelGroup, CouplingResult
from lamina.errors import PassError
from lamina.ir.inference import infer_shapes
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.shrink_edits import Edits

Cuts = Mapping[str, Sequence[int]]


def shrink(program: Program, coupling: CouplingResult, cuts: Cuts) -> Program:
    """A copy of the program without some units of some groups.

    Where a group is not ``inexact``, the result computes what :func:`mask_channels` does, up to the order of
    sums. What shape operators say stays as it was (so that scales derived from it do not change); operators
    that ask for shapes ask for less instead.

    Args:
        program: The program ``coupling`` was computed for; left unchanged.
        coupling: Its groups.
        cuts: Group name -> units to remove.

    Raises:
        PassError: No such group or unit; nothing would be left of an axis; two groups cut one axis along
            different factors.
    """
    removed = _removed(coupling, cuts)
    result = program.clone()
    rewriter = Rewriter(result.model)
    edits = Edits(rewriter, coupling.shapes, removed)
    for node in tuple(result.graph):
        edits.apply(node)
    for name, value in result.graph.initializers.items():
        _cut_weight(value, {a: at for (n, a), at in removed.items() if n == name})
    for node in result.graph:
        for value in node.outputs:
            if value.shape is not None and any((value.name, a) in removed for a in range(len(value.shape))):
                value.shape = None
    for name in [n for n, v in result.graph.initializers.items() if not v.uses() and not v.is_graph_input()]:
        if not result.graph.initializers[name].is_graph_output():
            del result.graph.initializers[name]
    infer_shapes(result.model)
    return result


def mask_channels(program: Program, coupling: CouplingResult, cuts: Cuts) -> Program:
    """A copy of the program in which the units are zeroed wherever something sums over them.

    Args:
        program: The program ``coupling`` was computed for; left unchanged.
        coupling: Its groups.
        cuts: Group name -> units to zero.

    Raises:
        PassError: As :func:`shrink`.
    """
    removed = _removed(coupling, cuts)
    result = program.clone()
    rewriter = Rewriter(result.model)
    groups = [_group(coupling, name) for name, units in cuts.items() if units]
    places = dict.fromkeys(place for group in groups for place in group.contracted)
    for node_name, value_name, axis in places:
        node = rewriter.node(node_name)
        for position, value in enumerate(node.inputs):
            if value is None or value.name != value_name:
                continue
            keeps = np.ones(coupling.shapes[value_name][axis], dtype=np.float32)
            keeps[removed[value_name, axis]] = 0
            rank = len(coupling.shapes[value_name])
            mask = keeps.reshape([-1 if a == axis else 1 for a in range(rank)])
            dtype = value.dtype if value.dtype is not None else ir.DataType.FLOAT
            array = rewriter.constant(mask.astype(dtype.numpy()), f"{value_name}_mask")
            masked = rewriter.at(node).op("Mul", [value, array], dtype=dtype, shape=value.shape)
            node.replace_input_with(position, masked)
            break  # masking one operand of a product is enough
    return result


def _group(coupling: CouplingResult, name: str) -> ChannelGroup:
    for group in coupling.groups:
        if group.name == name:
            return group
    raise PassError(f"no channel group is called '{name}'", advice="take names from coupled_groups()")


def _removed(coupling: CouplingResult, cuts: Cuts) -> dict[tuple[str, int], np.ndarray]:
    """(name, axis) -> indices to remove, ascending."""
    found: dict[tuple[str, int], set[int]] = {}
    factors: dict[tuple[str, str, int], tuple[int, str]] = {}
    for name, units in cuts.items():
        group = _group(coupling, name)
        if any(not 0 <= u < group.units for u in units):
            raise PassError(f"group '{name}' has {group.units} units", advice="count them from zero")
        if not units:
            continue
        for place, factor in group.choices.items():
            known, other = factors.setdefault(place, (factor, name))
            if known != factor:
                raise PassError(
                    f"groups '{other}' and '{name}' divide axis {place[2]} of '{place[1]}' differently",
                    advice="shrink by one of them, then look for groups again",
                )
        for member in group.members:
            taken = member.indices[list(units)].reshape(-1).tolist()
            found.setdefault((member.name, member.axis), set()).update(taken)
    for (name, axis), taken in found.items():
        if len(taken) >= coupling.shapes[name][axis]:
            raise PassError(f"nothing would be left on axis {axis} of '{name}'", advice="keep a unit")
    return {key: np.array(sorted(taken), dtype=np.int64) for key, taken in found.items()}


def _cut_weight(value: ir.Value, removed: Mapping[int, Iterable[int]]) -> None:
    if not removed or value.const_value is None:
        return
    dtype, array = value.const_value.dtype, value.const_value.numpy()
    for axis, taken in removed.items():
        array = np.delete(array, np.asarray(taken), axis=axis)
    value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=value.name)
    value.shape = ir.Shape(array.shape)
