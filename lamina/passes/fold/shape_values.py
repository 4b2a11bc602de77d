"""What is certain about values that shapes are computed with: numbers, and dims of other values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.passes.fold.graph import attribute, constant, is_op
from lamina.passes.fold.heads import same_dim

_LONGEST = 64  # elements; longer vectors are data, not shapes
_LIMITS = {ir.DataType.INT64: 2**63, ir.DataType.INT32: 2**31}
_KINDS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclass(frozen=True, eq=False)
class Dim:
    """The size of ``value`` along ``axis``: not known, and never negative."""

    value: ir.Value
    axis: int

    def is_dim_of(self, value: ir.Value, axis: int) -> bool:
        """Whether it certainly is the size of ``value`` along ``axis``."""
        if value is self.value and axis == self.axis:
            return True
        if value.shape is None or self.value.shape is None or axis >= len(value.shape):
            return False
        dim = value.shape[axis]
        made_up = not isinstance(dim, int) and str(dim.value).startswith("unk__")
        return not made_up and same_dim(dim, self.value.shape[self.axis])


Entry = int | Dim | None


@dataclass(frozen=True)
class Known:
    """The entries of a scalar or vector, as far as they are certain."""

    entries: tuple[Entry, ...]
    is_scalar: bool = False

    def numbers(self) -> list[int] | None:
        """The entries where all are numbers."""
        found = [e for e in self.entries if isinstance(e, int)]
        return found if len(found) == len(self.entries) else None


class ShapeValues:
    """Partial evaluation of one graph, node by node in its order."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Known | None] = {}

    def of(self, value: ir.Value | None) -> Known | None:
        """What is known about ``value``."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = _content(value)
        return self._known[value]

    def visit(self, node: ir.Node) -> Known | None:
        """Learn what ``node`` computes."""
        rule = _RULES.get(node.op_type) if is_op(node, node.op_type) else None
        if rule is None or not node.outputs or node.outputs[0].dtype not in _KINDS:
            return None
        found = rule(node, self)
        if found is not None and _fits(found, node.outputs[0].dtype):
            self._known[node.outputs[0]] = found
            return found
        return None


def _fits(known: Known, dtype: ir.DataType | None) -> bool:
    limit = _LIMITS.get(dtype, 2) if dtype is not None else 2
    small = all(not isinstance(e, int) or -limit <= e < limit for e in known.entries)
    return small and len(known.entries) <= _LONGEST


def _content(value: ir.Value) -> Known | None:
    """The content of a small constant."""
    if value.dtype not in _KINDS or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is not None and (len(tensor.shape) > 1 or tensor.size > _LONGEST):
        return None
    array = constant(value)
    if array is None or array.ndim > 1 or array.size > _LONGEST:
        return None
    return Known(tuple(int(e) for e in array.reshape(-1)), array.ndim == 0)


def _shape(node: ir.Node, values: ShapeValues) -> Known | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    entries: list[Entry] = [d if isinstance(d, int) else Dim(source, i) for i, d in enumerate(source.shape)]
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return Known(tuple(entries[start:end]))


def _size(node: ir.Node, values: ShapeValues) -> Known | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims = [d for d in source.shape if isinstance(d, int)]
    return Known((prod(dims),), True) if len(dims) == len(source.shape) else None


def _gather(node: ir.Node, values: ShapeValues) -> Known | None:
    data, picks = values.of(node.inputs[0]), values.of(node.inputs[1])
    at = None if picks is None else picks.numbers()
    if (
        data is None
        or picks is None
        or at is None
        or data.is_scalar
        or attribute(node, "axis", 0) not in (0, -1)
    ):
        return None
    length = len(data.entries)
    if any(not -length <= i < length for i in at):
        return None
    return Known(tuple(data.entries[i] for i in at), picks.is_scalar)


def _slice(node: ir.Node, values: ShapeValues) -> Known | None:
    data, parts = values.of(node.inputs[0]), [values.of(v) for v in node.inputs[1:]]
    if data is None or data.is_scalar or len(parts) < 2:
        return None
    numbers = [None if p is None else p.numbers() for p in parts]
    given = [v is not None for v in node.inputs[1:]]
    if any(g and (n is None or len(n) != 1) for g, n in zip(given, numbers, strict=True)):
        return None
    start, end = (n[0] if n is not None else None for n in numbers[:2])
    step = numbers[3][0] if len(numbers) > 3 and numbers[3] is not None else 1
    if start is None or end is None or step < 1:
        return None
    return Known(data.entries[start:end:step])


def _concat(node: ir.Node, values: ShapeValues) -> Known | None:
    parts = [values.of(v) for v in node.inputs]
    entries: list[Entry] = []
    for value, part in zip(node.inputs, parts, strict=True):
        if part is None:
            length = _length(value)
            if length is None:
                return None
            entries += [None] * length
        else:
            entries += part.entries
    return Known(tuple(entries))


def _length(value: ir.Value | None) -> int | None:
    """The length of a vector of which nothing else is known."""
    if value is None or value.shape is None or len(value.shape) != 1:
        return None
    dim = value.shape[0]
    return dim if isinstance(dim, int) and dim <= _LONGEST else None


def _unsqueeze(node: ir.Node, values: ShapeValues) -> Known | None:
    data, axes = values.of(node.inputs[0]), values.of(node.inputs[1]) if len(node.inputs) > 1 else None
    if data is None or axes is None or not data.is_scalar or axes.numbers() not in ([0], [-1]):
        return None
    return Known(data.entries)


def _squeeze(node: ir.Node, values: ShapeValues) -> Known | None:
    data = values.of(node.inputs[0])
    return Known(data.entries, True) if data is not None and len(data.entries) == 1 else None


def _reshape(node: ir.Node, values: ShapeValues) -> Known | None:
    data, target = values.of(node.inputs[0]), values.of(node.inputs[1])
    shape = None if target is None else target.numbers()
    if data is None or shape is None:
        return None
    if not shape and len(data.entries) == 1:
        return Known(data.entries, True)
    return Known(data.entries) if shape in ([-1], [len(data.entries)]) and data.entries else None


def _same(node: ir.Node, values: ShapeValues) -> Known | None:
    return values.of(node.inputs[0])


def _cast(node: ir.Node, values: ShapeValues) -> Known | None:
    data, source = values.of(node.inputs[0]), node.inputs[0]
    to_bool = attribute(node, "to", 0) == ir.DataType.BOOL
    if data is None or source is None or source.dtype not in _KINDS:
        return None
    if to_bool and data.numbers() is None:
        return None
    return Known(tuple(int(bool(e)) if to_bool else e for e in data.entries), data.is_scalar)


def _constant_of_shape(node: ir.Node, values: ShapeValues) -> Known | None:
    target, tensor = values.of(node.inputs[0]), attribute(node, "value", None)
    shape = None if target is None else target.numbers()
    if shape is None or len(shape) != 1 or not 0 <= shape[0] <= _LONGEST:
        return None
    array = None if tensor is None else tensor.numpy()
    if array is None or array.dtype.kind not in "ib" or array.size != 1:
        return None
    return Known((int(array.reshape(())),) * shape[0])


def _product(node: ir.Node, values: ShapeValues) -> Known | None:
    data = values.of(node.inputs[0])
    numbers = None if data is None else data.numbers()
    axes = values.of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else Known((0,))
    if numbers is None or data is None or data.is_scalar or "axes" in node.attributes or axes is None:
        return None
    if axes.numbers() not in ([0], [-1]):
        return None
    return Known((prod(numbers),), is_scalar=not attribute(node, "keepdims", 1))


def _where(node: ir.Node, values: ShapeValues) -> Known | None:
    return _each(node, values, lambda c, a, b: None if not isinstance(c, int) else (a if c else b))


def _each(node: ir.Node, values: ShapeValues, function: Callable[..., Entry]) -> Known | None:
    """Apply ``function`` to the entries of all inputs, broadcast."""
    operands = [values.of(v) for v in node.inputs]
    known = [o for o in operands if o is not None]
    if len(known) < len(operands) or any(not o.entries for o in known):
        return None
    length = max(len(o.entries) for o in known)
    if any(len(o.entries) not in (1, length) for o in known):
        return None
    columns = [o.entries * (length if len(o.entries) == 1 else 1) for o in known]
    entries = tuple(function(*row) for row in zip(*columns, strict=True))
    return Known(entries, all(o.is_scalar for o in known))


def _arithmetic(function: Callable[[int, int], int | None], neutral: int | None, both_ways: bool) -> Any:
    def entry(a: Entry, b: Entry) -> Entry:
        if isinstance(a, int) and isinstance(b, int):
            return function(a, b)
        if neutral is not None and isinstance(b, int) and b == neutral:
            return a
        return b if neutral is not None and both_ways and isinstance(a, int) and a == neutral else None

    return lambda node, values: _each(node, values, entry) if len(node.inputs) == 2 else None


def _divide(a: int, b: int) -> int | None:
    return None if a < 0 or b <= 0 else a // b  # runtimes differ in how they round below zero


def _equal(a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    negative = any(isinstance(e, int) and e < 0 for e in (a, b))
    return 0 if negative and any(isinstance(e, Dim) for e in (a, b)) else None


_RULES: dict[str, Callable[[ir.Node, ShapeValues], Known | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Identity": _same,
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _product,
    "Where": _where,
    "Add": _arithmetic(lambda a, b: a + b, 0, True),
    "Sub": _arithmetic(lambda a, b: a - b, 0, False),
    "Mul": _arithmetic(lambda a, b: a * b, 1, True),
    "Div": _arithmetic(_divide, 1, False),
    "Max": _arithmetic(max, None, False),
    "Min": _arithmetic(min, None, False),
    "Equal": lambda node, values: _each(node, values, _equal),
}


def as_array(known: Known, dtype: ir.DataType) -> np.ndarray[Any, Any] | None:
    """The entries as an array of ``dtype``, where all are numbers."""
    numbers = known.numbers()
    if numbers is None:
        return None
    array = np.array(numbers, dtype.numpy())
    return array.reshape(()) if known.is_scalar else array
