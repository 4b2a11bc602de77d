"""A few numbers that tell a tensor's values apart, computed inside the model: nothing big is read out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Executable
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter

_FEATURES = 4
_DOUBLE = ir.DataType.DOUBLE


@dataclass(frozen=True)
class Fingerprint:
    """A tensor's shape, and the L1 norm, sum, L2 norm and L1 norm of running sums of its values.

    The running sums make it sensitive to order: a transposed tensor has another fingerprint.
    """

    shape: tuple[int, ...]
    features: np.ndarray


@dataclass(frozen=True)
class Twin:
    """The tensor whose fingerprint is nearest; ``equal`` says whether it is within the tolerance."""

    name: str | None
    equal: bool


def fingerprints(
    program: Program,
    names: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    compiler: Callable[[ir.Model], Executable],
) -> dict[str, Fingerprint]:
    """Fingerprints of the named tensors of the main graph, in one run.

    Raises:
        BackendError: The runtime refuses the model or the feeds.
    """
    model = program.model.clone()
    rewriter = Rewriter(model)
    flat = rewriter.constant(np.array([-1], np.int64), "lamina_flat")
    axis = rewriter.constant(np.array(0, np.int64), "lamina_axis")
    values = {v.name: v for node in model.graph for v in node.outputs}
    marks = [_mark(rewriter, values[name], flat, axis) for name in names]
    del model.graph.outputs[:]
    model.graph.outputs.extend(marks)
    found = compiler(model).run(feeds) if marks else {}
    result = {}
    for name, mark in zip(names, marks, strict=True):
        array = found[mark.name or ""]
        result[name] = Fingerprint(tuple(int(d) for d in array[_FEATURES:]), array[:_FEATURES])
    return result


def closest(mark: Fingerprint, others: Mapping[str, Fingerprint], tolerance: float) -> Twin:
    """The nearest of ``others`` of the same shape."""
    names = [name for name, other in others.items() if other.shape == mark.shape]
    if not names:
        return Twin(None, False)
    # Every feature but the running sums is bounded by the L1 norm; so is the rounding of each.
    norm = float(mark.features[0])
    scale = np.maximum(np.abs(mark.features), norm)
    table = np.stack([others[name].features for name in names])
    with np.errstate(all="ignore"):
        apart = np.abs(table - mark.features) / np.where(scale > 0, scale, 1.0)
    apart = np.where((table == mark.features) | (np.isnan(table) & np.isnan(mark.features)), 0.0, apart)
    distance = np.where(np.isnan(apart), np.inf, apart).max(axis=1)
    best = int(distance.argmin())
    return Twin(names[best], bool(distance[best] <= tolerance))


def _mark(rewriter: Rewriter, value: ir.Value, flat: ir.Value, axis: ir.Value) -> ir.Value:
    """One vector for ``value``: its features, then its dims."""
    numbers = rewriter.op("Reshape", [rewriter.op("Cast", [value], {"to": int(_DOUBLE)}), flat])
    running = rewriter.op("CumSum", [numbers, axis])
    parts = [
        rewriter.op("ReduceL1", [numbers]),
        rewriter.op("ReduceSum", [numbers]),
        rewriter.op("ReduceL2", [numbers]),
        rewriter.op("ReduceL1", [running]),
        rewriter.op("Cast", [rewriter.op("Shape", [value])], {"to": int(_DOUBLE)}),
    ]
    mark = rewriter.op("Concat", parts, {"axis": 0}, dtype=_DOUBLE)
    mark.shape = ir.Shape([None])
    return mark
