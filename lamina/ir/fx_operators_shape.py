"""FX forms of operators that make, reshape, move, join and cut tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.ir.fx_values import Ints, axes_of, axis_of, ints, widened


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The dims, on the device of ``x``."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=x.device)


def size(x: Tensor) -> Tensor:
    """Number of elements."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def constant_of_shape(dims: Tensor, *, value: tuple[float, torch.dtype] = (0.0, torch.float32)) -> Tensor:
    """One number, repeated."""
    return torch.full(ints(dims), value[0], dtype=value[1], device=dims.device)


def arange(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """``start``, ``start + delta``, ... before ``limit``; half precision is counted in float32."""
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    first_, step_ = widened(start), widened(delta)
    return (torch.arange(count, device=start.device).to(first_.dtype) * step_ + first_).to(start.dtype)


def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """Ones on the ``k``-th diagonal of a matrix shaped like ``x``."""
    rows, columns = x.shape
    row = torch.arange(rows, device=x.device)[:, None]
    return (torch.arange(columns, device=x.device)[None] == row + k).to(dtype or x.dtype)


def reshape(x: Tensor, target: Ints, *, allowzero: int = 0) -> Tensor:
    """Other dims over the same elements; 0 keeps a dim, -1 takes what is left."""
    dims = ints(target) or []
    if not allowzero:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    if -1 in dims and 0 in x.shape:  # torch cannot infer a dim from no elements
        rest = math.prod(d for d in dims if d != -1)
        dims = [(x.numel() // rest if rest else 0) if d == -1 else d for d in dims]
    return torch.reshape(x, dims)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: dims before ``axis`` by the rest."""
    axis = axis_of(axis, x.ndim)
    return torch.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def squeeze(x: Tensor, axes: Ints = None) -> Tensor:
    """Without the dims of 1 named, or all of them."""
    chosen = axes_of(axes, x.ndim)
    if chosen is None:
        return torch.squeeze(x)
    return torch.reshape(x, [d for i, d in enumerate(x.shape) if i not in chosen])


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """With dims of 1 at the axes of the result."""
    listed = ints(axes) or []
    for axis in sorted(axis_of(a, x.ndim + len(listed)) for a in listed):
        x = torch.unsqueeze(x, axis)
    return x


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order; reversed without one."""
    return torch.permute(x, list(perm) if perm is not None else list(range(x.ndim))[::-1])


def expand(x: Tensor, target: Ints) -> Tensor:
    """Broadcast both ways: a target dim of 1 keeps the tensor's."""
    return torch.broadcast_to(x, torch.broadcast_shapes(x.shape, ints(target)))


def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Repeated along each axis."""
    return x.repeat(ints(repeats)) if x.ndim else x


def concat(*xs: Tensor, axis: int) -> Tensor:
    """Joined along one axis."""
    # trap: torch takes a 1-D tensor of no elements for one of any shape
    return torch.cat(xs, axis) if len(xs) > 1 else xs[0]


def split(
    x: Tensor, sizes: Ints = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Tensor, ...]:
    """Cut along one axis into parts of given or equal sizes; the last equal one may be smaller."""
    given = ints(sizes)
    if given is None:
        count, whole = num_outputs or outputs, x.shape[axis]
        step = -(-whole // count)
        given = [max(min(step, whole - i * step), 0) for i in range(count)]
    return tuple(torch.split(x, given, axis))


def slices(x: Tensor, starts: Ints, ends: Ints, axes: Ints = None, steps: Ints = None) -> Tensor:
    """Cut along several axes, in either direction."""
    first, last = ints(starts) or [], ints(ends) or []
    along = axes_of(axes, x.ndim) or list(range(len(first)))
    for start, end, axis, step in zip(first, last, along, ints(steps) or [1] * len(first), strict=True):
        whole = x.shape[axis]
        # trap: an end below -whole means "past the first element" when stepping backward, as in Python
        found = range(*slice(start, end, step).indices(whole))
        if step > 0:
            x = x[(slice(None),) * axis + (slice(found.start, max(found.stop, found.start), step),)]
        else:
            x = torch.index_select(x, axis, torch.tensor(list(found), dtype=torch.int64, device=x.device))
    return x


def pad(
    x: Tensor, pads: Ints, value: Tensor | None = None, axes: Ints = None, *, mode: str = "constant"
) -> Tensor:
    """Grown, or cut by negative pads, at both ends of the axes."""
    along = axes_of(axes, x.ndim)
    along = list(range(x.ndim)) if along is None else along
    amounts = ints(pads) or []
    ends = {a: (amounts[i], amounts[i + len(along)]) for i, a in enumerate(along)}
    if mode == "constant":
        flat = [n for axis in reversed(range(x.ndim)) for n in ends.get(axis, (0, 0))]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), flat, value=0 if value is None else int(value)).bool()
        fill = 0 if value is None or not value.numel() else value.item()
        return F.pad(x, flat, value=fill)
    for axis, (before, after) in ends.items():
        if before or after:
            x = torch.index_select(x, axis, _source(x, axis, before, after, mode))
    return x


def _source(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Where each element of a padded axis comes from."""
    whole = x.shape[axis]
    place = torch.arange(-before, whole + after, device=x.device)
    if mode == "edge":
        return place.clamp(0, whole - 1)
    if mode == "wrap":
        return torch.remainder(place, whole)
    period = max(2 * (whole - 1), 1)
    place = torch.remainder(place, period)
    return torch.where(place < whole, place, period - place)


def center_crop_pad(x: Tensor, target: Ints, *, axes: Sequence[int] | None = None) -> Tensor:
    """Cut or zero-padded to the target, about the middle."""
    along = axes_of(axes, x.ndim)
    for axis, want in zip(list(range(x.ndim)) if along is None else along, ints(target) or [], strict=True):
        have = x.shape[axis]
        if want < have:
            x = torch.narrow(x, axis, (have - want) // 2, want)
        elif want > have:
            before = (want - have) // 2
            x = pad(x, [before, want - have - before], None, [axis])
    return x


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels to space, in the depth-column-row or column-row-depth order."""
    n, c, h, w = x.shape
    if mode == "DCR":
        parts = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // blocksize**2, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Space to channels."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(*order).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def trilu(x: Tensor, k: Ints = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of the last two axes, zeros elsewhere."""
    offset = (ints(k) or [0])[0]
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first ``lengths`` steps of each sequence in reverse."""
    steps = x.shape[time_axis]
    moved = torch.movedim(x, (batch_axis, time_axis), (0, 1))
    step = torch.arange(steps, device=x.device)[None]
    source = torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
    rows = torch.arange(moved.shape[0], device=x.device)[:, None]
    return torch.movedim(moved[rows, source], (0, 1), (batch_axis, time_axis))


def bit_cast(x: Tensor, *, to: torch.dtype) -> Tensor:
    """The same bits as another type of the same width."""
    return x.view(to)


def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct elements or slices, where each first stood, which one each is, and how often it stood."""
    data = x.flatten() if axis is None else x
    values, inverse, counts = torch.unique(data, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.flatten()
    place = torch.arange(len(inverse), device=x.device)
    first = torch.full((len(counts),), len(inverse), device=x.device).scatter_reduce(
        0, inverse, place, "amin"
    )
    if not sorted:
        order = torch.argsort(first)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=x.device)
        values = torch.index_select(values, 0 if axis is None else axis, order)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return values, first, inverse, counts


def col2im(
    x: Tensor,
    image: Ints,
    block: Ints,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Sums of overlapping blocks ``[n, c * prod(block), count]`` laid out in an image of any rank."""
    size_, kernel = ints(image) or [], ints(block) or []
    rank = len(size_)
    pads_, strides_ = list(pads or [0] * 2 * rank), list(strides or [1] * rank)
    dilations_ = list(dilations or [1] * rank)
    whole = [s + pads_[i] + pads_[i + rank] for i, s in enumerate(size_)]
    index = torch.zeros([1] * 2 * rank, dtype=torch.int64, device=x.device)
    for i in range(rank):
        count = (whole[i] - dilations_[i] * (kernel[i] - 1) - 1) // strides_[i] + 1
        at = torch.arange(kernel[i], device=x.device)[:, None] * dilations_[i]
        at = at + torch.arange(count, device=x.device)[None] * strides_[i]
        dims = [1] * 2 * rank
        dims[i], dims[rank + i] = kernel[i], count
        index = index * whole[i] + at.reshape(dims)
    n, channels = x.shape[0], x.shape[1] // math.prod(kernel)
    flat = x.new_zeros(n, channels, math.prod(whole))
    flat = flat.index_add(2, index.flatten(), x.reshape(n, channels, -1))
    y = flat.reshape(n, channels, *whole)
    for i, length in enumerate(size_):
        y = torch.narrow(y, 2 + i, pads_[i], length)
    return y
