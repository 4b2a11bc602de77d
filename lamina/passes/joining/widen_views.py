"""Operators that only move elements, on bodies that lie side by side along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lamina.passes.fold.graph import attribute, constant, is_op, rank_of
from lamina.passes.fold.heads import permutation, same_dim
from lamina.passes.joining.widen import Affine, Constants, Same, State, Total, Unlike, Wide, Widener, shaped


def _source(widener: Widener, node: ir.Node, state: State) -> Wide:
    if not isinstance(state, Wide) or state.raised:
        raise Unlike(f"{node.op_type} '{node.name}' reads what cannot be moved side by side")
    return widener.solid(state)


def _axes(node: ir.Node, states: Sequence[State], place: int) -> list[int] | None:
    """Constant axes, from an input."""
    state = states[place] if len(states) > place else None
    if state is None:
        return None
    if not isinstance(state, Constants) or not state.equal:
        raise Unlike(f"the axes of {node.op_type} '{node.name}' are no constant")
    return [int(a) for a in state.arrays[0].reshape(-1)]


def transpose(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """The axis goes where the permutation takes it."""
    wide = _source(widener, node, states[0])
    perm = permutation(node) or tuple(reversed(range(wide.rank)))
    (value,) = widener.op(node, [wide.value])
    axis = perm.index(wide.axis)
    return [shaped(replace(wide, value=value, axis=axis), node.outputs[0])]


def reshape(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """The axis is split into heads and their size, or heads are put together; dimensions before it stay."""
    wide, old, new = _source(widener, node, states[0]), node.inputs[0], node.outputs[0]
    size, axis = wide.size, wide.axis
    if old is None or old.shape is None or new.shape is None or len(new.shape) <= axis:
        raise Unlike(f"the shapes of Reshape '{node.name}' are not known")
    if any(not same_dim(old.shape[i], new.shape[i]) for i in range(axis)):
        raise Unlike(f"Reshape '{node.name}' moves what lies before the axis that bodies lie along")
    made = new.shape[axis]
    if not isinstance(made, int) or not isinstance(old.shape[axis], int):
        raise Unlike(f"the heads of Reshape '{node.name}' are not known")
    wanted = states[1]
    if isinstance(wanted, Constants):
        if not wanted.equal or attribute(node, "allowzero", 0):
            raise Unlike(f"Reshape '{node.name}' has another shape in each body")
        numbers = wanted.arrays[0].astype(np.int64)
        if numbers[axis] > 0:
            numbers = numbers.copy()
            numbers[axis] *= widener.count
        to = widener.store(numbers, wanted.values[0], np.dtype(np.int64))
    elif isinstance(wanted, Same) and _free(node.inputs[1], axis):
        to = wanted.value
    else:
        raise Unlike(f"the shape that Reshape '{node.name}' gives is not known")
    if size % made and made % size:
        raise Unlike(f"Reshape '{node.name}' splits across bodies")
    (value,) = widener.op(node, [wide.value, to])
    return [shaped(Wide(value, axis, len(new.shape), (made,) * widener.count), new)]


def _free(shape: ir.Value | None, axis: int) -> bool:
    """Whether a computed shape leaves the dimension of an axis to the number of elements."""
    maker = None if shape is None else shape.producer()
    if maker is None or not is_op(maker, "Concat"):
        return False
    at = 0
    for part in maker.inputs:
        dims = None if part is None else part.shape
        length = dims[0] if dims is not None and len(dims) == 1 else None
        if not isinstance(length, int):
            return False
        if at <= axis < at + length:
            array = constant(part)
            return array is not None and int(array[axis - at]) == -1
        at += length
    return False


def unsqueeze(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """New axes of size one, before the bodies' axis or behind it."""
    wide, axes = _source(widener, node, states[0]), _axes(node, states, 1)
    if axes is None:
        raise Unlike(f"the axes of Unsqueeze '{node.name}' are not known")
    rank = wide.rank + len(axes)
    places = {a % rank for a in axes}
    axis = [i for i in range(rank) if i not in places][wide.axis]
    (value,) = widener.op(node, [wide.value, widener.shared(states[1])])
    return [shaped(replace(wide, value=value, axis=axis, rank=rank), node.outputs[0])]


