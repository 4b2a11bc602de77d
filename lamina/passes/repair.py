"""Repairs: weights of a changed program that are replaced by fitted ones, as data that a plan carries."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import remove_unused_initializers

# Where a repair of a node without a bias goes: an addition of its own behind it.
BEHIND = -1
_KINDS = ("float32", "float64", "float16")


@dataclass(frozen=True)
class Repair:
    """One operand of one node, fitted anew.

    Attributes:
        node: Name of the node in the program the plan's moves leave.
        operand: Which of its inputs is replaced, or :data:`BEHIND`: what is added to its first output.
        array: :func:`packed` weights, in the shape and dtype the program stores them.
    """

    node: str
    operand: int
    array: Mapping[str, Any]


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON values, bit for bit: dtype, shape, base64 of its little-endian bytes.

    Raises:
        PassError: The dtype is not float16, float32 or float64.
    """
    if array.dtype.name not in _KINDS:
        raise PassError(f"weights of {array.dtype.name} cannot be kept in a plan", advice="use float32")
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(raw).decode("ascii"),
    }


def unpacked(data: Mapping[str, Any]) -> np.ndarray:
    """What :func:`packed` was given.

    Raises:
        PassError: The data is not what :func:`packed` makes.
    """
    try:
        kind = np.dtype(data["dtype"]).newbyteorder("<")
        flat = np.frombuffer(base64.b64decode(data["base64"], validate=True), kind)
        return flat.reshape(data["shape"]).astype(_KINDS[_KINDS.index(data["dtype"])])
    except (KeyError, TypeError, ValueError) as error:
        raise PassError(f"packed weights cannot be read: {error}", advice="the plan is damaged") from error


def apply_repairs(program: Program, repairs: Sequence[Repair]) -> Program:
    """The program with fitted weights, on a clone; weights nobody reads any more leave.

    A weight that other nodes read too stays as it is for them.

    Raises:
        PassError: A node is missing, or reads something of another shape or dtype there.
    """
    if not repairs:
        return program
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    unread = frozenset(n for n, v in program.graph.initializers.items() if not v.uses())
    for repair in repairs:
        put(rewriter, repair.node, repair.operand, unpacked(repair.array))
    remove_unused_initializers(clone.model, keep=unread)
    return clone


def put(rewriter: Rewriter, name: str, operand: int, array: np.ndarray) -> ir.Value:
    """Give a node an operand of its own, in place; returns it. What it had stays, for others or unread.

    Raises:
        PassError: The node is missing, or reads something of another shape or dtype there.
    """
    node = rewriter.node(name)
    if operand == BEHIND:
        return _shift_behind(node, array, rewriter)
    if operand >= len(node.inputs) or node.inputs[operand] is None:
        if node.op_type not in ("Gemm", "Conv") or operand != 2:
            raise PassError(
                f"operand {operand} of '{name}' does not exist", advice="the plan was made for another model"
            )
        if len(node.inputs) == 2:
            node.resize_inputs(3)
        fresh = rewriter.constant(array, f"{name}_bias")
        node.replace_input_with(2, fresh)
        return fresh
    old = node.inputs[operand]
    tensor = None if old is None else old.const_value
    if old is None or tensor is None:
        raise PassError(
            f"operand {operand} of '{name}' is no weight",
            advice="the plan was made for another model",
        )
    if tuple(tensor.shape.numpy()) != array.shape or tensor.dtype.numpy() != array.dtype:
        raise PassError(
            f"weight '{old.name}' is {tensor.dtype.name} {list(tensor.shape.numpy())}, "
            f"the repair {array.dtype.name} {list(array.shape)}",
            where=f"node '{name}'",
            advice="the plan was made for another model",
        )
    fresh = rewriter.constant(array, f"{old.name}_refit")
    node.replace_input_with(operand, fresh)
    return fresh


def _shift_behind(node: ir.Node, array: np.ndarray, rewriter: Rewriter) -> ir.Value:
    """``y + array`` for everybody who read y; returns what holds the array."""
    bias = rewriter.constant(array, f"{node.name}_bias")
    add_behind(node, lambda: bias, rewriter, f"{node.name}_shifted")
    return bias


def add_behind(node: ir.Node, build: Callable[[], ir.Value], rewriter: Rewriter, name: str) -> None:
    """The node's first output and what ``build`` makes, summed, for everybody who read the output."""
    value = node.outputs[0]
    after = next((n for n in rewriter.graph if any(v is value for v in n.inputs)), None)
    rewriter.at(after)
    term = build()
    added = rewriter.op("Add", [value, term], name=name, dtype=value.dtype, shape=value.shape)
    rewriter.at(None)
    maker, shown = added.producer(), value.is_graph_output()
    rewriter.replace_uses(value, added, keep=() if maker is None else (maker,))
    if not shown:  # later repairs know it by the name it had
        known, value.name = value.name, rewriter.fresh(f"{value.name}_unshifted")
        added.name = known
