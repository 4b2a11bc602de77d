"""Operators that only give a tensor another shape, and what commutes with them."""

from __future__ import annotations

from math import prod
from typing import Any

import onnx_ir as ir

from lamina.passes.fold.graph import attribute, constant, is_op, rank_of
from lamina.passes.fold.heads import same_dim

PLAIN: tuple[str, ...] = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
VIEWS: tuple[str, ...] = (*PLAIN, "Transpose", "Gather")

_ELEMENTWISE = frozenset(
    {
        *(
            "Abs",
            "Neg",
            "Sign",
            "Floor",
            "Ceil",
            "Round",
            "Not",
            "Cast",
            "Clip",
            "Reciprocal",
            "Sqrt",
            "Exp",
            "Log",
        ),
        *(
            "Relu",
            "LeakyRelu",
            "ThresholdedRelu",
            "Elu",
            "Selu",
            "Celu",
            "Gelu",
            "Mish",
            "Softplus",
            "Softsign",
        ),
        *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Sin", "Cos"),
    }
)
_WITH_NUMBER = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"})


def sizes(value: ir.Value | None) -> list[int] | None:
    """The dims of ``value`` where every one is known."""
    if value is None or value.shape is None:
        return None
    dims = [d for d in value.shape if isinstance(d, int)]
    return dims if len(dims) == len(value.shape) else None


def order_of(node: ir.Node) -> tuple[int, ...] | None:
    """The permutation of a Transpose, stated or implied by a known rank."""
    perm = attribute(node, "perm", None)
    if perm is not None:
        return tuple(perm)
    rank = rank_of(node.inputs[0])
    return None if rank is None else tuple(reversed(range(rank)))


def keeps_order(perm: tuple[int, ...], value: ir.Value | None) -> bool:
    """Whether a permutation of ``value`` moves only dims that are certainly 1."""
    if value is None or value.shape is None or len(value.shape) != len(perm):
        return False
    moved = [i for i in perm if value.shape[i] != 1]
    return moved == sorted(moved)


def is_view(node: ir.Node | None) -> bool:
    """Whether the result has the elements of the first input in their order, whatever its shape.

    Reshape, Flatten, Squeeze, Unsqueeze; a Transpose that moves only dims of 1; a Gather of the only slice.
    """
    if node is None or not is_op(node, *VIEWS) or node.inputs[0] is None:
        return False
    if node.op_type == "Transpose":
        perm = order_of(node)
        return perm is not None and keeps_order(perm, node.inputs[0])
    if node.op_type == "Gather":
        shape, indices = node.inputs[0].shape, constant(node.inputs[1])
        if shape is None or indices is None or indices.size != 1 or not len(shape):
            return False
        return bool(shape[attribute(node, "axis", 0)] == 1 and indices.reshape(-1)[0] in (0, -1))
    # Shapes that callers may override are inferred from their defaults, which need not be what comes.
    return all(v is None or constant(v) is not None for v in node.inputs[1:])


def is_elementwise(node: ir.Node, value: ir.Value, ranks: tuple[int | None, ...]) -> bool:
    """Whether ``node`` maps each element of ``value`` by itself: a function, or arithmetic with one number.

    The number must not raise any of ``ranks`` by broadcasting.
    """
    if len(node.outputs) != 1:
        return False
    if is_op(node, *_ELEMENTWISE):
        return node.inputs[0] is value and sum(v is value for v in node.inputs) == 1
    if not is_op(node, *_WITH_NUMBER) or len(node.inputs) != 2:
        return False
    if node.op_type == "PRelu" and node.inputs[0] is not value:
        return False
    others = [v for v in node.inputs if v is not value]
    number = constant(others[0]) if len(others) == 1 else None
    if number is None or number.size != 1:
        return False
    return all(r is not None and number.ndim <= r for r in ranks)


def reshape_target(source: ir.Value, shape: Any) -> list[int] | None:
    """What a Reshape of ``source`` must be told to give ``shape``; None where constants cannot say it.

    One dim may be unknown, or several that ``source`` has in the same places. Both at once would break on
    empty tensors: with a 0 in the shape, -1 has no value.
    """
    if shape is None:
        return None
    dims = list(shape)
    unknown = [i for i, d in enumerate(dims) if not isinstance(d, int)]
    if any(isinstance(d, int) and d < 1 for d in dims):
        return None
    if len(unknown) <= 1:
        return [d if isinstance(d, int) else -1 for d in dims]
    have = source.shape
    if have is None or any(i >= len(have) or not same_dim(have[i], dims[i]) for i in unknown):
        return None
    return [d if isinstance(d, int) else 0 for d in dims]


def same_shape(first: ir.Value, shape: Any) -> bool:
    """Whether a value certainly has ``shape``."""
    if first.shape is None or shape is None or len(first.shape) != len(shape):
        return False
    return all(same_dim(a, b) for a, b in zip(first.shape, shape, strict=True))


def axis_in(old: list[int], axis: int, new: list[int]) -> int | None:
    """The axis of ``new`` that holds what ``axis`` of ``old`` does: both list dims of the same elements."""
    before = prod(old[:axis])
    for i, size in enumerate(new):
        if size == old[axis] and prod(new[:i]) == before and 0 not in new:
            return i
    return None


def viewed_shape(node: ir.Node) -> list[Any] | None:
    """What a view makes of its input's shape, by the operator's rules; None where that is not known.

    For outputs of the model: what those declare of themselves need not be true.
    """
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims, rank = list(source.shape), len(source.shape)
    numbers = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Transpose":
        return [dims[i] for i in order_of(node) or ()]
    if node.op_type == "Flatten":
        axis = attribute(node, "axis", 1)
        known = sizes(source)
        axis = axis + rank if axis < 0 else axis
        return None if known is None else [prod(known[:axis]), prod(known[axis:])]
    if numbers is None:
        return None
    if node.op_type == "Gather":
        axis = attribute(node, "axis", 0) % rank
        return [*dims[:axis], *numbers.shape, *dims[axis + 1 :]]
    if node.op_type == "Reshape":
        return _reshaped(dims, sizes(source), numbers.tolist(), bool(attribute(node, "allowzero", 0)))
    if node.op_type == "Squeeze":
        gone = {a % rank for a in numbers.reshape(-1).tolist()}
        return [d for i, d in enumerate(dims) if i not in gone]
    new = {a % (rank + numbers.size) for a in numbers.reshape(-1).tolist()}
    left = iter(dims)
    return [1 if i in new else next(left) for i in range(rank + numbers.size)]


def _reshaped(
    dims: list[Any], known: list[int] | None, target: list[int], plain_zero: bool
) -> list[Any] | None:
    found = [dims[i] if t == 0 and not plain_zero else t for i, t in enumerate(target)]
    rest = [d for d in found if d != -1]
    if -1 not in target:
        return found
    if known is None or not all(isinstance(d, int) and d > 0 for d in rest):
        return [ir.SymbolicDim(None) if d == -1 else d for d in found]
    return [prod(known) // prod(rest) if d == -1 else d for d in found]
