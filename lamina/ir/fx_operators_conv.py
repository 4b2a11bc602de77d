"""FX forms of convolutions and pools over any number of spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.ir.fx_values import Ints, ints

Numbers = Sequence[int] | None

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _pads(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], auto_pad: str, pads: Numbers
) -> list[int]:
    """Begins, then ends; ``kernel`` is the extent with dilation."""
    rank = len(kernel)
    if auto_pad == "NOTSET":
        return list(pads) if pads is not None else [0] * 2 * rank
    if auto_pad == "VALID":
        return [0] * 2 * rank
    totals = []
    for size, extent, stride in zip(x.shape[2:], kernel, strides, strict=True):
        totals.append(max((-(-size // stride) - 1) * stride + extent - size, 0))
    return _shared(totals, begin_less=auto_pad == "SAME_UPPER")


def _shared(totals: Sequence[int], *, begin_less: bool) -> list[int]:
    begins = [t // 2 if begin_less else t - t // 2 for t in totals]
    return begins + [t - b for t, b in zip(totals, begins, strict=True)]


def _padded(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    rank = len(pads) // 2
    flat = [n for i in reversed(range(rank)) for n in (pads[i], pads[i + rank])]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Numbers = None,
    group: int = 1,
    kernel_shape: Numbers = None,
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """Convolution over one to three spatial axes."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    around = _pads(x, extent, steps, auto_pad, pads)
    inside: Sequence[int] = [0] * rank
    if around[:rank] == around[rank:]:
        inside = around[:rank]
    else:
        x = _padded(x, around)
    return _CONV[rank](x, weight, bias, steps, inside, spread, group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Numbers = None,
    group: int = 1,
    kernel_shape: Numbers = None,
    output_padding: Numbers = None,
    output_shape: Numbers = None,
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """The adjoint of convolution: the full result, cut by the pads, grown by the output padding."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    full = _CONV_TRANSPOSE[rank](x, weight, None, steps, 0, 0, group, spread)
    whole = [f + e for f, e in zip(full.shape[2:], extra, strict=True)]
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [s * n for s, n in zip(steps, x.shape[2:], strict=True)]
    if output_shape is not None:
        totals = [w - o for w, o in zip(whole, output_shape, strict=True)]
        # trap: without SAME_UPPER, the larger half of an odd total comes first
        around = _shared(totals, begin_less=auto_pad == "SAME_UPPER")
    else:
        around = list(pads or [0] * 2 * rank) if auto_pad == "NOTSET" else [0] * 2 * rank
    change = [-p for p in around[:rank]] + [e - p for e, p in zip(extra, around[rank:], strict=True)]
    y = _padded(full, change)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


class _Window:
    """Geometry of a pool: what to pad so that plain windows give the size the operator asks for."""

    def __init__(
        self,
        x: Tensor,
        kernel: Sequence[int],
        strides: Numbers,
        dilations: Numbers,
        auto_pad: str,
        pads: Numbers,
        ceil_mode: int,
    ) -> None:
        rank = len(kernel)
        self.kernel = list(kernel)
        self.strides = list(strides or [1] * rank)
        self.dilations = list(dilations or [1] * rank)
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        self.pads = _pads(x, extent, self.strides, auto_pad, pads)
        begins, ends = self.pads[:rank], self.pads[rank:]
        self.extra = []
        for i, size in enumerate(x.shape[2:]):
            room = size + begins[i] + ends[i] - extent[i]
            count = (-(-room // self.strides[i]) if ceil_mode else room // self.strides[i]) + 1
            if ceil_mode and (count - 1) * self.strides[i] >= size + begins[i]:
                count -= 1  # a window that would start in the padding behind is left out
            self.extra.append(max((count - 1) * self.strides[i] - room, 0))
        self.all = begins + [e + x_ for e, x_ in zip(ends, self.extra, strict=True)]

    def parts(self, x: Tensor, value: float = 0) -> Tensor:
        """Windows ``[n, c, *out, *kernel]`` of the padded input."""
        x = _padded(x, self.all, value)
        for i, (k, s, d) in enumerate(zip(self.kernel, self.strides, self.dilations, strict=True)):
            x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum of each window."""
        return self.parts(x).sum(list(range(-len(self.kernel), 0)))


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Numbers = None,
    pads: Numbers = None,
    storage_order: int = 0,
    strides: Numbers = None,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Largest of each window, and where in the whole input it stood."""
    window = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    least = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    padded = _padded(x if x.dtype.is_floating_point else x.long(), window.all, least)
    rank = len(kernel_shape)
    pool = _MAX_POOL[rank]
    if x.dtype.is_floating_point and outputs == 1:
        return (pool(padded, window.kernel, window.strides, 0, window.dilations),)
    # Integers: a window's maximum needs no kernel of its own, and the place is that of float64, exact here.
    best, at = pool(
        padded if x.dtype.is_floating_point else padded.double(),
        window.kernel,
        window.strides,
        0,
        window.dilations,
        return_indices=True,
    )
    place, stride, where = torch.zeros_like(at), 1, at
    order = range(rank) if storage_order else reversed(range(rank))
    coordinates = {}
    for i in reversed(range(rank)):
        coordinates[i] = torch.remainder(where, padded.shape[2 + i]) - window.pads[i]
        where = torch.div(where, padded.shape[2 + i], rounding_mode="trunc")
    for i in order:
        place = place + coordinates[i] * stride
        stride *= x.shape[2 + i]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * rank)
    return best.to(x.dtype), place + planes * stride


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Numbers = None,
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """Mean of each window, over the elements of the input or those of the padding too."""
    window = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    ones = x.new_ones(1, 1, *x.shape[2:])
    if count_include_pad:
        ones = _padded(ones, window.pads, 1)
        counted = _Window(ones, kernel_shape, strides, dilations, "NOTSET", None, 0)
        counted.all = [0] * len(kernel_shape) + window.extra
        return window.sum(x) / counted.sum(ones)
    return window.sum(x) / window.sum(ones)


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Numbers = None,
    p: int = 2,
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """p-norm of each window."""
    window = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    return torch.pow(window.sum(torch.pow(torch.abs(x), p)), 1 / p)


def max_unpool(
    x: Tensor,
    index: Tensor,
    target: Ints = None,
    *,
    kernel_shape: Sequence[int],
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """Values at the places a MaxPool found them, zeros elsewhere."""
    rank = len(kernel_shape)
    steps, around = list(strides or [1] * rank), list(pads or [0] * 2 * rank)
    natural = [*x.shape[:2]]
    for i, size in enumerate(x.shape[2:]):
        natural.append((size - 1) * steps[i] + kernel_shape[i] - around[i] - around[i + rank])
    flat = x.new_zeros(math.prod(natural)).scatter(0, index.flatten(), x.flatten())
    y, wanted = flat.reshape(natural), ints(target)
    if wanted is None:
        return y
    grow = [(n - h) for h, n in zip(natural[2:], wanted[2:], strict=True)]
    return _padded(y, [0] * rank + grow)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def global_average_pool(x: Tensor) -> Tensor:
    """Mean over all positions."""
    return torch.mean(x, _spatial(x), True)


def global_max_pool(x: Tensor) -> Tensor:
    """Largest over all positions."""
    return torch.amax(x, _spatial(x), True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """p-norm over all positions."""
    return torch.pow(torch.sum(torch.pow(torch.abs(x), p), _spatial(x), True), 1 / p)


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Values at given places, -1 to 1 across the image."""
    names = {"linear": "bilinear", "cubic": "bicubic"}
    return F.grid_sample(x, grid, names.get(mode, mode), padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, target: Ints, *, align_corners: int = 0) -> Tensor:
    """Places for :func:`grid_sample` of an affine map."""
    return F.affine_grid(theta, ints(target) or [], bool(align_corners))


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Numbers = None,
    group: int = 1,
    kernel_shape: Numbers = None,
    offset_group: int = 1,
    pads: Numbers = None,
    strides: Numbers = None,
) -> Tensor:
    """Convolution of two spatial axes that reads each tap where the offsets say, bilinearly.

    Shapes: offset ``[n, offset_group * kh * kw * 2, oh, ow]`` (rows, then columns), mask half of that.
    """
    n, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    steps, spread, around = list(strides or [1, 1]), list(dilations or [1, 1]), list(pads or [0] * 4)
    oh, ow = offset.shape[2:]
    moved = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    columns = []
    for tap, (i, j) in enumerate(itertools.product(range(kh), range(kw))):
        row = (
            torch.arange(oh, device=x.device, dtype=torch.float64)[:, None] * steps[0]
            - around[0]
            + i * spread[0]
        )
        column = (
            torch.arange(ow, device=x.device, dtype=torch.float64)[None] * steps[1]
            - around[1]
            + j * spread[1]
        )
        ys, xs = moved[:, :, tap, 0] + row, moved[:, :, tap, 1] + column
        grid = torch.stack([(2 * xs + 1) / width - 1, (2 * ys + 1) / height - 1], -1)
        source = x.reshape(n * offset_group, channels // offset_group, height, width)
        # places are normalized and back: in double precision, or whole numbers would miss their pixel
        places = grid.reshape(-1, oh, ow, 2)
        sampled = F.grid_sample(source.double(), places, "bilinear", "zeros", False).to(x.dtype)
        if mask is not None:
            sampled = sampled * mask.reshape(n * offset_group, kh * kw, oh, ow)[:, tap, None]
        columns.append(sampled.reshape(n, channels, oh, ow))
    taps = torch.stack(columns, 2).reshape(n, group, (channels // group) * kh * kw, oh * ow)
    kernel = weight.reshape(group, weight.shape[0] // group, -1)
    y = torch.einsum("gok,ngkp->ngop", kernel, taps).reshape(n, weight.shape[0], oh, ow)
    return y if bias is None else y + bias.reshape(-1, 1, 1)
