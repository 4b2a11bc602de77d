"""Two runtimes behind one call: ONNX Runtime on one thread, and onnx's reference evaluator."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers the small float types with numpy)
import numpy as np
import onnx
from onnx import helper

from lamina.backends._session import explain, make_options, make_session

Runner = Callable[[Mapping[str, Any]], list[Any]]


def onnxruntime_runner(model: bytes) -> Runner:
    """A session with default optimizations on one thread."""
    session = make_session(model, make_options(1))
    proto = onnx.load_from_string(model)
    types = {v.name: v.type for v in (*proto.graph.input, *proto.graph.output)}

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        unusual = [n for n, t in types.items() if _is_unusual(t)]
        if not unusual:
            return session.run(None, dict(feeds))
        import onnxruntime as ort

        values = {n: _to_ort(ort, feeds[n], types[n]) for n in feeds}
        names = [o.name for o in session.get_outputs()]
        results = session.run_with_ort_values(names, values)
        return [_from_ort(r, types[n]) for n, r in zip(names, results, strict=True)]

    return run


def reference_runner(model: bytes) -> Runner:
    """onnx's reference evaluator: plain numpy, every operator of every opset onnx has."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_from_string(model))

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return evaluator.run(None, dict(feeds))

    return run


RUNTIMES: dict[str, Callable[[bytes], Runner]] = {
    "onnxruntime": onnxruntime_runner,
    "reference": reference_runner,
}


def reason(error: BaseException) -> str:
    """One line that says why a runtime did not run a model."""
    text = explain(error)[0] or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _is_unusual(kind: onnx.TypeProto) -> bool:
    """Whether numpy has no such type of its own: bfloat16, float8 and the types of less than a byte."""
    if not kind.HasField("tensor_type"):
        return False
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
    except KeyError:
        return False
    return dtype.kind == "V" or dtype.type.__module__ == "ml_dtypes"


def _to_ort(ort: Any, value: Any, kind: onnx.TypeProto) -> Any:
    if not _is_unusual(kind):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    if _bits(kind) < 8:
        raise TypeError("types of less than a byte cannot be fed through numpy")
    raw = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kind.tensor_type.elem_type)


def _from_ort(value: Any, kind: onnx.TypeProto) -> Any:
    if not _is_unusual(kind):
        return value.numpy()
    if _bits(kind) < 8:
        raise TypeError("types of less than a byte cannot be read through numpy")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
    shape = tuple(value.shape())
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, dtype).reshape(shape)


def _bits(kind: onnx.TypeProto) -> int:
    small = {
        onnx.TensorProto.INT4,
        onnx.TensorProto.UINT4,
        onnx.TensorProto.FLOAT4E2M1,
        onnx.TensorProto.INT2,
        onnx.TensorProto.UINT2,
    }
    return 4 if kind.tensor_type.elem_type in small else 8
