"""FX forms of reductions, running sums and normalizations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lamina.ir.fx_values import Ints, axes_of, axis_of, ints, widened


def _reduced(
    x: Tensor, axes: Ints, keepdims: int, noop: int, by: Callable[[Tensor, list[int], bool], Tensor]
) -> Tensor:
    chosen = axes_of(axes, x.ndim)
    if not chosen:
        if noop:
            return by(x.unsqueeze(0), [0], False)  # of one element each: the elementwise part still applies
        chosen = list(range(x.ndim))
    if not chosen:  # a scalar, all of whose axes are none
        return by(x.reshape(1), [0], False)
    return by(x, chosen, bool(keepdims))


def reduce_sum(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Sum over axes."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _sum)


def reduce_mean(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Mean over axes."""

    def by(t: Tensor, along: list[int], keep: bool) -> Tensor:
        if t.dtype.is_floating_point:
            return torch.mean(t, along, keep)
        count = math.prod(t.shape[a] for a in along)
        return torch.div(_sum(t, along, keep), count, rounding_mode="trunc").to(t.dtype)

    return _reduced(x, axes, keepdims, noop_with_empty_axes, by)


def reduce_max(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Largest over axes."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: _extreme(t, a, k, True))


def reduce_min(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Smallest over axes."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: _extreme(t, a, k, False))


def reduce_prod(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Product over axes."""

    def by(t: Tensor, along: list[int], keep: bool) -> Tensor:
        for axis in sorted(along, reverse=True):
            t = torch.prod(t, axis, keep, dtype=t.dtype)
        return t

    return _reduced(x, axes, keepdims, noop_with_empty_axes, by)


def reduce_l1(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Sum of magnitudes."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: _sum(torch.abs(t), a, k))


def reduce_l2(x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Root of the sum of squares."""

    def by(t: Tensor, along: list[int], keep: bool) -> Tensor:
        if t.dtype.is_floating_point:
            return torch.linalg.vector_norm(t, dim=along, keepdim=keep)
        return torch.sqrt(_sum(t.double() * t.double(), along, keep)).to(t.dtype)

    return _reduced(x, axes, keepdims, noop_with_empty_axes, by)


def reduce_sum_square(
    x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Sum of squares."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: _sum(t * t, a, k))


def reduce_log_sum(
    x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Logarithm of the sum."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: torch.log(_sum(t, a, k)))


def reduce_log_sum_exp(
    x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Logarithm of the sum of exponentials."""
    return _reduced(x, axes, keepdims, noop_with_empty_axes, torch.logsumexp)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, largest).bool()
    if any(x.shape[a] == 0 for a in axes):
        kind = torch.finfo(x.dtype) if x.dtype.is_floating_point else torch.iinfo(x.dtype)
        least = -math.inf if x.dtype.is_floating_point else kind.min
        most = math.inf if x.dtype.is_floating_point else kind.max
        dims = [1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes]
        return torch.full(dims, least if largest else most, dtype=x.dtype, device=x.device)
    return torch.amax(x, axes, keep) if largest else torch.amin(x, axes, keep)


def cum_sum(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sum, with or without the element itself, from either end."""
    return _running(x, axis, exclusive, reverse, torch.cumsum, 0)


def cum_prod(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running product, likewise."""
    return _running(x, axis, exclusive, reverse, torch.cumprod, 1)


def _running(
    x: Tensor, axis: Ints, exclusive: int, reverse: int, by: Callable[..., Tensor], start: int
) -> Tensor:
    along = (ints(axis) or [0])[0]
    if reverse:
        x = torch.flip(x, [along])
    if exclusive and x.shape[along]:
        first = torch.full_like(torch.narrow(x, along, 0, 1), start)
        x = torch.cat([first, torch.narrow(x, along, 0, x.shape[along] - 1)], along)
    y = by(x, along, dtype=x.dtype)
    return torch.flip(y, [along]) if reverse else y


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> tuple[Tensor]:
    """Inference: normalized by the stored statistics of each channel."""
    dims = [1, -1] + [1] * (x.ndim - 2)
    kind = torch.promote_types(widened(x).dtype, widened(mean).dtype)
    factor = scale.to(kind) * torch.rsqrt(variance.to(kind) + epsilon)
    shift = bias.to(kind) - mean.to(kind) * factor
    return ((x.to(kind) * factor.reshape(dims) + shift.reshape(dims)).to(x.dtype),)


def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centred and scaled over the axes from ``axis`` on; also the mean and the inverse deviation."""
    axes = list(range(axis_of(axis, x.ndim), x.ndim))
    wide = widened(x)
    mean = torch.mean(wide, axes, True)
    centred = wide - mean
    inverse = torch.rsqrt(torch.mean(centred * centred, axes, True) + epsilon)
    y = (centred * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


def rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Scaled by the root of the mean square over the axes from ``axis`` on."""
    axes = list(range(axis_of(axis, x.ndim), x.ndim))
    wide = widened(x)
    inverse = torch.rsqrt(torch.mean(wide * wide, axes, True) + epsilon)
    return ((wide * inverse).to(x.dtype) * scale).to(scale.dtype)


def group_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    opset: int = 21,
) -> Tensor:
    """Centred and scaled over the channels of a group and all positions.

    Up to opset 20 scale and bias have one number a group, afterwards one a channel.
    """
    wide = widened(x)
    parts = wide.reshape(x.shape[0], num_groups, -1)
    centred = parts - torch.mean(parts, -1, True)
    normal = centred * torch.rsqrt(torch.mean(centred * centred, -1, True) + epsilon)
    dims = [1, -1] + [1] * (x.ndim - 2)
    if opset < 21:
        scale, bias = (t.repeat_interleave(x.shape[1] // num_groups) for t in (scale, bias))
    y = normal.reshape(x.shape) * scale.to(wide.dtype).reshape(dims) + bias.to(wide.dtype).reshape(dims)
    return y.to(x.dtype)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Centred and scaled over the positions of each channel."""
    return group_norm(x, scale, bias, num_groups=x.shape[1], epsilon=epsilon)


def mean_variance_norm(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Centred and divided by the deviation over axes."""
    centred = x - torch.mean(x, list(axes), True)
    return centred / (torch.sqrt(torch.mean(centred * centred, list(axes), True)) + 1e-9)


def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divided by the 1- or 2-norm along an axis; zero where that is zero."""
    length = torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / torch.where(length == 0, 1.0, length))


def local_response_norm(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Divided by a power of the squares summed over neighbouring channels."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    square = x * x
    empty = [torch.zeros_like(square[:, :1])]
    sums = torch.cumsum(torch.cat([*empty, square], 1), 1)
    count = x.shape[1]
    place = torch.arange(count, device=x.device)
    window = sums[:, (place + after + 1).clamp(max=count)] - sums[:, (place - before).clamp(min=0)]
    return x / torch.pow(bias + alpha / size * window, beta)
