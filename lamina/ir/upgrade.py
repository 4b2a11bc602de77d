"""Bring models older than opset 13 to it with onnx's own converter, and check the result by running both."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from lamina.errors import UnsupportedOperator
from lamina.ir.examples import synthesize
from lamina.ir.tensors import ExternalFiles

_ADVICE = "export the model again with opset 13 or newer"
_FIRST = 7


def upgrade(model: ir.Model, source: str, files: ExternalFiles) -> ir.Model:
    """A copy of ``model`` at opset 13 that computes the same.

    Raises:
        UnsupportedOperator: onnx's converter cannot do it, or what it made computes something else.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    what = f"opset {version} is too old and the model cannot be converted"
    if version < _FIRST:
        raise UnsupportedOperator(what, where=source, advice=_ADVICE)
    if list(model.graph.subgraphs()):
        # trap: onnx's converter leaves subgraphs at the old opset
        raise UnsupportedOperator(f"{what}: it has subgraphs", where=source, advice=_ADVICE)
    before = ir.to_proto(model)
    try:
        after = onnx.version_converter.convert_version(before, 13)
    except Exception as error:  # a pybind converter: RuntimeError, IndexError, anything
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedOperator(f"{what}: {reason}", where=source, advice=_ADVICE) from error
    after.ir_version = max(after.ir_version, 7)
    _compare(before, after, what, source, synthesize(model))
    return ir.from_proto(after)


def _compare(
    before: onnx.ModelProto, after: onnx.ModelProto, what: str, source: str, feeds: dict[str, np.ndarray]
) -> None:
    try:
        expected, got = _run(before, feeds), _run(after, feeds)
    except Exception as error:  # onnxruntime raises its own untyped errors
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedOperator(f"{what}: {reason}", where=source, advice=_ADVICE) from error
    for value, want, have in zip(before.graph.output, expected, got, strict=True):
        if want.shape != have.shape or not np.allclose(want, have, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise UnsupportedOperator(
                f"{what}: output '{value.name}' changes when it is converted", where=source, advice=_ADVICE
            )


def _run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)
