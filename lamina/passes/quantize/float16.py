"""``float16``: weights stored in half the bytes; ``float16-compute``: the operator itself in float16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.graph import FLOAT, attributes, constant_array, shared
from lamina.passes.quantize.weight_only import rebuild, weight_place

_HALF = ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)


def fits_float16(array: np.ndarray) -> bool:
    """Whether no element of a weight overflows float16."""
    return not array.size or float(np.abs(array).max()) <= LARGEST


def emit_stored(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """A Cast in front of the weight: the runtime folds it while loading, so a run costs what it did.

    An embedding is cast after the Gather instead: then the table stays small in memory too.
    """
    node = nodes[site.nodes[0]]
    index, _ = weight_place(site, nodes)
    weight = node.inputs[index]
    assert weight is not None
    half, flags = _half(rewriter, weight), {"to": int(FLOAT)}
    if site.kind == "embedding":
        inputs = [half, node.inputs[1]]
        rows = rewriter.op("Gather", inputs, {"axis": 0}, name=f"{site.name}.rows", dtype=_HALF)
        return rewriter.op("Cast", [rows], flags, name=f"{site.name}.cast", dtype=FLOAT)
    wide = rewriter.op("Cast", [half], flags, name=f"{weight.name}.cast", dtype=FLOAT)
    return rebuild(site, rewriter, nodes, {index: wide})


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


def _half(rewriter: Rewriter, weight: ir.Value) -> ir.Value:
    array = constant_array(weight)
    assert array is not None
    return shared(rewriter, weight, "float16", array.astype(np.float16))
