"""The weightless protobuf of a model: what onnx's checker and shape inference get instead of gigabytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

_SMALL = 1024  # bytes: shapes, axes and scales stay, because inference reads their values


def skeleton(model: ir.Model, *, limit: int = _SMALL) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """Serialize ``model`` with initializers above ``limit`` bytes turned into graph inputs.

    Returns:
        The protobuf, and the values of ``model`` that became inputs, in input order.
    """
    clone = model.clone()
    moved = []
    for name, value in tuple(clone.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= limit:
            continue
        if tensor is not None:
            value.shape = ir.Shape([int(d) for d in tensor.shape.numpy()])
            value.dtype = tensor.dtype
        del clone.graph.initializers[name]
        value.const_value = None
        if not value.is_graph_input():
            clone.graph.inputs.append(value)
        moved.append(model.graph.initializers[name])
    return ir.to_proto(clone), moved


def feedable(dtype: ir.DataType) -> bool:
    """Whether numpy and onnxruntime can exchange arrays of this type."""
    return (
        dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED) and np.dtype(dtype.numpy()).kind in "fiubc"
    )
