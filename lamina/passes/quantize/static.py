"""``w8a8-static``: uint8 activations with calibrated ranges, int8 weights with one scale a channel.

Written as QuantizeLinear/DequantizeLinear pairs around the float operator, in the shapes that ONNX Runtime
1.32 turns into QLinearConv, QGemm and MatMulIntegerToFloat. What breaks its fusion, seen on optimized graphs:

* the int32 bias must have exactly scale ``s_x * s_w``, else the operator stays float;
* a Clip between Conv and QuantizeLinear keeps the Conv float (a Relu does not): it goes where the range
  implies it;
* MatMul + Add of a vector of the same rank becomes a float Gemm first: see :func:`_add_bias`;
* scales must be scalars, and neighbours must agree on a value's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.activations import saturates
from lamina.passes.quantize.coded import coded, from_rows
from lamina.passes.quantize.graph import (
    FLOAT,
    attributes,
    constant_array,
    dequantized_channels,
    quantize,
    quantize_dequantize,
    scalar,
    shared,
)
from lamina.passes.quantize.linear import Linear, linear_of
from lamina.passes.quantize.smoothing import smoothed
from lamina.passes.quantize.weights import QuantizedWeight, encode

# A bias in units of s_x * s_w must fit int32 with room for the sum it is added to.
_LARGEST_BIAS = 2.0**30


def channel_weights(value: ir.Value, parameters: Mapping[str, Any], axis: int) -> tuple[QuantizedWeight, str]:
    """The weight in int8 with one scale for each index of ``axis``, and what names that content."""
    found, array = coded(value, parameters, axis), constant_array(value)
    assert array is not None
    return QuantizedWeight(from_rows(found.codes, array.shape, axis), found.scale[:, 0]), found.form


def shifted(bias: np.ndarray | None, parameters: Mapping[str, Any]) -> np.ndarray | None:
    """The bias ``[channels]`` with the option's correction, or None where there is neither."""
    if "bias_shift" not in parameters:
        return bias
    shift = np.asarray(parameters["bias_shift"], np.float32)
    return shift if bias is None else np.asarray(bias + shift, np.float32)


