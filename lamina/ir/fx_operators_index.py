"""FX forms of operators that read and write by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamina.ir.fx_values import Ints, axis_of, ints

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _counted(index: Tensor, whole: int) -> Tensor:
    """Negative indices from the front."""
    index = index.long()
    return torch.where(index < 0, index + whole, index)


def gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """Slices by index: ``axis`` is replaced by the dims of the index."""
    axis = axis_of(axis, x.ndim)
    picked = torch.index_select(x, axis, _counted(index, x.shape[axis]).flatten())
    return picked.reshape(
        (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    )  # trap: no dims, for a scalar


def gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """One element an index."""
    return torch.gather(x, axis, _counted(index, x.shape[axis]))


def gather_nd(x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices by index tuples in the last axis of the index."""
    depth, batch = index.shape[-1], x.shape[:batch_dims]
    rows = math.prod(batch)
    inner = x.shape[batch_dims : batch_dims + depth]
    rest = x.shape[batch_dims + depth :]
    at = _linear(index, inner).reshape(rows, -1)
    at = at + torch.arange(rows, device=x.device)[:, None] * math.prod(inner)
    flat = x.reshape(rows * math.prod(inner), *rest)
    return torch.index_select(flat, 0, at.flatten()).reshape((*index.shape[:-1], *rest))


def _linear(index: Tensor, dims: torch.Size) -> Tensor:
    """Positions in the flattened ``dims`` of index tuples in the last axis."""
    at = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for i, dim in enumerate(dims):
        at = at * dim + _counted(index[..., i], dim)
    return at


def scatter_elements(
    x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """One element an index, replaced or combined."""
    at = _counted(index, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, at, updates)
    return torch.scatter_reduce(x, axis, at, updates, _REDUCTIONS[reduction])


def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Slices by index tuples, replaced or combined."""
    depth = index.shape[-1]
    rest = x.shape[depth:]
    at = _linear(index, x.shape[:depth]).flatten()
    flat = x.reshape(math.prod(x.shape[:depth]), math.prod(rest))
    new = updates.reshape(len(at), math.prod(rest))
    if reduction == "none":
        return torch.index_copy(flat, 0, at, new).reshape(x.shape)
    each = at[:, None].expand_as(new)
    return torch.scatter_reduce(flat, 0, each, new, _REDUCTIONS[reduction]).reshape(x.shape)


def tensor_scatter(
    cache: Tensor, update: Tensor, indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A cache ``[batch, ...]`` whose steps from ``indices`` on are replaced; ``circular`` wraps around."""
    axis = axis_of(axis, cache.ndim)
    steps = torch.arange(update.shape[axis], device=cache.device)[None]
    start = 0 if indices is None else indices.long()[:, None]
    at = (steps + start).expand(update.shape[0], -1)
    if mode == "circular":
        at = torch.remainder(at, cache.shape[axis])
    dims = [1] * update.ndim
    dims[0], dims[axis] = at.shape
    return torch.scatter(cache, axis, at.reshape(dims).expand_as(update), update)


def one_hot(index: Tensor, depth: Ints, values: Tensor, *, axis: int = -1) -> Tensor:
    """``values[1]`` at the index along a new axis, else ``values[0]``."""
    count = (ints(depth) or [0])[0]
    at = _counted(index, count).unsqueeze(axis)
    dims = [1] * at.ndim
    dims[axis] = count
    hit = torch.arange(count, device=at.device).reshape(dims) == at
    return torch.where(hit, values[1], values[0])


def non_zero(x: Tensor) -> Tensor:
    """Indices of what is not zero, ``[rank, count]``."""
    # a scalar counts as a vector of one
    return torch.nonzero(x if x.ndim else x.reshape(1)).T


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Slices, or elements of the flattened tensor, where the condition holds."""
    data, along = (x.flatten(), 0) if axis is None else (x, axis)
    return torch.index_select(data, along, torch.nonzero(condition).flatten())


def top_k(x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The ``k`` largest or smallest along an axis, in order, and where they stood; ties by position."""
    values, index = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = (ints(k) or [0])[0]
    return torch.narrow(values, axis, 0, count), torch.narrow(index, axis, 0, count)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the largest stands; the first or the last of equals."""
    if not select_last_index:
        return torch.argmax(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - torch.argmax(torch.flip(x, [axis]), axis, keepdim=bool(keepdims))


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the smallest stands; the first or the last of equals."""
    if not select_last_index:
        return torch.argmin(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - torch.argmin(torch.flip(x, [axis]), axis, keepdim=bool(keepdims))
