"""Concrete shape and dtype of every value for given feeds, observed by running the model once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lamina.errors import BackendError
from lamina.ir.program import Program
from lamina.ir.skeleton import feedable, skeleton

Observed = tuple[tuple[int, ...], np.dtype[Any]]
_PREFIX = "lamina_shape_of:"


def observed_shapes(program: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, Observed]:
    """Shape and dtype of every tensor of the main graph when it runs on ``feeds``.

    A Shape operator listens at every value, so the run holds what the model itself holds; values whose dtype
    inference does not know (behind contrib operators) are fetched whole. Sequences are left out.

    Args:
        program: The program; weights are handed over by reference, not serialized.
        feeds: One array an input.

    Returns:
        Value name -> (shape, numpy dtype), inputs and initializers included.

    Raises:
        BackendError: onnxruntime cannot run the model on these feeds.
    """
    graph = program.graph
    result: dict[str, Observed] = {name: (tuple(a.shape), a.dtype) for name, a in feeds.items()}
    for value in graph.initializers.values():
        if value.name and value.const_value is not None:
            tensor = value.const_value
            result[value.name] = (tuple(tensor.shape.numpy()), np.dtype(tensor.dtype.numpy()))
    values = [v for n in graph for v in n.outputs if v.name and not _is_sequence(v)]
    proto, weights = skeleton(program.model)
    by_shape = [v for v in values if v.dtype not in (None, ir.DataType.UNDEFINED)]
    whole = [v for v in values if v.dtype in (None, ir.DataType.UNDEFINED)]
    _listen(proto, by_shape, whole)
    fetched = _run(proto, program, weights, feeds, [_PREFIX + str(v.name) for v in by_shape], whole)
    for value, shape in zip(by_shape, fetched, strict=False):
        if value.name and value.dtype is not None:
            result[value.name] = (tuple(int(d) for d in shape), np.dtype(value.dtype.numpy()))
    for value, array in zip(whole, fetched[len(by_shape) :], strict=True):
        if value.name and isinstance(array, np.ndarray):
            result[value.name] = (tuple(array.shape), array.dtype)
    return result


def _is_sequence(value: ir.Value) -> bool:
    return value.type is not None and not isinstance(value.type, ir.TensorType)


def _listen(proto: onnx.ModelProto, by_shape: list[ir.Value], whole: list[ir.Value]) -> None:
    del proto.graph.output[:]
    for value in by_shape:
        name = _PREFIX + str(value.name)
        proto.graph.node.add(op_type="Shape", input=[str(value.name)], output=[name], name=name)
        proto.graph.output.add(name=name)
    for value in whole:
        proto.graph.output.add(name=str(value.name))
    # Declared dims may be wrong for these feeds (zoo models are); onnxruntime would complain about each.
    del proto.graph.value_info[:]


def _run(
    proto: onnx.ModelProto,
    program: Program,
    weights: list[ir.Value],
    feeds: Mapping[str, np.ndarray],
    shapes: list[str],
    whole: list[ir.Value],
) -> list[Any]:
    import onnxruntime

    _take_back_unfeedable(proto, weights)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    given = dict(feeds)
    given.update({str(v.name): v.const_value.numpy() for v in weights if _by_reference(v)})  # type: ignore[union-attr]
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
        return session.run([*shapes, *(str(v.name) for v in whole)], given)
    except Exception as error:  # onnxruntime's exceptions share no base
        raise BackendError(
            f"the model does not run on these inputs: {str(error).strip().splitlines()[0]}",
            where=program.source,
            advice="give example inputs of shapes and values the model accepts",
        ) from error


def _by_reference(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and feedable(tensor.dtype)


def _take_back_unfeedable(proto: onnx.ModelProto, weights: list[ir.Value]) -> None:
    """Weights numpy cannot hand over (bfloat16, int4, ...) go back into the protobuf."""
    for value in weights:
        if not _by_reference(value) and value.const_value is not None:
            tensor = ir.to_proto(value.const_value)
            tensor.name = str(value.name)
            proto.graph.initializer.append(tensor)
