"""Weights in few bits, arithmetic in float: ``w8`` and ``w4`` in blocks, ``stored-w8`` and ``stored-w4``.

The block forms are DequantizeLinear (opset 21) into MatMul, which ONNX Runtime fuses into MatMulNBits when
the blocks run along the first axis of a ``[K, N]`` weight; with the weight transposed it dequantizes on every
run. The stored forms are Cast -> Mul on constants: a runtime folds them once while loading, so the file
shrinks and the time of a run is the original's, for any operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.graph import FLOAT, attributes, constant_array, quantized, shared
from lamina.passes.quantize.linear import linear_of
from lamina.passes.quantize.static import channel_form, channel_weights
from lamina.passes.quantize.weights import quantize_blocks

_KINDS = {8: ir.DataType.INT8, 4: ir.DataType.UINT4}


def emit_blocks(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul or Gemm with a weight in blocks: becomes MatMulNBits."""
    rewriter.require_opset(21)
    product, parameters = linear_of(site, nodes), option.parameters
    bits, block, clipping = (parameters[k] for k in ("weight_bits", "block", "clipping"))
    transposed = product.channel_axis == 0
    form = f"blocks{bits}x{block}.{clipping}{'.t' * transposed}"
    made = quantized(
        product.weight,
        form,
        lambda array: quantize_blocks(
            array.T if transposed else array, block=block, bits=bits, clipping=clipping
        ),
    )
    scale, alpha = made.scale, np.float32(product.alpha)
    inputs = [
        shared(rewriter, product.weight, f"{form}.codes", made.codes, _KINDS[bits]),
        shared(rewriter, product.weight, f"{form}.alpha{product.alpha!r}.scale", scale * alpha),
    ]
    if made.zero_point is not None:
        inputs.append(shared(rewriter, product.weight, f"{form}.zero_point", made.zero_point, _KINDS[bits]))
    flags = {"axis": 0, "block_size": block}
    weight = rewriter.op("DequantizeLinear", inputs, flags, name=f"{site.name}.dequantize", dtype=FLOAT)
    y = rewriter.op("MatMul", [product.activation, weight], name=f"{site.name}.matmul", dtype=FLOAT)
    bias = product.bias_vector()
    if bias is None:
        return y
    value = rewriter.constant(bias, f"{site.name}.bias")
    return rewriter.op("Add", [y, value], name=f"{site.name}.add", dtype=FLOAT)


