"""Residual MLPs one after another, with random weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program

WIDTH = 16


def stacked(depth: int, width: int = WIDTH, seed: int = 6) -> Program:
    """``x + relu(x A) B``, ``depth`` times; sums are called ``add<layer>_out``."""
    random = np.random.default_rng(seed)
    x = ir.Value(name="x", shape=ir.Shape(["b", "t", width]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights, current = [], [], x
    for layer in range(depth):
        operands = []
        for part in "ab":
            array = random.normal(0, 0.2, (width, width)).astype(np.float32)
            value = ir.Value(name=f"w{part}{layer}", const_value=ir.Tensor(array, name=f"w{part}{layer}"))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
            operands.append(value)
        weights += operands
        up = ir.node("MatMul", [current, operands[0]], name=f"up{layer}")
        relu = ir.node("Relu", [up.outputs[0]], name=f"relu{layer}")
        down = ir.node("MatMul", [relu.outputs[0], operands[1]], name=f"down{layer}")
        add = ir.node("Add", [current, down.outputs[0]], name=f"add{layer}")
        for node in (up, relu, down, add):
            node.outputs[0].name = f"{node.name}_out"
            node.outputs[0].shape, node.outputs[0].dtype = x.shape, ir.DataType.FLOAT
        nodes += [up, relu, down, add]
        current = add.outputs[0]
    graph = ir.Graph([x], [current], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="stack")
    example = {"x": random.normal(size=(2, 4, width)).astype(np.float32)}
    return Program(ir.Model(graph, ir_version=10), example=example)
