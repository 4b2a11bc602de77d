"""The weightless protobuf of a model: what onnx's checker and shape inference get instead of gigabytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from lamina.ir.message import message

_SMALL = 1024  # bytes: shapes, axes and scales stay, because inference reads their values


def skeleton(
    model: ir.Model, *, limit: int = _SMALL, described: bool = False
) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """Serialize ``model`` with initializers above ``limit`` bytes turned into graph inputs.

    Args:
        model: Not changed.
        limit: Bytes.
        described: Whether values carry the types and shapes they are known to have.

    Returns:
        The protobuf, and the values of ``model`` that became inputs, in input order.
    """
    moved = [
        v for v in model.graph.initializers.values() if v.const_value is None or v.const_value.nbytes > limit
    ]
    return message(model, outside=moved, described=described), moved


def feedable(dtype: ir.DataType) -> bool:
    """Whether numpy and onnxruntime can exchange arrays of this type."""
    return (
        dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED) and np.dtype(dtype.numpy()).kind in "fiubc"
    )
