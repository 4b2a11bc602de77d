"""FX form of Resize: any rank, separable, differentiable; coordinates as the specification writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lamina.ir.fx_values import Floats, Ints, axes_of, floats, ints


def resize(
    x: Tensor,
    roi: Floats = None,
    scales: Floats = None,
    sizes: Ints = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Sampled anew along axes: nearest, linear or cubic, with or without an antialiasing filter."""
    along = axes_of(axes, x.ndim)
    along = list(range(x.ndim)) if along is None else along
    factors, wanted = _extent(x, along, floats(scales), ints(sizes), keep_aspect_ratio_policy)
    region = floats(roi)
    for i, axis in enumerate(along):
        size, out, factor = x.shape[axis], wanted[i], factors[i]
        crop = coordinate_transformation_mode == "tf_crop_and_resize"
        if out == size and factor == 1 and not crop:
            continue
        bounds = (region[i], region[i + len(along)]) if crop and region else (0.0, 1.0)
        place = _places(size, out, factor, coordinate_transformation_mode, bounds)
        if mode == "nearest":
            index = _nearest(place, nearest_mode).clamp(0, size - 1).to(x.device)
            y = torch.index_select(x, axis, index)
        else:
            narrow = min(factor, 1.0) if antialias else 1.0
            taps, weights = _taps(place, size, mode, narrow, cubic_coeff_a, bool(exclude_outside))
            y = _mixed(x, axis, taps, weights)
        if crop:
            outside = ((place < 0) | (place > size - 1)).to(x.device)
            dims = [-1 if d == axis else 1 for d in range(x.ndim)]
            y = torch.where(outside.reshape(dims), torch.full_like(y, extrapolation_value), y)
        x = y
    return x


def _extent(
    x: Tensor, axes: Sequence[int], scales: list[float] | None, sizes: list[int] | None, policy: str
) -> tuple[list[float], list[int]]:
    """Factor and output size of each axis."""
    now = [x.shape[a] for a in axes]
    if scales is not None:
        return scales, [math.floor(n * s) for n, s in zip(now, scales, strict=True)]
    wanted = sizes or []
    factors = [w / n for w, n in zip(wanted, now, strict=True)]
    if policy == "stretch":
        return factors, wanted
    one = min(factors) if policy == "not_larger" else max(factors)
    return [one] * len(factors), [math.floor(one * n + 0.5) for n in now]


def _places(size: int, out: int, factor: float, mode: str, bounds: tuple[float, float]) -> Tensor:
    """Where each output position lies on the input axis."""
    at = torch.arange(out, dtype=torch.float64)
    length = factor * size
    if mode == "align_corners":
        # the specification's length is the exact one, scale times size, not the whole number below it
        return at * (size - 1) / (length - 1) if length > 1 else torch.zeros(out, dtype=torch.float64)
    if mode == "asymmetric":
        return at / factor
    if mode == "tf_crop_and_resize":
        start, end = bounds
        if out > 1:
            return start * (size - 1) + at * (end - start) * (size - 1) / (out - 1)
        return torch.full((out,), 0.5 * (start + end) * (size - 1), dtype=torch.float64)
    if mode == "pytorch_half_pixel" and out <= 1:
        return torch.zeros(out, dtype=torch.float64)
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - out / length) + (at + 0.5) / factor - 0.5
    return (at + 0.5) / factor - 0.5


def _nearest(place: Tensor, mode: str) -> Tensor:
    below = torch.floor(place)
    rounded = {
        "floor": below,
        "ceil": torch.ceil(place),
        "round_prefer_floor": torch.ceil(place - 0.5),
        "round_prefer_ceil": torch.floor(place + 0.5),
    }
    return rounded[mode].long()


def _linear(a: float) -> Callable[[Tensor], Tensor]:
    return lambda d: torch.clamp(1 - d, min=0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    def kernel(d: Tensor) -> Tensor:
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))

    return kernel


def _taps(
    place: Tensor, size: int, mode: str, narrow: float, a: float, exclude: bool
) -> tuple[Tensor, Tensor]:
    """Inputs ``[out, taps]`` each output is made of, and their weights, which sum to 1."""
    radius, kernel = (1, _linear(a)) if mode == "linear" else (2, _cubic(a))
    reach = math.ceil(radius / narrow)
    base = torch.floor(place).long()
    taps = base[:, None] + torch.arange(-reach + 1, reach + 1)[None]
    weights = kernel(torch.abs(taps - place[:, None]) * narrow)
    if exclude or narrow < 1:
        if exclude:
            weights = torch.where((taps >= 0) & (taps < size), weights, torch.zeros_like(weights))
        weights = weights / weights.sum(1, keepdim=True)
    return taps.clamp(0, size - 1), weights


def _mixed(x: Tensor, axis: int, taps: Tensor, weights: Tensor) -> Tensor:
    kind = x.dtype if x.dtype.is_floating_point else torch.float32
    dims = [-1 if d == axis else 1 for d in range(x.ndim)]
    y = None
    for tap, weight in zip(taps.T, weights.T, strict=True):
        part = torch.index_select(x, axis, tap.to(x.device)).to(kind)
        part = part * weight.to(device=x.device, dtype=kind).reshape(dims)
        y = part if y is None else y + part
    if y is None or x.dtype.is_floating_point:
        return x if y is None else y
    limits = torch.iinfo(x.dtype)
    return torch.clamp(torch.round(y), limits.min, limits.max).to(x.dtype)