def emit_stored(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """The operator as it was, its weight made from few bits at load time."""
    if site.kind == "embedding":
        return _emit_rows(site, option.parameters, rewriter, nodes[site.nodes[0]])
    node, changed = nodes[site.nodes[0]], {}
    for index, axis in weight_places(site, nodes):
        weight = node.inputs[index]
        assert weight is not None
        changed[index] = _stored(rewriter, weight, option.parameters, axis)
    return rebuild(site, rewriter, nodes, changed)


def weight_place(site: Site, nodes: Mapping[str, ir.Node]) -> tuple[int, int]:
    """Which input is the weight, and which of its axes numbers output channels."""
    if site.kind in ("conv", "embedding"):
        return (1 if site.kind == "conv" else 0), 0
    if site.kind in ("convtranspose", "recurrent"):
        # channels of groups, and gates of directions, of one number share a scale
        return 1, 1
    product = linear_of(site, nodes)
    return (0 if product.left else 1), product.channel_axis


def weight_places(site: Site, nodes: Mapping[str, ir.Node]) -> list[tuple[int, int]]:
    """As :func:`weight_place`, of every weight: a recurrent operator has two."""
    first = weight_place(site, nodes)
    return [first, (2, 1)] if site.kind == "recurrent" else [first]


def rebuild(
    site: Site, rewriter: Rewriter, nodes: Mapping[str, ir.Node], changed: Mapping[int, ir.Value]
) -> ir.Value:
    """The site's nodes again, the first with some inputs changed."""
    first = nodes[site.nodes[0]]
    inputs = [changed.get(i, v) for i, v in enumerate(first.inputs)]
    old = first.outputs[0]
    y = rewriter.op(
        first.op_type,
        inputs,
        attributes(first),
        outputs=len(first.outputs),
        name=f"{site.name}.{site.kind}",
        dtype=FLOAT,
    )
    for name in site.nodes[1:]:
        node = nodes[name]
        inputs = [y if v is old else v for v in node.inputs]
        old = node.outputs[0]
        y = rewriter.op(node.op_type, inputs, attributes(node), name=f"{site.name}.then", dtype=FLOAT)
    return y


def _stored(rewriter: Rewriter, weight: ir.Value, parameters: Mapping[str, Any], axis: int) -> ir.Value:
    """``Cast(codes) * scale`` in the weight's shape."""
    array = constant_array(weight)
    assert array is not None
    bits = int(parameters["weight_bits"])
    if bits == 8:
        made, form = channel_weights(weight, parameters, axis), channel_form(parameters, axis)
        shape = [1] * array.ndim
        shape[axis] = -1
        codes = shared(rewriter, weight, f"{form}.codes", made.codes)
        scale = shared(rewriter, weight, f"{form}.column", made.scale.reshape(shape))
        return _scaled(rewriter, weight, codes, None, scale)
    return _stored_blocks(rewriter, weight, parameters, axis)


def _stored_blocks(
    rewriter: Rewriter, weight: ir.Value, parameters: Mapping[str, Any], axis: int
) -> ir.Value:
    """Four bits: ``(Cast(codes) - Cast(zero)) * scale`` on ``[channels, blocks, block]``, shaped back."""
    block, clipping = int(parameters["block"]), parameters["clipping"]
    form = f"stored4x{block}.{clipping}.axis{axis}"
    array = constant_array(weight)
    assert array is not None
    moved = np.moveaxis(array, axis, 0)
    channels = moved.shape[0]
    # [K, channels]: blocks run along the reduction
    made = quantized(
        weight,
        form,
        lambda a: quantize_blocks(
            np.moveaxis(a, axis, 0).reshape(channels, -1).T, block=block, bits=4, clipping=clipping
        ),
    )
    assert made.zero_point is not None
    count = made.scale.shape[0]
    kind = ir.DataType.UINT4
    codes = shared(rewriter, weight, f"{form}.codes", made.codes.T.reshape(channels, count, block), kind)
    zero = shared(rewriter, weight, f"{form}.zero", made.zero_point.T.reshape(channels, count, 1), kind)
    scale = shared(rewriter, weight, f"{form}.scale", made.scale.T.reshape(channels, count, 1))
    real = _scaled(rewriter, weight, codes, zero, scale)
    shape = rewriter.constant(np.array(moved.shape, np.int64), f"{weight.name}.shape")
    real = rewriter.op("Reshape", [real, shape], name=f"{weight.name}.reshape", dtype=FLOAT)
    if axis == 0:
        return real
    order = list(np.argsort([axis, *(i for i in range(array.ndim) if i != axis)]))
    flags = {"perm": [int(i) for i in order]}
    return rewriter.op("Transpose", [real], flags, name=f"{weight.name}.transpose", dtype=FLOAT)


def _scaled(
    rewriter: Rewriter, weight: ir.Value, codes: ir.Value, zero: ir.Value | None, scale: ir.Value
) -> ir.Value:
    """``(Cast(codes) - Cast(zero)) * scale``."""
    name, flags = f"{weight.name}.stored", {"to": int(FLOAT)}
    real = rewriter.op("Cast", [codes], flags, name=f"{name}.cast", dtype=FLOAT)
    if zero is not None:
        offset = rewriter.op("Cast", [zero], flags, name=f"{name}.zero", dtype=FLOAT)
        real = rewriter.op("Sub", [real, offset], name=f"{name}.offset", dtype=FLOAT)
    return rewriter.op("Mul", [real, scale], name=f"{name}.scaled", dtype=FLOAT)


def _emit_rows(site: Site, parameters: Mapping[str, Any], rewriter: Rewriter, node: ir.Node) -> ir.Value:
    """Gather int8 rows and their scales: the table is never widened, so memory shrinks with the file."""
    table, rows = node.inputs[0], node.inputs[1]
    assert table is not None
    made, form = channel_weights(table, parameters, 0), channel_form(parameters, 0)
    codes = shared(rewriter, table, f"{form}.codes", made.codes)
    scale = shared(rewriter, table, f"{form}.column", made.scale.reshape(-1, 1))
    name, flags = site.name, {"axis": 0}
    picked = rewriter.op("Gather", [codes, rows], flags, name=f"{name}.rows", dtype=ir.DataType.INT8)
    steps = rewriter.op("Gather", [scale, rows], flags, name=f"{name}.scales", dtype=FLOAT)
    real = rewriter.op("Cast", [picked], {"to": int(FLOAT)}, name=f"{name}.cast", dtype=FLOAT)
    return rewriter.op("Mul", [real, steps], name=f"{name}.scaled", dtype=FLOAT)
