"""Remove a Relu whose input cannot be negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, constant, is_op
from lamina.passes.pass_ import Effect, Exact, Fold

_ALWAYS = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Sqrt"})
_POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceSum")
_MOVES = ("Slice", "Split", "Gather", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand")
_IF_FIRST = frozenset(_POOLS + _REDUCTIONS + _MOVES + ("Identity",))
_IF_ALL = frozenset({"Add", "Sum", "Mul", "Concat", "Max"})


@dataclass(frozen=True)
class DropRedundantRelu(Fold):
    """Replace Relu(x) by x where x is provably >= 0 (or NaN, which Relu passes on).

    Non-negative are: outputs of Relu, Sigmoid, Softmax, Clip with min >= 0, DequantizeLinear with the zero
    point at the bottom of its range; and sums, products, poolings, slices, zero paddings and
    concatenations of such.

    Refuses: anything it cannot show; a Relu that leads from one interface tensor to another.
    Effect: Exact, but for the sign of a zero that Clip let through.
    Cost: O(nodes), one forward sweep.
    """

    effect: ClassVar[Effect] = Exact()

    def idle(self, model: ir.Model) -> bool:
        """Whether there is no Relu."""
        return not any(n.op_type == "Relu" for n in model.graph)

    def apply(self, rewriter: Rewriter) -> None:
        """Sweep forward, knowing for each value passed whether it can be negative."""
        known: set[ir.Value] = set()
        for node in list(rewriter.graph):
            if is_op(node, "Relu") and node.inputs[0] in known:
                self._drop(node, rewriter)
            elif _non_negative(node, known):
                known.update(node.outputs)

    def _drop(self, node: ir.Node, rewriter: Rewriter) -> None:
        source, where = node.inputs[0], node.name or "Relu"
        if source is None or (source.is_graph_output() and node.outputs[0].is_graph_output()):
            return
        rewriter.replace_uses(node.outputs[0], source)
        rewriter.remove([node])
        rewriter.record(self.name, where, "its input is never negative")


def _non_negative(node: ir.Node, known: set[ir.Value]) -> bool:
    if not is_op(node, node.op_type) or not node.inputs:
        return False
    if node.op_type in _ALWAYS:
        return True
    first = node.inputs[0]
    if node.op_type in _IF_FIRST:
        return first in known
    if node.op_type in _IF_ALL:
        return all(v in known for v in node.inputs)
    if node.op_type == "Clip":
        return _at_least_zero(node, 1)
    if node.op_type == "Pad":
        padded = attribute(node, "mode", "constant") == "constant" and len(node.inputs) > 2
        return first in known and (not padded or node.inputs[2] is None or _at_least_zero(node, 2))
    return node.op_type == "DequantizeLinear" and _from_the_bottom(node)


def _at_least_zero(node: ir.Node, index: int) -> bool:
    array = constant(node.inputs[index]) if len(node.inputs) > index else None
    return array is not None and bool((array >= 0).all())


def _from_the_bottom(node: ir.Node) -> bool:
    scale = constant(node.inputs[1])
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or not (scale > 0).all():
        return False
    source = node.inputs[0]
    if point is None:
        return source is not None and source.dtype in (ir.DataType.UINT8, ir.DataType.UINT16)
    zero = constant(point)
    bottoms = {ir.DataType.UINT8: 0, ir.DataType.INT8: -128, ir.DataType.UINT16: 0}
    bottom = None if point.dtype is None else bottoms.get(point.dtype)
    return zero is not None and bottom is not None and bool((zero == bottom).all())
