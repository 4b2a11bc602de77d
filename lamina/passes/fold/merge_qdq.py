"""Remove the conversions that quantizing site by site leaves behind."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import constant, consumers, is_op, sweep
from lamina.passes.pass_ import Effect, Exact, Fold

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_SMALL = 65_536  # elements up to which a constant operand is compared by content, not by identity
_INTEGERS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65_535),
    ir.DataType.INT16: (-32_768, 32_767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
}


@dataclass(frozen=True)
class MergeQdq(Fold):
    """Merge equal conversions, undo round trips, and drop activations that the quantizer's range implies.

    Equal parameters means equal content: every site brings initializers of its own.

    Fires: Q, DQ or dynamic Q of the same value with the same parameters; Q(DQ(q)) with the same positive
    scale and zero point; Relu, or Clip with constant bounds, read only by Q whose range clamps no less.
    Refuses: parameters computed at run time; float8 and float4 targets; a Relu or Clip read by anything else.
    Effect: Exact. (n s) / s differs from n by less than 2^-7 for 16 bits, so rounding returns n.
    Cost: O(nodes) and one read of each small constant.
    """

    effect: ClassVar[Effect] = Exact()

    def apply(self, rewriter: Rewriter) -> None:
        """One sweep in topological order; what it merges upstream is seen downstream."""
        first: dict[Hashable, ir.Node] = {}
        for node in list(rewriter.graph):
            if is_op(node, "Relu", "Clip"):
                self._drop_activation(node, rewriter)
            elif is_op(node, *_CONVERSIONS) and not self._undo_round_trip(node, rewriter):
                self._merge(node, first, rewriter)

    def _drop_activation(self, node: ir.Node, rewriter: Rewriter) -> None:
        source, result, where = node.inputs[0], node.outputs[0], node.name or node.op_type
        readers = consumers(result)
        if source is None or not readers or result.is_graph_output():
            return
        if all(is_op(r, "QuantizeLinear") and r.inputs[0] is result and _implied(node, r) for r in readers):
            rewriter.replace_uses(result, source)
            rewriter.remove([node])
            rewriter.record(self.name, where, f"the quantizer's range implies this {node.op_type}")

    def _undo_round_trip(self, node: ir.Node, rewriter: Rewriter) -> bool:
        back = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node.op_type != "QuantizeLinear" or not is_op(back, "DequantizeLinear") or back is None:
            return False
        source, where = back.inputs[0], node.name or node.op_type
        if source is None or not _round_trips(back, node):
            return False
        rewriter.replace_uses(node.outputs[0], source)
        sweep(rewriter, [node])
        rewriter.record(self.name, where, "quantizes what was dequantized with the same parameters")
        return True

    def _merge(self, node: ir.Node, first: dict[Hashable, ir.Node], rewriter: Rewriter) -> None:
        signature = _signature(node)
        survivor = first.get(signature)
        # trap: undoing a round trip may have taken the survivor out of the graph
        if survivor is None or survivor.graph is None:
            first[signature] = node
            return
        where = node.name or node.op_type
        for old, new in zip(node.outputs, survivor.outputs, strict=True):
            rewriter.replace_uses(old, new)
        rewriter.remove([node])
        rewriter.record(self.name, where, f"same as '{survivor.name}'")


def _signature(node: ir.Node) -> Hashable:
    attributes = tuple(sorted((k, repr(a.value)) for k, a in node.attributes.items()))
    inputs = tuple(_content(v) for v in node.inputs)
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return node.op_type, inputs, attributes, len(node.outputs)


def _content(value: ir.Value | None) -> Hashable:
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None or tensor.size > _SMALL or value.is_graph_input():
        return id(value)
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


def _parameters(node: ir.Node) -> tuple[np.ndarray[Any, Any], Any, ir.DataType] | None:
    """Scale, zero point (0 where absent) and integer type of a QuantizeLinear or DequantizeLinear."""
    scale = constant(node.inputs[1])
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or not np.all((scale > 1e-30) & (scale < 1e30)):
        return None
    if point is None:
        integer = node.outputs[0].dtype if node.op_type == "QuantizeLinear" else node.inputs[0].dtype  # type: ignore[union-attr]
        return (scale, 0, integer) if integer in _INTEGERS else None
    zero, integer = constant(point), point.dtype
    if zero is None or integer not in _INTEGERS or integer is None:
        return None
    return scale, zero.astype(np.int64), integer


def _round_trips(back: ir.Node, node: ir.Node) -> bool:
    there, here = _parameters(node), _parameters(back)
    if there is None or here is None or there[2] is not here[2]:
        return False
    if not (np.array_equal(there[0], here[0]) and np.array_equal(there[1], here[1])):
        return False
    axis = [(n.attributes.get_int("axis", 1), n.attributes.get_int("block_size", 0)) for n in (back, node)]
    return there[0].ndim == 0 or axis[0] == axis[1]


def _implied(node: ir.Node, quantizer: ir.Node) -> bool:
    """Whether clamping first cannot change what the quantizer returns: the bounds already saturate it."""
    found = _parameters(quantizer)
    if found is None:
        return False
    scale, zero, integer = found
    low, high = _INTEGERS[integer]
    bounds = _bounds(node)
    if bounds is None:
        return False
    below, above = (np.rint(np.float32(b) / scale.astype(np.float32)) + zero for b in bounds)
    return bool(np.all(below <= low) and np.all(above >= high))


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    limits = [-np.inf, np.inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        array = constant(value)
        if array is None or array.size != 1:
            return None
        limits[i] = float(array.reshape(()))
    return limits[0], limits[1]
