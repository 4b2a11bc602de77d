"""Weights in few bits, arithmetic in float: ``w8``, ``w4``, ``w2`` in blocks, and ``stored-w8`` to ``-w2``.

The block forms are DequantizeLinear (opset 21; two bits, opset 25) into MatMul, which ONNX Runtime fuses into
MatMulNBits when the blocks run along the first axis of a ``[K, N]`` weight; with the weight transposed it
dequantizes on every run. It multiplies with activations in 8 bits unless told not to. The stored forms are
standard operators on constants: a runtime computes them once while loading, so the file shrinks and the time
of a run is the original's, for any operator. There is no 3-bit type and no kernel for one: three bits are
stored only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.bits import emit_codes, short_name
from lamina.passes.quantize.coded import Coded, coded
from lamina.passes.quantize.graph import FLOAT, attributes, common, constant_array, shared
from lamina.passes.quantize.higgs import rotation
from lamina.passes.quantize.linear import Linear, linear_of
from lamina.passes.quantize.static import channel_weights

_KINDS = {8: ir.DataType.INT8, 4: ir.DataType.UINT4, 2: ir.DataType.UINT2}


def emit_blocks(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul or Gemm with a weight in blocks: becomes MatMulNBits."""
    product = linear_of(site, nodes)
    return write_blocks(site, option.parameters, rewriter, product, product.activation)


def write_blocks(
    site: Site, parameters: Mapping[str, Any], rewriter: Rewriter, product: Linear, x: ir.Value
) -> ir.Value:
    """``x`` times the weight of ``product`` in blocks, and its bias."""
    rewriter.require_opset(int(parameters["opset"]))
    made, kind = coded(product.weight, parameters, product.channel_axis), _KINDS[parameters["weight_bits"]]
    scale = np.ascontiguousarray(made.scale.T) * np.float32(product.alpha)
    inputs = [
        shared(rewriter, product.weight, f"{made.form}.codes", _typed(made.codes.T, kind), kind),
        shared(rewriter, product.weight, f"{made.form}.alpha{product.alpha!r}.scale", scale),
    ]
    if made.zero.shape == made.scale.shape:
        zero = _typed(made.zero.T, kind)
        inputs.append(shared(rewriter, product.weight, f"{made.form}.zero_point", zero, kind))
    block = made.block
    flags = {"axis": 0, "block_size": block}
    weight = rewriter.op("DequantizeLinear", inputs, flags, name=f"{site.name}.dequantize", dtype=FLOAT)
    y = rewriter.op("MatMul", [x, weight], name=f"{site.name}.matmul", dtype=FLOAT)
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
    """``(codes - zero) * scale`` in the weight's shape."""
    array, bits = constant_array(weight), int(parameters["weight_bits"])
    assert array is not None
    if bits == 8:
        made, form = channel_weights(weight, parameters, axis)
        shape = [1] * array.ndim
        shape[axis] = -1
        codes = shared(rewriter, weight, f"{form}.codes", made.codes)
        real = rewriter.op(
            "Cast", [codes], {"to": int(FLOAT)}, name=f"{short_name(weight)}.cast", dtype=FLOAT
        )
        scale = shared(rewriter, weight, f"{form}.column", made.scale.reshape(shape))
        return rewriter.op("Mul", [real, scale], name=f"{short_name(weight)}.scaled", dtype=FLOAT)
    return _stored_blocks(rewriter, weight, coded(weight, parameters, axis), bits, axis)


def _stored_blocks(rewriter: Rewriter, weight: ir.Value, made: Coded, bits: int, axis: int) -> ir.Value:
    """``(codes - zero) * scale`` on ``[channels, blocks, block]``, shaped back."""
    array = constant_array(weight)
    assert array is not None
    moved = np.moveaxis(array, axis, 0)
    shape = (len(moved), made.scale.shape[1], made.block)
    if bits == 4:
        kind = ir.DataType.UINT4
        codes = shared(rewriter, weight, f"{made.form}.codes", _typed(made.codes.reshape(shape), kind), kind)
        real = rewriter.op(
            "Cast", [codes], {"to": int(FLOAT)}, name=f"{short_name(weight)}.cast", dtype=FLOAT
        )
    else:
        real = emit_codes(rewriter, weight, made.form, made.codes, bits, shape)
    return unblocked(rewriter, weight, _scaled(rewriter, weight, made, real), axis)


def unblocked(rewriter: Rewriter, weight: ir.Value, real: ir.Value, axis: int) -> ir.Value:
    """``[channels, blocks, block]`` in the weight's shape, whose ``axis`` numbers channels."""
    array = constant_array(weight)
    assert array is not None
    moved = np.moveaxis(array, axis, 0)
    name = f"lamina.shape{'x'.join(map(str, moved.shape))}"
    dims = common(rewriter, np.array(moved.shape, np.int64), name)
    real = rewriter.op("Reshape", [real, dims], name=f"{short_name(weight)}.reshape", dtype=FLOAT)
    if axis == 0:
        return real
    order = list(np.argsort([axis, *(i for i in range(array.ndim) if i != axis)]))
    flags = {"perm": [int(i) for i in order]}
    return rewriter.op("Transpose", [real], flags, name=f"{short_name(weight)}.transpose", dtype=FLOAT)


