"""``w4a8``: weights in 4-bit blocks and activations in 8 bits, an operator's activations as its range asks.

The weight is DequantizeLinear in blocks (opset 21), the activation QuantizeLinear and DequantizeLinear with
one calibrated scale, or rounded by the largest element of each token at run time. ONNX Runtime 1.32 has no
kernel for the product of both: with a static scale it dequantizes the weight on every run, by token it does
what ``w4`` does and the rounding besides (docs/precision.md). So the form is offered by name only: it says
what 8-bit activations cost beside 4-bit weights, and serves runtimes that fuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.activations import activation_range
from lamina.passes.quantize.graph import FLOAT, quantize_dequantize, scalar
from lamina.passes.quantize.linear import linear_of
from lamina.passes.quantize.smoothing import choose_smoothing, smoothed
from lamina.passes.quantize.weight_only import write_blocks

NAME = "w4a8"
_LEVELS = 127


@dataclass(frozen=True)
class Policy:
    """How activations become 8 bits, by the largest magnitude that calibration saw.

    Attributes:
        static: Up to here one calibrated scale.
        equalized: Up to here one scale after logarithmic equalization, where that lowers the error of what
            the operators give; beyond, and where no range is known, a scale a token at run time.

    Source: Li et al. 2023, arXiv:2308.15987 (FPTQ). Deviates: equalization is judged on calibration vectors;
    scales between channels are powers of two.
    """

    static: float = 15.0
    equalized: float = 150.0


def activation_parameters(
    site: Site, program: Program, statistics: Any, ranges: str, policy: Policy | None = None
) -> dict[str, Any]:
    """What the option says of the activation: ``input`` for a static scale, ``smooth`` for equalization.

    Neither: a scale a token at run time.
    """
    policy = policy or Policy()
    given = activation_range(program, site.inputs[0], statistics, ranges)
    seen = (getattr(statistics, "ranges", None) or {}).get(site.inputs[0])
    if given is None or seen is None:
        return {}
    reach = max(-seen.minimum, seen.maximum)
    if reach <= policy.static:
        return {"input": given}
    if reach > policy.equalized:
        return {}
    found = choose_smoothing(program, site.inputs[0], statistics, rules=("log",), bits=4, ranges=ranges)
    if found is None:
        return {"input": given}
    chosen = {"scale": found.scale, "zero_point": found.zero_point}
    return {"input": chosen, "smooth": found.parameters()}


def emit_w4a8(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """MatMul or Gemm of a rounded activation and a weight in blocks."""
    product = smoothed(linear_of(site, nodes), option.parameters, rewriter)
    given = option.parameters.get("input")
    if given is None:
        x = _by_token(site, rewriter, product.activation)
    else:
        x = quantize_dequantize(rewriter, product.activation, given, f"{site.name}.input")
    return write_blocks(site, option.parameters, rewriter, product, x)


def _by_token(site: Site, rewriter: Rewriter, value: ir.Value) -> ir.Value:
    """``round(x / s) s``, s the largest magnitude of a token over 127, in float."""
    name = f"{site.name}.token"
    axis = rewriter.constant(np.array([-1], np.int64), f"{name}.axis")
    size = rewriter.op("Abs", [value], name=f"{name}.abs", dtype=FLOAT)
    largest = rewriter.op("ReduceMax", [size, axis], {"keepdims": 1}, name=f"{name}.max", dtype=FLOAT)
    least = scalar(rewriter, float(np.finfo(np.float32).tiny * _LEVELS), np.float32, f"{name}.least")
    bounded = rewriter.op("Max", [largest, least], name=f"{name}.bounded", dtype=FLOAT)
    levels = scalar(rewriter, float(_LEVELS), np.float32, f"{name}.levels")
    step = rewriter.op("Div", [bounded, levels], name=f"{name}.step", dtype=FLOAT)
    exact = rewriter.op("Div", [value, step], name=f"{name}.exact", dtype=FLOAT)
    codes = rewriter.op("Round", [exact], name=f"{name}.codes", dtype=FLOAT)
    result = rewriter.op("Mul", [codes, step], name=f"{name}.rounded", dtype=FLOAT)
    result.shape = value.shape
    return result
