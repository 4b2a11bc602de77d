"""``w8a8-dynamic``: activations quantized at run time by their own range, int8 weights a scale a channel.

DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (-> Add), which ONNX Runtime fuses into
DynamicQuantizeMatMul, or MatMulIntegerToFloat where several products share one quantized activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.graph import FLOAT, attributes, constant_array, scalar, shared
from lamina.passes.quantize.linear import linear_of
from lamina.passes.quantize.smoothing import smoothed
from lamina.passes.quantize.static import channel_weights, shifted


def emit_linear(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul or Gemm with its bias."""
    parameters = option.parameters
    product = smoothed(linear_of(site, nodes), parameters, rewriter)
    axis = product.channel_axis
    made, form = channel_weights(product.weight, parameters, axis)
    codes = made.codes.T if product.transposed else made.codes
    weight = shared(rewriter, product.weight, f"{form}{'.t' * product.transposed}.codes", codes)
    x, step, zero = _quantize(site, rewriter, product.activation)
    if product.left:
        inputs = [weight, x, scalar(rewriter, 0, np.int8, f"{site.name}.zero"), zero]
    else:
        points = shared(rewriter, product.weight, f"{form}.zero_point", np.zeros(len(made.scale), np.int8))
        inputs = [x, weight, zero, points]
    scale = made.scale * np.float32(product.alpha)
    shape = (-1, 1) if product.left else (-1,)
    y = _to_float(site, rewriter, "MatMulInteger", inputs, {}, step, scale.astype(np.float32).reshape(shape))
    bias = shifted(product.bias_vector(), parameters)
    if bias is None:
        return y
    value = rewriter.constant(bias, f"{site.name}.bias")
    return rewriter.op("Add", [y, value], name=f"{site.name}.add", dtype=FLOAT)


def emit_conv(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """Conv as ConvInteger: offered on request only, for it is slower than float on the CPUs measured."""
    conv, parameters = nodes[site.nodes[0]], option.parameters
    source, value = conv.inputs[0], conv.inputs[1]
    assert source is not None
    assert value is not None
    made, form = channel_weights(value, parameters, 0)
    weight = shared(rewriter, value, f"{form}.codes", made.codes)
    x, step, zero = _quantize(site, rewriter, source)
    column = (-1,) + (1,) * (made.codes.ndim - 2)
    inputs = [x, weight, zero]
    y = _to_float(site, rewriter, "ConvInteger", inputs, attributes(conv), step, made.scale.reshape(column))
    array = shifted(constant_array(conv.inputs[2]) if len(conv.inputs) > 2 else None, parameters)
    if array is not None:
        bias = rewriter.constant(array.reshape(column), f"{site.name}.bias")
        y = rewriter.op("Add", [y, bias], name=f"{site.name}.add", dtype=FLOAT)
    if len(site.nodes) > 1:
        last = nodes[site.nodes[1]]
        rest = [y, *last.inputs[1:]]
        y = rewriter.op(last.op_type, rest, attributes(last), name=f"{site.name}.activation", dtype=FLOAT)
    return y


def emit_product(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul of two activations: both by their own ranges at run time."""
    first, second = nodes[site.nodes[0]].inputs
    assert first is not None
    assert second is not None
    a, a_step, a_zero = _quantize(site, rewriter, first)
    b, b_step, b_zero = _quantize(site, rewriter, second)
    name = f"{site.name}.product"
    sums = rewriter.op("MatMulInteger", [a, b, a_zero, b_zero], name=name, dtype=ir.DataType.INT32)
    real = rewriter.op("Cast", [sums], {"to": int(FLOAT)}, name=f"{site.name}.cast", dtype=FLOAT)
    factor = rewriter.op("Mul", [a_step, b_step], name=f"{site.name}.scale", dtype=FLOAT)
    return rewriter.op("Mul", [real, factor], name=f"{site.name}.scaled", dtype=FLOAT)


def _quantize(site: Site, rewriter: Rewriter, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, scale and zero point of an activation, by its own range at run time."""
    name = f"{site.name}.quantize"
    first = rewriter.op(
        "DynamicQuantizeLinear",
        [value],
        outputs=3,
        name=name,
        dtype=ir.DataType.UINT8,
        shape=value.shape,
    )
    node = first.producer()
    assert node is not None
    codes, step, zero = node.outputs
    step.dtype, zero.dtype = FLOAT, ir.DataType.UINT8
    step.shape = zero.shape = ir.Shape([])
    return codes, step, zero


def _to_float(
    site: Site,
    rewriter: Rewriter,
    op_type: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, Any],
    step: ir.Value,
    scale: np.ndarray,
) -> ir.Value:
    """The integer operator, and its sums times both scales."""
    sums = rewriter.op(op_type, inputs, attributes, name=f"{site.name}.product", dtype=ir.DataType.INT32)
    real = rewriter.op("Cast", [sums], {"to": int(FLOAT)}, name=f"{site.name}.cast", dtype=FLOAT)
    constant = rewriter.constant(scale, f"{site.name}.weight_scale")
    if scale.ndim == 2 and op_type == "MatMulInteger":
        # trap: ONNX Runtime fuses cast * (step * scale) into a kernel that has no int8 x uint8 form and takes
        # the scales of rows for those of columns; scaling by one after the other is not fused
        rows = rewriter.op("Mul", [real, constant], name=f"{site.name}.rows", dtype=FLOAT)
        return rewriter.op("Mul", [rows, step], name=f"{site.name}.scaled", dtype=FLOAT)
    factor = rewriter.op("Mul", [step, constant], name=f"{site.name}.scale", dtype=FLOAT)
    return rewriter.op("Mul", [real, factor], name=f"{site.name}.scaled", dtype=FLOAT)
