"""A small residual program with random weights, its data, and its values computed directly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lamina.data import Dataset
from lamina.ir.program import Program

WIDTH = 8


def residual_program(dtype: str = "FLOAT", batch: int | str = "batch") -> Program:
    """[b, t, 8] -> x + tanh(x W); then relu of that as the output."""
    kind = ir.DataType[dtype]
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 1, (WIDTH, WIDTH)).astype(kind.numpy())
    x = ir.Value(name="x", shape=ir.Shape([batch, "tokens", WIDTH]), type=ir.TensorType(kind))
    w = ir.Value(name="w", const_value=ir.Tensor(weight, name="w"))
    w.shape, w.dtype = ir.Shape(weight.shape), kind
    matmul = ir.node("MatMul", [x, w], name="matmul")
    tanh = ir.node("Tanh", [matmul.outputs[0]], name="tanh")
    add = ir.node("Add", [x, tanh.outputs[0]], name="add")
    relu = ir.node("Relu", [add.outputs[0]], name="relu")
    for node, name in ((matmul, "hidden"), (tanh, "body"), (add, "sum"), (relu, "y")):
        node.outputs[0].name = name
    relu.outputs[0].shape, relu.outputs[0].dtype = ir.Shape([batch, "tokens", WIDTH]), kind
    graph = ir.Graph(
        [x], [relu.outputs[0]], nodes=[matmul, tanh, add, relu], initializers=[w], opset_imports={"": 18}
    )
    return Program(ir.Model(graph, ir_version=10))


def residual_data(rows: int, dtype: str = "float32", tokens: int = 5) -> Dataset:
    rng = np.random.default_rng(11)
    return Dataset({"x": rng.normal(0.2, 1.5, (rows, tokens, WIDTH)).astype(dtype)}, {}, batch_size=7)


def direct(program: Program, data: Dataset) -> dict[str, np.ndarray]:
    """Every value of :func:`residual_program`, in float64."""
    x = data.inputs["x"].astype(np.float64)
    weight = program.graph.initializers["w"].const_value
    assert weight is not None
    body = np.tanh(x @ weight.numpy().astype(np.float64))
    return {"x": x, "body": body, "sum": x + body, "y": np.maximum(x + body, 0)}
