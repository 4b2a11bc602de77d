"""Operators without weights between quantized ones: in integers too, so that int8 flows through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.activations import saturates
from lamina.passes.quantize.graph import FLOAT, attributes, dequantize, quantize, quantize_dequantize, scalar

MOVERS = ("MaxPool", "Pad")


def emit_carrier(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """Add, Concat, average pooling: float between conversions. MaxPool, Pad: on the integers themselves."""
    node, parameters = nodes[site.nodes[0]], option.parameters
    if node.op_type in MOVERS:
        return _emit_mover(site, parameters, rewriter, node)
    inputs = []
    for i, (value, given) in enumerate(zip(node.inputs, parameters["inputs"], strict=False)):
        assert value is not None
        inputs.append(quantize_dequantize(rewriter, value, given, f"{site.name}.input{i}"))
    name = f"{site.name}.{site.kind}"
    if site.kind == "mean":
        # the runtime has an integer GlobalAveragePool, and no integer ReduceMean
        y = rewriter.op("GlobalAveragePool", inputs, name=name, dtype=FLOAT)
        y = quantize_dequantize(rewriter, y, parameters["output"], f"{site.name}.output")
        if node.attributes.get_int("keepdims", 1):
            return y
        return rewriter.op("Flatten", [y], {"axis": 1}, name=f"{site.name}.flatten", dtype=FLOAT)
    y = rewriter.op(node.op_type, inputs, attributes(node), name=name, dtype=FLOAT)
    if len(site.nodes) > 1 and not saturates(nodes[site.nodes[1]], parameters["output"]):
        last = nodes[site.nodes[1]]
        y = quantize_dequantize(rewriter, y, parameters["output"], f"{site.name}.before")
        rest = [y, *last.inputs[1:]]
        y = rewriter.op(last.op_type, rest, attributes(last), name=f"{site.name}.activation", dtype=FLOAT)
    return quantize_dequantize(rewriter, y, parameters["output"], f"{site.name}.output")


def _emit_mover(site: Site, parameters: Mapping[str, Any], rewriter: Rewriter, node: ir.Node) -> ir.Value:
    """The same operator on integers: order is kept, and the zero point stands for zero."""
    value, given = node.inputs[0], parameters["inputs"][0]
    assert value is not None
    codes, scale, zero = quantize(rewriter, value, given, f"{site.name}.input")
    inputs: list[ir.Value | None] = [codes]
    if node.op_type == "Pad":
        fill = scalar(rewriter, given["zero_point"], np.uint8, f"{site.name}.fill")
        inputs += [node.inputs[1], fill, *node.inputs[3:]]
    name, kind = f"{site.name}.{site.kind}", ir.DataType.UINT8
    moved = rewriter.op(node.op_type, inputs, attributes(node), name=name, dtype=kind)
    moved.shape = node.outputs[0].shape
    return dequantize(rewriter, moved, scale, zero, f"{site.name}.output")
