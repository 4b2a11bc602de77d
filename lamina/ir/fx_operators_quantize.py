"""FX forms of quantization. Nothing is straight-through: integers carry no gradient, so it ends here.

``DequantizeLinear`` still passes gradients to its scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.ir.fx_operators_conv import conv
from lamina.ir.fx_values import axis_of, widened


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts to ``x``: for all, per axis, or per block of it."""
    if parameter.numel() == 1 and not block_size:
        return parameter.reshape(())
    axis = axis_of(axis, x.ndim)
    if block_size:
        return torch.narrow(parameter.repeat_interleave(block_size, axis), axis, 0, x.shape[axis])
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.clamp(x, limits.min, limits.max).to(dtype)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    precision: torch.dtype | None = None,
    saturate: int = 1,
) -> Tensor:
    """Integers round(x / scale) + zero point, halves to even, cut to the type's range."""
    kind = zero_point.dtype if zero_point is not None else output_dtype or torch.uint8
    wide = widened(x) if precision is None else x.to(precision)
    levels = torch.round(wide / _spread(scale, x, axis, block_size).to(wide.dtype))
    if zero_point is not None:
        levels = levels + _spread(zero_point, x, axis, block_size)
    return _saturated(levels, kind)


def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - zero point) * scale."""
    wide = x.to(torch.int32)
    if zero_point is not None:
        wide = wide - _spread(zero_point, x, axis, block_size).to(torch.int32)
    y = wide.to(widened(scale).dtype) * widened(_spread(scale, x, axis, block_size))
    return y.to(output_dtype or scale.dtype)


def quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of the tensor itself, zero included; with scale and zero point."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    low, high = torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)
    scale = (high - low) / 255
    # A tensor of zeros only has no range: any scale gives it back.
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = _saturated(torch.round(-low / safe), torch.uint8)
    levels = torch.round(x / safe) + zero_point.to(x.dtype)
    return _saturated(levels, torch.uint8), scale, zero_point


def _centred(x: Tensor, zero_point: Tensor | None, *, per: str = "") -> Tensor:
    """Integers minus their zero point, as float64: products of 8-bit numbers stay exact in it."""
    wide = x.double()
    if zero_point is None:
        return wide
    shift = zero_point.double()
    if zero_point.numel() > 1 and zero_point.ndim == 1:
        shift = shift[:, None] if per == "row" else shift
    return wide - shift


def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """Product of integers in int32."""
    y = torch.matmul(_centred(a, a_zero_point, per="row"), _centred(b, b_zero_point, per="column"))
    return y.to(torch.int64).to(torch.int32)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Convolution of integers in int32."""
    return conv(_centred(x, x_zero_point), _per_channel(w, w_zero_point), **options).long().to(torch.int32)


def _per_channel(w: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is None:
        return w.double()
    return w.double() - zero_point.double().reshape(-1, *[1] * (w.ndim - 1))


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
) -> Tensor:
    """Product of quantized matrices, quantized."""
    y = torch.matmul(_centred(a, a_zero, per="row"), _centred(b, b_zero, per="column"))
    left = a_scale.double()
    factor = (left[:, None] if left.ndim == 1 and left.numel() > 1 else left) * b_scale.double()
    return _saturated(torch.round(y * factor / scale.double()) + zero.double(), zero.dtype)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Convolution of quantized tensors, quantized; the bias is in units of both scales."""
    y = conv(_centred(x, x_zero), _per_channel(w, w_zero), None if bias is None else bias.double(), **options)
    factor = x_scale.double() * w_scale.double().reshape(-1, *[1] * (x.ndim - 2)) / scale.double()
    return _saturated(torch.round(y * factor) + zero.double(), zero.dtype)
