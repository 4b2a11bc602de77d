"""Remove operators that do nothing, and merge chains of transposes, reshapes and casts, in linear time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.ir.semantics import is_fenced
from lamina.passes.fold.graph import LocalFold, attribute, constant, is_op, rank_of, scalar, substitute
from lamina.passes.fold.heads import same_dim
from lamina.passes.pass_ import Effect, Exact

_OPEN_END = 2**31 - 1
_PLAIN = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

# What each type is kept by, without losing a bit.
_KEPT: dict[ir.DataType, frozenset[ir.DataType]] = {
    ir.DataType.FLOAT16: frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE}),
    ir.DataType.BFLOAT16: frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE}),
    ir.DataType.FLOAT: frozenset({ir.DataType.DOUBLE}),
    ir.DataType.INT8: frozenset({ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT}),
    ir.DataType.UINT8: frozenset(
        {ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT}
    ),
    ir.DataType.INT16: frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT}),
    ir.DataType.INT32: frozenset({ir.DataType.INT64, ir.DataType.DOUBLE}),
}


@dataclass(frozen=True)
class _Match:
    source: ir.Value
    why: str
    op_type: str = ""  # empty: the node does nothing
    inputs: tuple[ir.Value | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SimplifyLocal(LocalFold):
    """Do in linear time what the library's matcher does for small graphs only, and a little more.

    Removes: Transpose, Reshape, Flatten, Expand, Slice, Pad, Cast that change nothing; Dropout in inference;
    Concat and Sum of one input; Mul and Div by 1, Add and Sub of 0; Squeeze and Unsqueeze of the same axes.
    Merges: Transpose after Transpose, Reshape after Reshape, Flatten, Squeeze or Unsqueeze, Cast after a Cast
    that kept every bit.
    Refuses: what it cannot show from constants and known shapes; a Reshape that copies a dim of the shape in
    between; an operator that stands between two interface tensors.
    Effect: Exact, but for the sign of a zero that 0 was added to.
    Cost: O(nodes).
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = (
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Expand", "Slice", "Pad"),
        *("Dropout", "Concat", "Sum", "Max", "Min", "Mul", "Div", "Add", "Sub"),
    )

    def match(self, node: ir.Node) -> _Match | str | None:
        """What ``node`` can be replaced by."""
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return None
        found = _RULES.get(node.op_type, _neutral)(node, source)
        if isinstance(found, _Match) and not found.op_type and _is_stuck(node, found.source):
            return None
        return found

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write what is left."""
        where, result = node.name or node.op_type, node.outputs[0]
        if match.op_type:
            substitute(rewriter, result, match.op_type, match.inputs, match.attributes)
        else:
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            if before is not None and match.source not in node.inputs:
                node.replace_input_with(0, match.source)
                _drop_unread(rewriter, before)
            rewriter.replace_uses(result, match.source)
            rewriter.remove([node])
        rewriter.record(self.name, where, match.why)


def _drop_unread(rewriter: Rewriter, node: ir.Node) -> None:
    if not any(v.uses() or v.is_graph_output() for v in node.outputs):
        rewriter.remove([node])


def _is_stuck(node: ir.Node, source: ir.Value) -> bool:
    """Whether removing ``node`` would cost an Identity, which carries its output's name."""
    producer = source.producer()
    fixed = source.is_graph_output() or producer is None or producer.graph is not node.graph
    return node.outputs[0].is_graph_output() and (fixed or len(source.uses()) > 1)


def _nothing(source: ir.Value, node: ir.Node) -> _Match:
    return _Match(source, f"{node.op_type} changes nothing")


def _transpose(node: ir.Node, source: ir.Value) -> _Match | None:
    perm = _permutation(node)
    if perm is not None and perm == tuple(range(len(perm))):
        return _nothing(source, node)
    inner = source.producer()
    if inner is None or not is_op(inner, "Transpose") or inner.inputs[0] is None:
        return None
    first = _permutation(inner)
    if first is None or perm is None or len(first) != len(perm):
        return None
    both = tuple(first[i] for i in perm)
    why = "two transpositions merged"
    if both == tuple(range(len(both))):
        return _Match(inner.inputs[0], why)
    return _Match(inner.inputs[0], why, "Transpose", (inner.inputs[0],), {"perm": list(both)})


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    perm = attribute(node, "perm", None)
    if perm is not None:
        return tuple(perm)
    rank = rank_of(node.inputs[0])
    return None if rank is None else tuple(reversed(range(rank)))


def _reshape(node: ir.Node, source: ir.Value) -> _Match | str | None:
    array = constant(node.inputs[1])
    if array is None or array.ndim != 1:
        return None
    target, zeros = array.tolist(), not attribute(node, "allowzero", 0)
    if _is_shape_of(source, target, zeros):
        return _nothing(source, node)
    inner = source.producer()
    if inner is None or not is_op(inner, *_PLAIN) or inner.inputs[0] is None:
        return None
    origin = inner.inputs[0]
    copied = [i for i, t in enumerate(target) if t == 0 and zeros]
    if not all(_kept(origin, source, i) for i in copied):
        return "it copies a dim of the shape in between"
    attributes = {} if zeros else {"allowzero": 1}
    why = f"{inner.op_type} and Reshape merged"
    if _is_shape_of(origin, target, zeros):
        return _Match(origin, why)
    return _Match(origin, why, "Reshape", (origin, node.inputs[1]), attributes)


