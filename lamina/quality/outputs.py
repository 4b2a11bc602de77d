"""Which output a metric looks at, and how: class axis, probabilities or logits, masked positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lamina.data import Dataset
from lamina.data.interface import is_mask
from lamina.errors import BudgetError
from lamina.ir.program import Port, Program

_CACHE_NAMES = ("present", "past", "cache", "new_key", "new_value")
_LOGIT_NAMES = ("logit", "prob", "score", "softmax", "class", "label")
_STATE_NAMES = ("hidden", "embed", "feature", "pool", "state", "sentence")
_PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Flatten", "Add", "Unsqueeze"}


def is_cache(name: str) -> bool:
    """Whether an output is a decoder's cache by its name: state, not an answer."""
    return name.lower().startswith(_CACHE_NAMES)


def is_float(array: np.ndarray) -> bool:
    """Whether an array holds real numbers, bfloat16 and its kin included."""
    return array.dtype.kind in "fV"


def float_outputs(program: Program) -> tuple[Port, ...]:
    """The outputs that carry an answer in real numbers."""
    ports = [p for p in program.outputs if p.dtype.is_floating_point()]
    return tuple(p for p in ports if not is_cache(p.name)) or tuple(ports)


def main_output(program: Program, names: Sequence[str], metric: str) -> str:
    """The output a metric reads: the first whose name holds one of ``names``, else the first real one.

    Raises:
        BudgetError: The model has no real-valued output.
    """
    ports = float_outputs(program)
    if not ports:
        what = f"metric '{metric}' needs an output of real numbers, the model has none"
        raise BudgetError(what, where=program.source, advice="give a metric of your own: module:function")
    for name in names:
        for port in ports:
            if name in port.name.lower():
                return port.name
    return ports[0].name


def gives_logits(program: Program) -> bool:
    """Whether the one answer of the model is a distribution over classes, as logits or probabilities."""
    ports = float_outputs(program)
    if len(ports) != 1 or len(ports[0].shape) < 2:
        return False
    name = ports[0].name.lower()
    if any(word in name for word in _LOGIT_NAMES):
        return True
    if any(word in name for word in _STATE_NAMES):
        return False
    last = _last_operator(program, ports[0].name)
    classes = ports[0].shape[-1]
    flat = len(ports[0].shape) == 2 and isinstance(classes, int) and classes > 1
    return last in ("Softmax", "LogSoftmax") or (flat and last in ("Gemm", "MatMul"))


def _last_operator(program: Program, output: str) -> str:
    value: ir.Value | None = next(v for v in program.graph.outputs if v.name == output)
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _PASSING:
        producers = (v.producer() for v in node.inputs if v is not None)
        node = next((p for p in producers if p is not None and p.op_type != "Constant"), None)
    return node.op_type if node is not None else ""


def class_axis(rank: int) -> int:
    """The axis classes lie on: 1 for images ``[b, classes, h, w]``, else the last."""
    return 1 if rank >= 4 else -1


def log_probabilities(values: np.ndarray, axis: int, *, probabilities: bool) -> np.ndarray:
    """Log-softmax of logits; the logarithm of what already is a distribution."""
    values = values.astype(np.float32, copy=False)
    if probabilities:
        return np.asarray(np.log(np.maximum(values, np.float32(1e-30))))
    shifted = values - values.max(axis=axis, keepdims=True)
    total = np.exp(shifted).sum(axis=axis, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return np.asarray(shifted)


def are_probabilities(values: np.ndarray, axis: int) -> bool:
    """Whether every row along ``axis`` is a distribution: not negative, sum 1."""
    if values.size == 0 or values.min() < 0:
        return False
    return bool(np.abs(values.sum(axis=axis, dtype=np.float64) - 1).max() < 2e-3)


def token_mask(batch: Dataset, shape: tuple[int, ...]) -> np.ndarray | None:
    """1 where a position of a ``[rows, length, ...]`` output is real, 0 at padding; None without a mask."""
    for name, array in batch.inputs.items():
        if is_mask(name) and array.ndim == 2 and array.shape == shape[:2]:
            return (array != 0).astype(np.float64)
    return None
