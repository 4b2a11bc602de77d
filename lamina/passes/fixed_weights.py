"""Linear operators whose weight cannot be refitted without losing its form: it is made from constants."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lamina.analysis.operators import WeightedOperator, convolution
from lamina.ir.program import Program
from lamina.ir.shapes import Observed

_DECODING = ("Cast", "Mul")


def fixed_operators(program: Program, shapes: Mapping[str, Observed]) -> dict[str, WeightedOperator]:
    """The node that gives each one's float output -> how it reads, in execution order.

    MatMul, Gemm and Conv whose weight is dequantized, cast or scaled from constants, and MatMulInteger with
    the Cast and the Mul behind it. What they read is the float value before its quantization.

    Args:
        program: The program.
        shapes: Of its values for some feeds.
    """
    constant = set(program.graph.initializers.values())
    found: dict[str, WeightedOperator] = {}
    for node in program.graph:
        if node.inputs and all(v is None or v in constant for v in node.inputs):
            constant.update(node.outputs)
            continue
        if node.domain or len(node.inputs) < 2:
            continue
        read, weight = node.inputs[0], node.inputs[1]
        if read is None or weight is None or weight not in constant or weight.name not in shapes:
            continue
        if node.op_type in ("MatMul", "Gemm", "Conv") and not weight.is_initializer():
            made = _float(node, read, weight, shapes)
        elif node.op_type == "MatMulInteger":
            made = _integer(node, read, weight, shapes)
        else:
            continue
        if made is not None:
            found[made.name] = made
    return found


def _float(
    node: ir.Node, read: ir.Value, weight: ir.Value, shapes: Mapping[str, Observed]
) -> WeightedOperator | None:
    shape = shapes[weight.name or ""][0]
    source = _before(read, "DequantizeLinear", "QuantizeLinear")
    if node.op_type == "Conv":
        return convolution(node, source, shape, shapes)
    if len(shape) != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    flipped = node.attributes.get_int("transB", 0) == 0
    kind = node.op_type.lower()
    return WeightedOperator(node.name or "", kind, source.name or "", weight.name or "", flipped)


def _integer(
    node: ir.Node, read: ir.Value, weight: ir.Value, shapes: Mapping[str, Observed]
) -> WeightedOperator | None:
    source = _before(read, "DynamicQuantizeLinear")
    if source is read or len(shapes[weight.name or ""][0]) != 2:
        return None
    last = node
    for _ in range(3):  # Cast, and one or two factors
        uses = last.outputs[0].uses()
        after = next(iter(uses)).node if len(uses) == 1 else None
        if after is None or after.op_type not in _DECODING:
            break
        last = after
    if last.op_type != "Mul":
        return None
    return WeightedOperator(last.name or "", "matmul", source.name or "", weight.name or "", True)


def _before(value: ir.Value, *op_types: str) -> ir.Value:
    """What entered a chain of operators that ends in ``value``; ``value`` where there is no such chain."""
    found = value
    for op_type in op_types:
        maker = found.producer()
        if maker is None or maker.op_type != op_type or maker.inputs[0] is None:
            return value
        found = maker.inputs[0]
    return found