def squeeze(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Axes of size one go, none of them the bodies'."""
    wide, axes = _source(widener, node, states[0]), _axes(node, states, 1)
    if axes is None or wide.axis in {a % wide.rank for a in axes}:
        raise Unlike(f"Squeeze '{node.name}' may take the axis that bodies lie along")
    left = [i for i in range(wide.rank) if i not in {a % wide.rank for a in axes}]
    (value,) = widener.op(node, [wide.value, widener.shared(states[1])])
    axis = left.index(wide.axis)
    return [shaped(replace(wide, value=value, axis=axis, rank=len(left)), node.outputs[0])]


def expand(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Other axes are repeated."""
    wide, to = _source(widener, node, states[0]), states[1]
    numbers = to.arrays[0].astype(np.int64) if isinstance(to, Constants) and to.equal else None
    old, new = rank_of(node.inputs[0]), node.outputs[0]
    if (
        numbers is None
        or not isinstance(to, Constants)
        or old is None
        or rank_of(new) != old
        or len(numbers) > old
    ):
        raise Unlike(f"the shape that Expand '{node.name}' gives is not known")
    at = wide.axis - old + len(numbers)
    if at >= 0 and numbers[at] != 1:
        if numbers[at] != wide.size:
            raise Unlike(f"Expand '{node.name}' repeats along the axis that bodies lie along")
        numbers = numbers.copy()
        numbers[at] *= widener.count
    (value,) = widener.op(node, [wide.value, widener.store(numbers, to.values[0], np.dtype(np.int64))])
    return [shaped(replace(wide, value=value), new)]


def slices(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Other axes are cut."""
    wide = _source(widener, node, states[0])
    axes = _axes(node, states, 3)
    starts = states[1]
    if axes is None:
        if not isinstance(starts, Constants):
            raise Unlike(f"the axes of Slice '{node.name}' are not known")
        axes = list(range(len(starts.arrays[0])))
    if wide.axis in {a % wide.rank for a in axes}:
        raise Unlike(f"Slice '{node.name}' cuts the axis that bodies lie along")
    (value,) = widener.op(node, [wide.value, *(widener.shared(s) for s in states[1:])])
    return [shaped(replace(wide, value=value), node.outputs[0])]


def split(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Other axes are split; or the bodies' own, as queries, keys and values of one projection are."""
    wide = _source(widener, node, states[0])
    axis = attribute(node, "axis", 0) % wide.rank
    if axis != wide.axis:
        values = widener.op(node, [wide.value, *(widener.shared(s) for s in states[1:])])
        pairs = zip(values, node.outputs, strict=True)
        return [shaped(replace(wide, value=v), old) for v, old in pairs]
    sizes = [None if v.shape is None else v.shape[axis] for v in node.outputs]
    known = [s for s in sizes if isinstance(s, int)]
    if len(known) < len(sizes) or sum(known) != wide.size:
        raise Unlike(f"the sizes of Split '{node.name}' are not known")
    first = widener.rewriter.op(
        "Split",
        [wide.value, widener.integers(*known * widener.count)],
        {"axis": axis},
        outputs=len(known) * widener.count,
        name=f"{node.name}_joined",
        dtype=wide.value.dtype,
    )
    maker = first.producer()
    assert maker is not None
    parts: list[State] = []
    for i, (size, old) in enumerate(zip(known, node.outputs, strict=True)):
        mine = [maker.outputs[i + k * len(known)] for k in range(widener.count)]
        for value in mine:
            value.type, value.shape = old.type, None if old.shape is None else old.shape.copy()
        value = widener.extra("Concat", mine, {"axis": axis})
        parts.append(shaped(Wide(value, axis, wide.rank, (size,) * widener.count), old))
    return parts


def concat(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Values are put together along another axis."""
    wides = [_source(widener, node, s) for s in states if isinstance(s, Wide)]
    if not wides or any(isinstance(s, (Affine, Total)) for s in states):
        raise Unlike(f"Concat '{node.name}' reads what cannot be put side by side")
    frame = wides[0]
    if any((w.axis, w.rank, w.sizes) != (frame.axis, frame.rank, frame.sizes) for w in wides):
        raise Unlike(f"Concat '{node.name}' combines bodies that lie along different axes")
    if attribute(node, "axis", 0) % frame.rank == frame.axis:
        raise Unlike(f"Concat '{node.name}' is along the axis that bodies lie along")
    inputs = [
        widener.solid(s).value if isinstance(s, Wide) else _spread(widener, s, frame.axis) for s in states
    ]
    (value,) = widener.op(node, inputs)
    return [shaped(replace(frame, value=value), node.outputs[0])]


def _spread(widener: Widener, state: State, axis: int) -> ir.Value:
    value = widener.shared(state)
    if value is None:
        raise Unlike("a value is missing")
    return widener.spread(value, axis)


def shape(widener: Widener, node: ir.Node, states: Sequence[State]) -> list[State]:
    """Dimensions other than that of the bodies' axis."""
    wide = _source(widener, node, states[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", wide.rank)
    first, last = (min(max(i + wide.rank if i < 0 else i, 0), wide.rank) for i in (start, end))
    if first <= wide.axis < last:
        raise Unlike(f"Shape '{node.name}' asks for the axis that bodies lie along")
    return [Same(widener.op(node, [wide.value], like=node.outputs)[0])]
