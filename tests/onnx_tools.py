"""Small ONNX models with random weights, and running them with every optimization off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper


def proto(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: Mapping[str, Sequence[int | str | None]],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from nodes, float interface shapes and weights."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def mlp(width: int = 8, *, seed: int = 0, opset: int = 18) -> onnx.ModelProto:
    """``y = x + W2 relu(W1 x + b1)``, batch dynamic."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((width, 2 * width)).astype(np.float32),
        "b1": rng.standard_normal(2 * width).astype(np.float32),
        "w2": rng.standard_normal((2 * width, width)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"], "up"),
        helper.make_node("Add", ["h1", "b1"], ["h2"], "bias"),
        helper.make_node("Relu", ["h2"], ["h3"], "relu"),
        helper.make_node("MatMul", ["h3", "w2"], ["h4"], "down"),
        helper.make_node("Add", ["x", "h4"], ["y"], "residual"),
    ]
    return proto(nodes, {"x": ["batch", width]}, {"y": ["batch", width]}, weights, opset=opset)


def branching() -> onnx.ModelProto:
    """An If whose branches read the outer graph; one of them has an initializer of its own."""
    rng = np.random.default_rng(1)
    then = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "scale"], ["inner"], "same"),
            helper.make_node("Relu", ["inner"], ["t"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), "scale")],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["inner"], "same"), helper.make_node("Abs", ["inner"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], "choose", then_branch=then, else_branch=other),
    ]
    return proto(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, {"zero": np.float32(0)})


def run(model: onnx.ModelProto | ir.Model | str, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a model (or the file at a path) in onnxruntime, optimizations off, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"]).run(None, dict(feeds))