def emit_conv(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """Conv with its activation: becomes QLinearConv."""
    conv, parameters = nodes[site.nodes[0]], option.parameters
    source, weight = conv.inputs[0], conv.inputs[1]
    assert source is not None
    assert weight is not None
    array = constant_array(conv.inputs[2]) if len(conv.inputs) > 2 else None
    array = shifted(array, parameters)
    x = quantize_dequantize(rewriter, source, parameters["input"], f"{site.name}.input")
    inputs = [x, *_weight_and_bias(site, rewriter, parameters, weight, 0, array)]
    y = rewriter.op("Conv", inputs, attributes(conv), name=f"{site.name}.conv", dtype=FLOAT)
    output = parameters["output"]
    activation = nodes[site.nodes[1]] if len(site.nodes) > 1 else None
    if activation is not None and not saturates(activation, output):
        # the Conv must see its quantizer directly, so the activation works on quantized values
        y = quantize_dequantize(rewriter, y, output, f"{site.name}.before")
        rest = list(activation.inputs[1:])
        name = f"{site.name}.activation"
        y = rewriter.op(activation.op_type, [y, *rest], attributes(activation), name=name, dtype=FLOAT)
    return quantize_dequantize(rewriter, y, output, f"{site.name}.output")


def emit_linear(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul or Gemm with its bias, float result: becomes MatMulIntegerToFloat or QGemm."""
    parameters = option.parameters
    product = smoothed(linear_of(site, nodes), parameters, rewriter)
    if product.left:
        return _emit_left(site, parameters, rewriter, product)
    x = quantize_dequantize(rewriter, product.activation, parameters["input"], f"{site.name}.input")
    bias = shifted(product.bias_vector(), parameters)
    two_dimensional = product.node.op_type == "Gemm" or _rank(product.activation) == 2
    if bias is None or not two_dimensional:
        (weight,) = _weight_and_bias(
            site, rewriter, parameters, product.weight, product.channel_axis, None, product.alpha
        )
        if not product.transposed:
            y = rewriter.op("MatMul", [x, weight], name=f"{site.name}.matmul", dtype=FLOAT)
            return y if bias is None else _add_bias(site, rewriter, product, y, bias)
        inputs = [x, weight]
    else:
        inputs = [
            x,
            *_weight_and_bias(
                site, rewriter, parameters, product.weight, product.channel_axis, bias, product.alpha
            ),
        ]
    flags = {"transB": int(product.transposed)}
    return rewriter.op("Gemm", inputs, flags, name=f"{site.name}.gemm", dtype=FLOAT)


def emit_product(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul of two activations, float result."""
    inputs = []
    for i, (value, given) in enumerate(
        zip(nodes[site.nodes[0]].inputs, option.parameters["inputs"], strict=True)
    ):
        assert value is not None
        inputs.append(quantize_dequantize(rewriter, value, given, f"{site.name}.input{i}"))
    return rewriter.op("MatMul", inputs, name=f"{site.name}.matmul", dtype=FLOAT)


def _weight_and_bias(
    site: Site,
    rewriter: Rewriter,
    parameters: Mapping[str, Any],
    weight: ir.Value,
    axis: int,
    bias: np.ndarray | None,
    alpha: float = 1.0,
) -> list[ir.Value]:
    """Dequantized int8 weight and, where there is a bias, dequantized int32 bias."""
    made, form = channel_weights(weight, parameters, axis)
    step = np.float32(parameters["input"]["scale"])
    if alpha != 1.0:
        # trap: a negative alpha would make negative scales; the codes take its sign
        codes = made.codes if alpha > 0 else -made.codes
        made = QuantizedWeight(codes, (made.scale * np.float32(abs(alpha))).astype(np.float32))
        form += f".alpha{alpha!r}"
    if bias is None:
        return [dequantized_channels(rewriter, weight, form, made, axis)]
    least = np.abs(bias.astype(np.float64)) / (float(step) * _LARGEST_BIAS)
    if (small := made.scale < least).any():
        limit = 2 ** (int(parameters["weight_bits"]) - 1) - 1
        made = _coarser(weight, axis, np.where(small, least, made.scale), alpha, limit)
        form += f".{site.name}"
    scale = (step * made.scale).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
    zero = rewriter.constant(np.zeros(len(codes), np.int32), f"{site.name}.bias.zero_point")
    inputs = [
        rewriter.constant(codes, f"{site.name}.bias.codes"),
        rewriter.constant(scale, f"{site.name}.bias.scale"),
        zero,
    ]
    name = f"{site.name}.bias.dequantize"
    return [
        dequantized_channels(rewriter, weight, form, made, axis),
        rewriter.op("DequantizeLinear", inputs, {"axis": 0}, name=name, dtype=FLOAT),
    ]


def _coarser(weight: ir.Value, axis: int, scale: np.ndarray, alpha: float, limit: int) -> QuantizedWeight:
    """The weight at other scales: a channel of nearly nothing with a real bias needs a larger one."""
    array = constant_array(weight)
    assert array is not None
    shape = [1] * array.ndim
    shape[axis] = -1
    wide = scale.astype(np.float32)
    return QuantizedWeight(encode(array * np.float32(alpha), wide.reshape(shape), limit), wide)


def _add_bias(site: Site, rewriter: Rewriter, product: Linear, y: ir.Value, bias: np.ndarray) -> ir.Value:
    """Add a bias to a product of rank 3 or more, or of unknown rank.

    trap: ONNX Runtime fuses MatMul + Add of a vector into a float Gemm before it looks at the quantized form,
    whenever it knows all dimensions. It does not touch a bias of the product's full rank, nor a Sum.
    """
    rank = _rank(product.activation)
    shape = (1,) * (rank - 1) + (-1,) if rank else (-1,)
    value = rewriter.constant(bias.reshape(shape), f"{site.name}.bias")
    return rewriter.op("Add" if rank else "Sum", [y, value], name=f"{site.name}.add", dtype=FLOAT)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _emit_left(site: Site, parameters: Mapping[str, Any], rewriter: Rewriter, product: Linear) -> ir.Value:
    """``W @ x``: no fused kernel takes a scale for each row of its left operand, so it is MatMulInteger."""
    made, form = channel_weights(product.weight, parameters, 0)
    codes, _, zero = quantize(rewriter, product.activation, parameters["input"], f"{site.name}.input")
    weight = shared(rewriter, product.weight, f"{form}.codes", made.codes)
    none = scalar(rewriter, 0, np.int8, f"{site.name}.zero")
    sums = rewriter.op(
        "MatMulInteger", [weight, codes, none, zero], name=f"{site.name}.matmul", dtype=ir.DataType.INT32
    )
    real = rewriter.op("Cast", [sums], {"to": int(FLOAT)}, name=f"{site.name}.cast", dtype=FLOAT)
    scale = np.float32(parameters["input"]["scale"]) * made.scale
    factor = rewriter.constant(scale.astype(np.float32).reshape(-1, 1), f"{site.name}.scale")
    return rewriter.op("Mul", [real, factor], name=f"{site.name}.scaled", dtype=FLOAT)
