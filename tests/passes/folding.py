"""Helpers of the fold tests: build from text, run without any optimization, compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.passes.fold import apply_named
from lamina.passes.fold.catalog import load


def program(text: str, weights: Mapping[str, np.ndarray] | None = None, opset: int = 18) -> Program:
    """A program from ONNX text; ``weights`` become initializers, nodes are named after their first output."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}', initializers=[])
    for name, array in (weights or {}).items():
        tensor = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        for node in model.graph:
            for i, read in enumerate(node.inputs):
                if read is not None and read.name == name:
                    node.replace_input_with(i, value)
        model.graph.register_initializer(value)
    for node in model.graph.all_nodes():
        node.name = f"node_{node.outputs[0].name}"
    import onnx_ir.passes.common as common

    common.ShapeInferencePass()(model)
    return Program(model)


def run(target: Program, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of ``target`` in ONNX Runtime with every optimization off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(target.model.clone()).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def ops(target: Program) -> Counter[str]:
    """How many nodes of each operator there are."""
    return Counter(node.op_type for node in target.graph)


def ulps(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the last place of the largest expected value."""
    scale = np.spacing(np.abs(expected).max().astype(expected.dtype))
    return float(np.abs(got.astype(np.float64) - expected).max() / scale)


def interface(target: Program) -> tuple[object, ...]:
    """What may never change."""
    return target.inputs, target.outputs


def check(before: Program, name: str, feeds: list[dict[str, np.ndarray]], limit: float = 0.0) -> Program:
    """Apply one fold and hold it to its promises: values, interface, idempotence, names."""
    count = len(before.graph)
    after = apply_named(before, [name])
    assert len(before.graph) == count
    assert interface(after) == interface(before)
    names = [n.name for n in after.graph] + [v.name for n in after.graph for v in n.outputs if v.name]
    assert all(names)
    assert len({n.name for n in after.graph}) == len(after.graph)
    for feed in feeds:
        for got, expected in zip(run(after, feed), run(before, feed), strict=True):
            assert got.dtype == expected.dtype
            assert ulps(got, expected) <= limit if limit else np.array_equal(got, expected, equal_nan=True)
    again = apply_named(after, [name])
    assert ops(again) == ops(after)
    fold = load(name)
    if hasattr(fold, "fires"):
        assert not fold.fires(after.model)
    return after


def reasons(target: Program, name: str) -> list[str]:
    """Why the fold left near misses alone."""
    return [r.reason for r in load(name).refusals(target.model)]  # type: ignore[attr-defined]
