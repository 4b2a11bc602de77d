"""What a model computes in float64: the truth that the rounding of two equal models is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

# How much further from the truth than the original a rewritten model may be, besides what its passes state.
FACTOR = 4.0
_NARROW = (TensorProto.FLOAT, TensorProto.FLOAT16)


class Gelu(OpRun):  # type: ignore[misc]
    """The contrib operator, which onnx's evaluator does not have."""

    op_domain = "com.microsoft"

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        erf = np.vectorize(math.erf, otypes=[np.float64])
        return (x * 0.5 * (1 + erf(x / math.sqrt(2))),)


class BatchNormalization(OpRun):  # type: ignore[misc]
    """Inference in every opset; onnx's evaluator fails on opsets 7 and 8."""

    def _run(self, x: np.ndarray, *parameters: np.ndarray, epsilon: float = 1e-5, **_: Any) -> Any:
        scale, bias, mean, var = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in parameters)
        return ((x - mean) / np.sqrt(var + (1e-5 if epsilon is None else epsilon)) * scale + bias,)


class DequantizeLinear(OpRun):  # type: ignore[misc]
    """Per tensor or axis, in every opset; onnx's evaluator has opsets 19 and later only."""

    def _run(self, x: np.ndarray, scale: np.ndarray, zero: Any = None, axis: int = 1, **_: Any) -> Any:
        if scale.ndim > 1 and scale.size > 1:
            raise NotImplementedError("scales of blocks")
        along = [1] * x.ndim
        if scale.size > 1:
            along[1 if axis is None else axis] = -1
        shifts = 0 if zero is None else zero.astype(np.int64).reshape(along)
        return ((x.astype(np.int64) - shifts) * scale.astype(np.float64).reshape(along),)


_OPERATORS = [Gelu, BatchNormalization, DequantizeLinear]


def true_outputs(
    proto: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]
) -> list[list[np.ndarray]] | None:
    """The outputs for each of the feeds with every float widened to float64; None where that does not run.

    A cast to half or float becomes one to double: where the model itself rounds is part of its own error.
    """
    try:
        loaded = ReferenceEvaluator(widened(proto), new_ops=_OPERATORS)
        with np.errstate(all="ignore"):
            found = [loaded.run(None, {k: _wide(v) for k, v in f.items()}) for f in feeds]
    except Exception:  # an operator that the evaluator lacks, or has for other types only
        return None
    return [[np.asarray(a) for a in row] for row in found]


def near_truth(
    want: np.ndarray, have: np.ndarray, true: np.ndarray, dtype: np.dtype[Any], stated: float
) -> bool | None:
    """Whether ``have`` errs at most ``stated`` ulps and :data:`FACTOR` times as much as ``want`` does.

    Errors are the largest of the output, ulps those of its largest element in ``dtype``, the narrowest it was
    computed in. None where ``want`` and ``true`` do not share half of their digits: the evaluator computes
    something else then, or the output is nothing but rounding, and there is no truth to measure against.

    An element that overflowed on the original's way, where the truth is a number, is right if it is what that
    number rounds to, be it infinity; the others are judged without it.
    """
    if not want.shape == have.shape == true.shape:
        return None
    with np.errstate(over="ignore"):
        mended = ~np.isfinite(want) & np.isfinite(true) & (have == true.astype(have.dtype))
    want, have, true = (a[~mended] for a in (want, have, true))
    if not all(np.isfinite(a).all() for a in (want, have, true)):
        return None
    magnitude = np.abs(true).max(initial=0)
    original = np.abs(want - true).max(initial=0)
    if original > magnitude * np.sqrt(np.finfo(dtype).eps):
        return None
    allowed = stated * ulp(want, dtype) + FACTOR * original
    return bool(np.abs(have - true).max(initial=0) <= allowed)


def ulp(array: np.ndarray, dtype: np.dtype[Any]) -> float:
    """The unit of the last place in ``dtype`` of the largest finite element."""
    largest = np.abs(array[np.isfinite(array)]).max(initial=np.finfo(dtype).tiny)
    return float(np.spacing(np.minimum(largest, np.finfo(dtype).max).astype(dtype)))


def narrowest(model: ir.Model) -> dict[str, np.dtype[Any]]:
    """For each float output of a model the narrowest float among all that it is computed from."""
    found: dict[ir.Value, np.dtype[Any]] = {}
    for node in model.graph:
        touched: list[ir.Value | None] = [*node.inputs, *node.outputs]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in attribute.as_graph().all_nodes():
                    touched += [*inner.inputs, *inner.outputs]
        least = min((found.get(v, _float(v)) for v in touched if v is not None), key=lambda d: d.itemsize)
        found.update((v, least) for v in node.outputs)
    return {v.name or "": found.get(v, _float(v)) for v in model.graph.outputs}


def _float(value: ir.Value) -> np.dtype[Any]:
    """The value's own float; double for what never rounds, float where nothing is known."""
    if value.dtype is None:
        return np.dtype(np.float32)
    kind = value.dtype.numpy()
    return kind if kind.kind == "f" else np.dtype(np.float64)


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that computes in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _widen_graph(copy.graph)
    return copy


def _widen_graph(graph: onnx.GraphProto) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(info.type)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
        if attribute.name in ("to", "dtype") and attribute.i in _NARROW:
            attribute.i = TensorProto.DOUBLE
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("", 11, [1], [0.0])))


def _widen_type(kind: onnx.TypeProto) -> None:
    inner = kind.WhichOneof("value")
    if inner in ("sequence_type", "optional_type"):
        _widen_type(getattr(kind, inner).elem_type)
    elif inner == "tensor_type" and kind.tensor_type.elem_type in _NARROW:
        kind.tensor_type.elem_type = TensorProto.DOUBLE


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _NARROW:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _wide(array: np.ndarray) -> Any:
    return array.astype(np.float64) if array.dtype.kind == "f" else array