def _is_shape_of(value: ir.Value, target: list[int], zeros: bool) -> bool:
    """Whether reshaping ``value`` to ``target``, as far as that is possible, changes nothing."""
    if value.shape is None or len(target) != len(value.shape) or target.count(-1) > 1:
        return False
    pairs = zip(target, value.shape, strict=True)
    return all(t == d or t == -1 or (t == 0 and zeros) for t, d in pairs)


def _kept(origin: ir.Value, source: ir.Value, axis: int) -> bool:
    if origin.shape is None or source.shape is None or axis >= min(len(origin.shape), len(source.shape)):
        return False
    return same_dim(origin.shape[axis], source.shape[axis])


def _flatten(node: ir.Node, source: ir.Value) -> _Match | None:
    return _nothing(source, node) if rank_of(source) == 2 and attribute(node, "axis", 1) in (1, -1) else None


def _squeeze(node: ir.Node, source: ir.Value) -> _Match | None:
    """Squeeze and Unsqueeze of the same axes, in either order: both count them in the larger rank."""
    inner, other = source.producer(), "Unsqueeze" if node.op_type == "Squeeze" else "Squeeze"
    if inner is None or not is_op(inner, other) or inner.inputs[0] is None:
        return None
    axes = [constant(n.inputs[1]) if len(n.inputs) > 1 else None for n in (node, inner)]
    if any(a is None for a in axes):
        return None
    first, second = (sorted(a.reshape(-1).tolist()) for a in axes if a is not None)
    return _Match(inner.inputs[0], f"{other} and {node.op_type} undo each other") if first == second else None


def _cast(node: ir.Node, source: ir.Value) -> _Match | None:
    to = ir.DataType(int(attribute(node, "to", 0)))
    if source.dtype == to:
        return _nothing(source, node)
    inner = source.producer()
    origin = inner.inputs[0] if inner is not None and is_op(inner, "Cast") else None
    if (
        origin is None
        or origin.dtype is None
        or source.dtype is None
        or source.dtype not in _KEPT.get(origin.dtype, ())
    ):
        return None
    if to not in _KEPT and to is not ir.DataType.INT64 and to is not ir.DataType.DOUBLE:
        return None
    through_float = source.dtype.is_floating_point() and not to.is_floating_point()
    if through_float and to != origin.dtype and to not in _KEPT[origin.dtype]:
        return None  # out of range, the runtime may answer differently for either type
    if to == origin.dtype:
        return _Match(origin, "two casts undo each other")
    return _Match(origin, "two casts merged", "Cast", (origin,), {"to": int(to)})


def _expand(node: ir.Node, source: ir.Value) -> _Match | None:
    array = constant(node.inputs[1])
    if array is None or array.ndim != 1 or source.shape is None or array.size > len(source.shape):
        return None
    aligned = source.shape[len(source.shape) - array.size :]
    fits = all(t == 1 or t == d for t, d in zip(array.tolist(), aligned, strict=True))
    return _nothing(source, node) if fits else None


def _slice(node: ir.Node, source: ir.Value) -> _Match | None:
    parts = [node.inputs[i] if i < len(node.inputs) else None for i in range(1, 5)]
    arrays = [constant(v) for v in parts]
    computed = any(v is not None and a is None for v, a in zip(parts, arrays, strict=True))
    if source.shape is None or computed or arrays[0] is None or arrays[1] is None:
        return None
    starts, ends, axes, steps = ([] if a is None else a.reshape(-1).tolist() for a in arrays)
    if any(starts) or any(s != 1 for s in steps):
        return None
    for end, axis in zip(ends, axes or range(len(ends)), strict=True):
        size = source.shape[axis]
        if end < (size if isinstance(size, int) else _OPEN_END):
            return None
    return _nothing(source, node)


def _pad(node: ir.Node, source: ir.Value) -> _Match | None:
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return _nothing(source, node) if sizes is not None and sizes.size and not sizes.any() else None


def _dropout(node: ir.Node, source: ir.Value) -> _Match | None:
    masked = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    return None if masked or is_fenced(node) else _nothing(source, node)


def _neutral(node: ir.Node, source: ir.Value) -> _Match | None:
    """Operators of one input, and arithmetic with the number that does nothing."""
    if node.op_type in ("Concat", "Sum", "Max", "Min"):
        return _nothing(source, node) if len(node.inputs) == 1 else None
    number = 0.0 if node.op_type in ("Add", "Sub") else 1.0
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type in ("Add", "Mul"):
        pairs.append((node.inputs[1], node.inputs[0]))
    for kept, other in pairs:
        if kept is not None and constant(other) is not None and scalar(other, rank_of(kept)) == number:
            return _nothing(kept, node)
    return None


_RULES: dict[str, Callable[[ir.Node, ir.Value], _Match | str | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Cast": _cast,
    "Expand": _expand,
    "Slice": _slice,
    "Pad": _pad,
    "Dropout": _dropout,
}
