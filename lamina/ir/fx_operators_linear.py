"""FX forms of matrix products, attention, rotary embedding and the losses built on them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, batched over leading axes."""
    if a.is_cuda and not a.dtype.is_floating_point:  # no integer product there; float64 is exact to 2**53
        return torch.matmul(a.double(), b.double()).to(a.dtype)
    return torch.matmul(a, b)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # ONNX's own name
    transB: int = 0,
) -> Tensor:
    """Alpha A B + beta C, either factor transposed."""
    y = matmul(a.T if transA else a, b.T if transB else b)
    y = y if alpha == 1 else (alpha * y).to(y.dtype)
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else (beta * c).to(y.dtype))


def einsum(*xs: Tensor, equation: str) -> Tensor:
    """Sum of products in Einstein's notation."""
    return torch.einsum(equation.replace(" ", ""), *xs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled dot product attention with its cache; grouped queries share keys and values.

    Shapes: q, k, v ``[b, heads, length, size]`` or ``[b, length, heads * size]``; mask broadcasts to
    ``[b, heads, queries, keys]``. A query that may attend nothing answers zero.
    """
    flat = q.ndim == 3
    if flat:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present_key, present_value = k, v
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if past_key is None and nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen.reshape(-1, 1, 1, 1) - q.shape[2]
    bias = _bias(q, k, attn_mask, nonpad_kv_seqlen, offset, is_causal, left_window_size, right_window_size)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    root = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    root = torch.tensor(root, dtype=q.dtype).item()  # the specification rounds it to the inputs' type
    scores = torch.matmul(q * root, k.transpose(-1, -2) * root)
    shown = scores
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    shown = scores if qk_matmul_output_mode == 1 or softcap else shown
    scores = scores + bias
    shown = scores if qk_matmul_output_mode == 2 else shown
    wide = scores if softmax_precision is None else scores.to(softmax_precision)
    dead = (bias == -math.inf).all(-1, keepdim=True)
    # A row of -inf has no softmax, and a gradient of NaN: it is filled before, and zeroed after.
    weights = torch.softmax(torch.where(dead, torch.zeros_like(wide), wide), -1)
    weights = torch.where(dead, torch.zeros_like(weights), weights).to(q.dtype)
    shown = weights if qk_matmul_output_mode == 3 else shown
    y = torch.matmul(weights, v)
    return (y.transpose(1, 2).flatten(2) if flat else y), present_key, present_value, shown


def _heads(x: Tensor, count: int | None) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _bias(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    nonpad: Tensor | None,
    offset: Any,
    causal: int,
    left: int,
    right: int,
) -> Tensor:
    """What is added to the scores: -inf where a query must not look, the mask's numbers elsewhere."""
    queries, keys = q.shape[2], k.shape[2]
    row = torch.arange(queries, device=q.device)[:, None] + offset
    column = torch.arange(keys, device=q.device)[None]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (column <= row)
    if left >= 0:
        allowed = allowed & (row - column <= left)
    if right >= 0:
        allowed = allowed & (column - row <= right)
    if nonpad is not None:
        allowed = allowed & (column < nonpad.reshape(-1, 1, 1, 1))
    added = torch.zeros((), dtype=q.dtype, device=q.device)
    if mask is not None:
        short = keys - mask.shape[-1]
        if mask.dtype == torch.bool:
            allowed = allowed & (F.pad(mask.byte(), [0, short]).bool() if short > 0 else mask)
        else:
            added = F.pad(mask, [0, short], value=-math.inf) if short > 0 else mask
    return torch.where(allowed, added, torch.full_like(added, -math.inf))


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of features turned by an angle that grows with the position.

    Shapes: x ``[b, heads, length, size]`` or ``[b, length, heads * size]``; caches ``[b, length, half]``, or
    ``[positions, half]`` with ``position_ids [b, length]``.
    """
    flat = x.ndim == 3
    data = x.reshape(x.shape[0], x.shape[1], num_heads, -1) if flat else x.transpose(1, 2)
    cos, sin = cos_cache, sin_cache
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    width = rotary_embedding_dim or data.shape[-1]
    turned, rest = data[..., :width], data[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    turned = (
        torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    )
    y = torch.cat([turned, rest], -1)
    return y.reshape(x.shape) if flat else y.transpose(1, 2)


def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -1 << 62,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of the target classes."""
    return F.nll_loss(x, target.long(), weight, ignore_index=ignore_index, reduction=reduction)


def cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -1 << 62,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the target classes under the softmax, and its logarithm."""
    logs = torch.log_softmax(x, 1)
    return nll_loss(logs, target, weight, ignore_index=ignore_index, reduction=reduction), logs


def determinant(x: Tensor) -> Tensor:
    """Of the matrices in the last two axes."""
    return torch.linalg.det(x)
