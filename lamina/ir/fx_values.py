"""Values between ONNX and torch: element types, constants, and numbers an operator reads on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

# An input annotated so is read on the host. Constants come as literals, computed values as tensors.
Ints = Any
Floats = Any

# What torch computes with. Unsigned types beyond 8 bits, floats of 8 bits, integers of 2 and 4 bits, complex
# numbers and strings are left out: torch lacks most operators for them.
DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}
HALVES = (torch.float16, torch.bfloat16)


def ints(value: Any) -> list[int] | None:
    """The integers of a literal or a tensor of any shape; None stays None."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return [int(v) for v in value.detach().flatten().tolist()]
    return [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]


def floats(value: Any) -> list[float] | None:
    """Likewise for real numbers; an empty tensor is as good as none."""
    if value is None:
        return None
    listed = value.detach().flatten().tolist() if isinstance(value, torch.Tensor) else value
    return [float(v) for v in listed] or None


def axis_of(axis: int, rank: int) -> int:
    """A negative axis counted from the front."""
    return axis + rank if axis < 0 else axis


def axes_of(axes: Any, rank: int) -> list[int] | None:
    """Axes counted from the front, of a literal or a tensor; None stays None."""
    listed = ints(axes)
    return None if listed is None else [axis_of(a, rank) for a in listed]


def widened(x: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers as float32, as runtimes accumulate them; all else as it is."""
    return x.float() if x.dtype in HALVES else x


def to_tensor(tensor: ir.TensorProtocol | np.ndarray, dtype: ir.DataType | None = None) -> torch.Tensor:
    """A torch tensor with data of its own.

    Args:
        tensor: Of a type in :data:`DTYPES`.
        dtype: The type of an array; None where numpy's own says it.
    """
    if isinstance(tensor, np.ndarray):
        array, kind = tensor, dtype or ir.DataType.from_numpy(tensor.dtype)
    else:
        array, kind = tensor.numpy(), tensor.dtype
    array = np.array(array, order="C")  # a copy: weights are memory-mapped and shared
    if kind == ir.DataType.BFLOAT16:  # numpy has no such type that torch knows
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array on the host; bfloat16 as float32, which holds it exactly."""
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