def _scaled(rewriter: Rewriter, weight: ir.Value, made: Coded, codes: ir.Value) -> ir.Value:
    """Codes as float32 ``[channels, blocks, block]`` -> what they stand for."""
    name = short_name(weight)
    if made.levels is None:
        if made.zero.size == 1:
            zero = common(rewriter, made.zero.reshape(()), f"lamina.zero{float(made.zero[0, 0])!r}")
        else:
            kind = ir.DataType.UINT4
            points = shared(rewriter, weight, f"{made.form}.zero", _typed(made.zero[:, :, None], kind), kind)
            zero = rewriter.op("Cast", [points], {"to": int(FLOAT)}, name=f"{name}.zero", dtype=FLOAT)
        real = rewriter.op("Sub", [codes, zero], name=f"{name}.offset", dtype=FLOAT)
        return rewriter.op("Mul", [real, _scales(rewriter, weight, made)], name=f"{name}.scaled", dtype=FLOAT)
    kind = ir.DataType.INT32
    index = rewriter.op("Cast", [codes], {"to": int(kind)}, name=f"{name}.index", dtype=kind)
    levels = common(rewriter, made.levels, f"lamina.levels{len(made.levels)}")
    real = rewriter.op("Gather", [levels, index], {"axis": 0}, name=f"{name}.levels", dtype=FLOAT)
    real = rewriter.op("Mul", [real, _scales(rewriter, weight, made)], name=f"{name}.scaled", dtype=FLOAT)
    matrix = common(rewriter, rotation(made.block), f"lamina.rotation{made.block}")
    return rewriter.op("MatMul", [real, matrix], name=f"{name}.turned", dtype=FLOAT)


def _scales(rewriter: Rewriter, weight: ir.Value, made: Coded) -> ir.Value:
    """Scales ``[channels, groups, 1]`` as float32, kept in float16 where that changes none."""
    column = made.scale[:, :, None]
    with np.errstate(over="ignore"):
        half = column.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), column):
        return shared(rewriter, weight, f"{made.form}.scale", column)
    kept = shared(rewriter, weight, f"{made.form}.scale16", half)
    return rewriter.op("Cast", [kept], {"to": int(FLOAT)}, name=f"{short_name(weight)}.widen", dtype=FLOAT)


def _typed(codes: np.ndarray, kind: ir.DataType) -> np.ndarray:
    return np.ascontiguousarray(codes).astype(kind.numpy())


def _emit_rows(site: Site, parameters: Mapping[str, Any], rewriter: Rewriter, node: ir.Node) -> ir.Value:
    """Gather rows of codes and their scales: the table is never widened, so memory shrinks with the file."""
    table, rows = node.inputs[0], node.inputs[1]
    assert table is not None
    made, name, flags = coded(table, parameters, 0), site.name, {"axis": 0}
    scale = shared(rewriter, table, f"{made.form}.column", made.scale)
    steps = rewriter.op("Gather", [scale, rows], flags, name=f"{name}.scales", dtype=FLOAT)
    if parameters["weight_bits"] == 8:
        codes = shared(rewriter, table, f"{made.form}.codes", made.codes)
        picked = rewriter.op("Gather", [codes, rows], flags, name=f"{name}.rows", dtype=ir.DataType.INT8)
        real = rewriter.op("Cast", [picked], {"to": int(FLOAT)}, name=f"{name}.cast", dtype=FLOAT)
    else:
        real = _gather_nibbles(site, rewriter, table, rows, made)
        zero = common(rewriter, made.zero.reshape(()), f"lamina.zero{float(made.zero[0, 0])!r}")
        real = rewriter.op("Sub", [real, zero], name=f"{name}.offset", dtype=FLOAT)
    return rewriter.op("Mul", [real, steps], name=f"{name}.scaled", dtype=FLOAT)


def _gather_nibbles(
    site: Site, rewriter: Rewriter, table: ir.Value, rows: ir.Value | None, made: Coded
) -> ir.Value:
    """Rows of 4-bit codes as float32.

    No runtime gathers 4-bit types, so a byte holds two codes, half a row apart: Concat then puts them in
    order without knowing how many dimensions the index has.
    """
    half, name, kind = made.codes.shape[1] // 2, site.name, ir.DataType.UINT8
    raw = made.codes[:, :half] | (made.codes[:, half:] << np.uint8(4))
    codes = shared(rewriter, table, f"{made.form}.nibbles", raw)
    picked = rewriter.op("Gather", [codes, rows], {"axis": 0}, name=f"{name}.rows", dtype=kind)
    base = common(rewriter, np.array(16, np.uint8), "lamina.base4")
    places = common(rewriter, np.array(4, np.uint8), "lamina.place4")
    low = rewriter.op("Mod", [picked, base], name=f"{name}.low", dtype=kind)
    high = rewriter.op("BitShift", [picked, places], {"direction": "RIGHT"}, name=f"{name}.high", dtype=kind)
    both = rewriter.op("Concat", [low, high], {"axis": -1}, name=f"{name}.codes", dtype=kind)
    return rewriter.op("Cast", [both], {"to": int(FLOAT)}, name=f"{name}.cast", dtype=FLOAT)
