"""``stored-f8``, ``stored-mxf8``: weights stored in 8-bit floats, computed in float32.

Three bits of mantissa keep small and large weights to the same relative error, where integers keep them to
the same absolute one: better for rows with a few large weights, worse for the usual ones. One has a float32
scale a channel, the other a power of two for each block of 32 (OCP Microscaling Formats 1.0, element type
E4M3; arXiv:2310.10537). Both are a Cast and a Mul of constants, which a runtime computes once, while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.bits import short_name
from lamina.passes.quantize.coded import to_rows
from lamina.passes.quantize.graph import FLOAT, constant_array, shared
from lamina.passes.quantize.weight_only import rebuild, unblocked, weight_places

FLOAT8 = ir.DataType.FLOAT8E4M3FN
_POWERS = ir.DataType.FLOAT8E8M0
_LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448
BLOCK = 32
# The opset that brings each form's types to Cast.
OPSETS = {"stored-f8": 19, "stored-mxf8": 24}
# Where in an octave the largest weight of a row lies decides how the others meet the grid.
_PARTS = np.exp2(-np.arange(8, dtype=np.float32) / 8)
# Exponents that E8M0 holds and float32 has normal numbers for.
_LEAST_POWER, _LARGEST_POWER = -126, 127


def emit_stored(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """The operator as it was, its weights made from 8-bit floats at load time."""
    rewriter.require_opset(OPSETS[option.name])
    node, changed = nodes[site.nodes[0]], {}
    for index, axis in weight_places(site, nodes):
        weight = node.inputs[index]
        assert weight is not None
        write = _channels if option.name == "stored-f8" else _blocks
        changed[index] = write(rewriter, weight, option.parameters, axis)
    return rebuild(site, rewriter, nodes, changed)


def quantize_float8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[n, k]`` in float8 E4M3 (ml_dtypes) and float32 scales ``[n]`` of least squared error."""
    reach = np.abs(rows).max(axis=1, initial=0.0)
    widest = np.where(reach > 0, reach / _LARGEST, np.float32(1.0)).astype(np.float32)
    # trap: a scale that is no normal number loses the digits of its weights
    widest = np.maximum(widest, np.float32(2.0**-100))
    codes, scale, least = (
        np.empty(rows.shape, ml_dtypes.float8_e4m3fn),
        widest.copy(),
        np.full(len(rows), np.inf),
    )
    for part in _PARTS:
        # a part below 1 leaves the top of the grid unused: nothing overflows
        tried = widest / part
        exact = rows / tried[:, None]
        made = exact.astype(ml_dtypes.float8_e4m3fn)
        # in steps first: squares of large weights would overflow
        steps = np.square(made.astype(np.float32) - exact).sum(axis=1, dtype=np.float64)
        error = steps * np.square(tried, dtype=np.float64)
        better = error < least
        codes[better], scale[better], least[better] = made[better], tried[better], error[better]
    return codes, scale


def quantize_microscaled(rows: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[n, k]`` in float8 E4M3 and a power of two a block of k: float8 E8M0 ``[n, k / block]``.

    The paper takes the exponent of the largest magnitude less 8, that of 448, and what is larger saturates;
    here the next power is tried too, and of both the one that errs less is taken.
    """
    blocks = rows.reshape(len(rows), -1, block)
    _, exponent = np.frexp(np.abs(blocks).max(axis=2, initial=0.0))
    lower = np.clip(exponent - 1 - 8, _LEAST_POWER, _LARGEST_POWER - 1)
    made = [_microscaled(blocks, powers) for powers in (lower, lower + 1)]
    # errors are in steps, and those of the wider power are twice as long
    wider = 4 * made[1][1] < made[0][1]
    codes = np.where(wider[:, :, None], made[1][0], made[0][0])
    powers = np.ldexp(np.float32(1), np.where(wider, lower + 1, lower))
    return codes.reshape(rows.shape), powers.astype(ml_dtypes.float8_e8m0fnu)


def _microscaled(blocks: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of blocks in units of ``2^powers``, and each block's squared error in these units."""
    exact = np.ldexp(blocks, -powers[:, :, None])
    codes = np.clip(exact, -_LARGEST, _LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return codes, np.square(codes.astype(np.float32) - exact).sum(axis=2)


def _channels(rewriter: Rewriter, weight: ir.Value, parameters: Mapping[str, Any], axis: int) -> ir.Value:
    array = constant_array(weight)
    assert array is not None
    codes, scale = quantize_float8(to_rows(array, axis))
    moved = (array.shape[axis], *(n for i, n in enumerate(array.shape) if i != axis))
    shaped = np.ascontiguousarray(np.moveaxis(codes.reshape(moved), 0, axis))
    column = [1] * array.ndim
    column[axis] = -1
    real = _cast(rewriter, weight, shaped, FLOAT8, f"f8.axis{axis}")
    factor = shared(rewriter, weight, f"f8.axis{axis}.scale", scale.reshape(column))
    return rewriter.op("Mul", [real, factor], name=f"{short_name(weight)}.scaled", dtype=FLOAT)


def _blocks(rewriter: Rewriter, weight: ir.Value, parameters: Mapping[str, Any], axis: int) -> ir.Value:
    array, block = constant_array(weight), int(parameters["block"])
    assert array is not None
    rows, form = to_rows(array, axis), f"mxf8x{block}.axis{axis}"
    codes, powers = quantize_microscaled(rows, block)
    real = _cast(rewriter, weight, codes.reshape(len(rows), -1, block), FLOAT8, form)
    factor = _cast(rewriter, weight, powers[:, :, None], _POWERS, f"{form}.scale")
    real = rewriter.op("Mul", [real, factor], name=f"{short_name(weight)}.scaled", dtype=FLOAT)
    return unblocked(rewriter, weight, real, axis)


def _cast(rewriter: Rewriter, weight: ir.Value, array: np.ndarray, kind: ir.DataType, form: str) -> ir.Value:
    codes = shared(rewriter, weight, form, array, kind)
    return rewriter.op("Cast", [codes], {"to": int(FLOAT)}, name=f"{short_name(weight)}.cast", dtype=FLOAT)
