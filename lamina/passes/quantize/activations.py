"""Scale and zero point of activations: a function of the value alone, so that neighbours agree exactly."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.passes.quantize.graph import constant_array, is_op
from lamina.passes.quantize.sites import moves_elements

_INDEX: weakref.WeakKeyDictionary[ir.Model, dict[str, ir.Value]] = weakref.WeakKeyDictionary()
_CHOSEN: dict[tuple[int, str], tuple[weakref.ref[Any], tuple[float, int]]] = {}


def value_named(program: Program, name: str) -> ir.Value | None:
    """The main graph's value called ``name``; the index is built once a program."""
    index = _INDEX.get(program.model)
    if index is None or (name in index and index[name].name != name):
        index = {v.name: v for node in program.graph for v in node.outputs if v.name}
        index.update({v.name: v for v in program.graph.inputs if v.name})
        _INDEX[program.model] = index
    return index.get(name)


def activation_range(program: Program, name: str, statistics: Any, method: str) -> dict[str, Any] | None:
    """The uint8 parameters of value ``name``, as JSON, or None where its range is not known.

    Where operators that only move elements made the value, their source's range is used: then both sides of a
    Reshape, Slice or MaxPool carry the same integers and no conversion stands between them.
    """
    ranges = getattr(statistics, "ranges", None) or {}
    chosen = next((n for n in _lineage(program, name) if n in ranges), None)
    if chosen is None:
        return None
    stat = ranges[chosen]
    scale, zero = _chosen(stat, method)
    source = value_named(program, chosen)
    if zero != 0 and (stat.minimum >= 0 or _starts_at_zero(source)):
        # zero point 0 is what lets the quantizer stand for a Relu
        scale, zero = scale * (255 - zero) / 255, 0
    number = float(np.float32(scale))
    if not np.isfinite(number) or number <= 0 or not 0 <= zero <= 255:
        return None
    return {"scale": number, "zero_point": int(zero)}


def _chosen(stat: Any, method: str) -> tuple[float, int]:
    """Scale and zero point of a distribution; a value is asked for once by its maker and once a reader."""
    from lamina.analysis.ranges import choose_range

    key = (id(stat), method)
    known = _CHOSEN.get(key)
    if known is None or known[0]() is not stat:
        result = choose_range(stat, method=method, bits=8, signed=False, symmetric=False)
        known = (weakref.ref(stat, lambda _: _CHOSEN.pop(key, None)), result)
        _CHOSEN[key] = known
    return known[1]


def _lineage(program: Program, name: str) -> list[str]:
    """Names from the first value whose elements ``name`` holds, down to ``name``."""
    names = [name]
    value = value_named(program, name)
    while value is not None:
        node = value.producer()
        if node is None or not moves_elements(node) or value is not node.outputs[0] or node.inputs[0] is None:
            break
        value = node.inputs[0]
        names.append(value.name or "")
    return names[::-1]


def shares_mean(program: Program, name: str, statistics: Any) -> bool:
    """Whether the elements of ``name`` have a common mean that counts beside their spread."""
    source = _lineage(program, name)[0]
    if _starts_at_zero(value_named(program, source)):
        return True
    stat = (getattr(statistics, "ranges", None) or {}).get(name)
    mean, variance = getattr(stat, "mean", 0.0), getattr(stat, "variance", 1.0)
    return bool(mean * mean > 0.25 * variance)


def _starts_at_zero(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if is_op(node, "Relu"):
        return True
    if node is None or not is_op(node, "Clip") or len(node.inputs) < 2:
        return False
    low = constant_array(node.inputs[1])
    return low is not None and float(low.reshape(-1)[0]) >= 0


def saturates(activation: ir.Node, parameters: Any) -> bool:
    """Whether quantizing to ``parameters`` clamps no less than a Relu or Clip in front of it would."""
    scale, zero = np.float32(parameters["scale"]), parameters["zero_point"]
    low, high = 0.0, np.inf
    if activation.op_type == "Clip":
        low, high = (_bound(activation, i, default) for i, default in ((1, -np.inf), (2, np.inf)))
    below = np.rint(np.float32(low) / scale) + zero
    above = np.rint(np.float32(high) / scale) + zero
    return bool(below <= 0 and above >= 255)


def _bound(node: ir.Node, index: int, default: float) -> float:
    array = constant_array(node.inputs[index]) if len(node.inputs) > index else None
    return default if array is None else float(array.reshape(-1)[0])
