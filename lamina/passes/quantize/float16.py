"""``float16``, ``bfloat16``: weights stored in half the bytes; ``float16-compute``: computed in float16 too.

Only weighted operators take these forms: normalizations, softmax and other reductions stay in float32, as
does what adds residuals up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.graph import FLOAT, attributes, constant_array, shared
from lamina.passes.quantize.weight_only import rebuild, weight_places

_HALF = ir.DataType.FLOAT16
_STORED = {"float16": (_HALF, np.float16), "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16)}
LARGEST = float(np.finfo(np.float16).max)
# What was measured may be exceeded by this on data not seen.
_MARGIN = 4.0


def fits_float16(array: np.ndarray) -> bool:
    """Whether no element of a weight overflows float16."""
    return not array.size or float(np.abs(array).max()) <= LARGEST


def stays_within(names: tuple[str, ...], statistics: Any) -> bool:
    """Whether the calibrated ranges of all these values lie within float16, with a margin.

    Without statistics nothing is known, and nothing is ruled out.
    """
    ranges = getattr(statistics, "ranges", None)
    if ranges is None:
        return True
    found = [ranges.get(name) for name in names]
    return all(r is not None and max(-r.minimum, r.maximum) * _MARGIN <= LARGEST for r in found)


def emit_stored(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """A Cast in front of the weight: the runtime folds it while loading, so a run costs what it did.

    An embedding is cast after the Gather instead: then the table stays small in memory too.
    """
    node, changed, flags = nodes[site.nodes[0]], {}, {"to": int(FLOAT)}
    for index, _ in weight_places(site, nodes):
        weight = node.inputs[index]
        assert weight is not None
        half = _half(rewriter, weight, option.name)
        if site.kind == "embedding":
            inputs, kind = [half, node.inputs[1]], _STORED[option.name][0]
            rows = rewriter.op("Gather", inputs, {"axis": 0}, name=f"{site.name}.rows", dtype=kind)
            return rewriter.op("Cast", [rows], flags, name=f"{site.name}.cast", dtype=FLOAT)
        changed[index] = rewriter.op("Cast", [half], flags, name=f"{weight.name}.cast", dtype=FLOAT)
    return rebuild(site, rewriter, nodes, changed)


def emit_compute(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """Activations cast to float16 and back around the operator; for targets that have the kernels."""
    old: dict[ir.Value, ir.Value] = {}
    for name in site.nodes:
        node = nodes[name]
        inputs = [None if v is None else old.get(v) or _to_half(site, rewriter, v) for v in node.inputs]
        y = rewriter.op(node.op_type, inputs, attributes(node), name=f"{site.name}.{site.kind}", dtype=_HALF)
        old[node.outputs[0]] = y
    return rewriter.op("Cast", [y], {"to": int(FLOAT)}, name=f"{site.name}.widen", dtype=FLOAT)


def _to_half(site: Site, rewriter: Rewriter, value: ir.Value) -> ir.Value:
    if constant_array(value) is not None:
        return _half(rewriter, value)
    flags = {"to": int(_HALF)}
    return rewriter.op("Cast", [value], flags, name=f"{site.name}.narrow", dtype=_HALF)


def _half(rewriter: Rewriter, weight: ir.Value, form: str = "float16") -> ir.Value:
    array = constant_array(weight)
    assert array is not None
    kind, dtype = _STORED[form]
    return shared(rewriter, weight, form, array.astype(dtype), kind)
