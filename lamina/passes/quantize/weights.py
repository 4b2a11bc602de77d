"""Weight quantizers: integers, scales and zero points for a weight, chosen for least squared error.

Codes times scale approximates the weight. Every candidate scale comes from clipping the largest magnitude by
some ratio; given the codes it leads to, the best scale is a projection, ``<w, c> / <c, c>``, so each
candidate is judged with that one (arXiv:1712.05877 gives the uniform grid; the search is least squares).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from lamina.errors import PassError

Clipping = Literal["mse", "minmax"]
CLIPPINGS: tuple[Clipping, ...] = ("mse", "minmax")
Balance = Literal["none", "kernel", "row"]

# Rows are searched this many elements at a time: the temporaries then stay in cache.
_CHUNK = 1 << 18
# Clipping ratios tried. Eight bits rarely want clipping except for outliers, which want a lot of it.
_RATIOS_8 = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], np.float32)
_RATIOS_4 = np.linspace(1.0, 0.55, 10, dtype=np.float32)
# The smallest scale whose products with an activation's scale stay normal numbers.
_TINY = np.float32(2.0**-60)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in integers.

    Attributes:
        codes: int8, or uint4 (ml_dtypes), in the weight's own shape.
        scale: float32; shape as the quantizer says.
        zero_point: Same type as codes and shape as scale, or None for 0.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None


def quantize_channels(
    weight: np.ndarray, axis: int, *, bits: int = 8, clipping: Clipping = "mse", balance: Balance = "none"
) -> QuantizedWeight:
    """Quantize symmetrically with one scale for each index of ``axis``.

    Rounding can be balanced: an output's error is the sum of inputs times rounding errors, so where inputs
    are alike (neighbouring pixels) or share a mean (after a Relu), the sum of the errors is what counts. The
    codes nearest to a tie are rounded the other way until it is nearly zero. On mobilenet that halves the
    error of the logits (tests/passes/test_quantize_models.py).

    Args:
        weight: Floating weight of any shape.
        axis: The output-channel axis.
        bits: 2 to 8; the codes are int8 and use ``2^(bits-1) - 1`` steps to each side.
        clipping: ``mse`` searches the clipping point, ``minmax`` covers the largest magnitude.
        balance: Over which weights errors sum to nearly zero: those of one ``kernel`` window (dimensions
            after the second, of a convolution), the whole ``row`` of a channel, or ``none``.

    Returns:
        int8 codes in the weight's shape and float32 scales ``[channels]``.
    """
    check_bits(bits, clipping)
    moved = np.moveaxis(weight, axis, 0)
    rows = np.ascontiguousarray(moved).reshape(moved.shape[0], -1).astype(np.float32, copy=False)
    limit = 2 ** (bits - 1) - 1
    codes, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for part in _chunks(rows):
        scale[part] = _symmetric_scale(rows[part], limit, clipping, bits)
        codes[part] = encode(rows[part], scale[part, None], limit)
        if balance != "none":
            size = math.prod(moved.shape[2:]) if balance == "kernel" else rows.shape[1]
            codes[part] = _balanced(rows[part] / scale[part, None], codes[part], size, limit)
    # A channel of zeros takes a scale like the others': its bias is counted in units of it.
    dead = ~codes.any(axis=1)
    if dead.any() and not dead.all():
        scale[dead] = scale[~dead].max()
        codes[dead] = 0
    return QuantizedWeight(np.ascontiguousarray(np.moveaxis(codes.reshape(moved.shape), 0, axis)), scale)


def encode(weight: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    """The nearest codes within ``limit`` of zero."""
    codes: np.ndarray = np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8)
    return codes


def _balanced(exact: np.ndarray, codes: np.ndarray, size: int, limit: int) -> np.ndarray:
    """Codes whose errors sum to at most half a step over each run of ``size``, changing each by at most 1."""
    groups = codes.reshape(-1, size).astype(np.float32)
    inside = np.clip(exact.reshape(-1, size), -limit, limit)
    rest = inside - groups
    count = np.rint(rest.sum(axis=1, keepdims=True))
    sign = np.sign(count)
    # the elements whose rounding the other way costs least come first
    rank = np.argsort(np.argsort(-rest * sign, axis=1, kind="stable"), axis=1, kind="stable")
    moved = np.clip(groups + sign * (rank < np.abs(count)), -limit, limit)
    return moved.astype(np.int8).reshape(codes.shape)


def quantize_blocks(
    weight: np.ndarray, *, block: int, bits: int, clipping: Clipping = "mse"
) -> QuantizedWeight:
    """Quantize a matrix ``[K, N]`` in blocks of ``block`` along K.

    Eight bits are symmetric int8; four bits are uint4 with a zero point for each block: half a byte a block
    more, and all 16 codes serve a block that lies to one side.

    Returns:
        Codes ``[K, N]``; scales (and zero points) ``[ceil(K / block), N]``.
    """
    check_bits(bits, clipping)
    depth, width = weight.shape
    count = -(-depth // block)
    padded = np.zeros((count * block, width), np.float32)
    padded[:depth] = weight
    rows = np.ascontiguousarray(padded.reshape(count, block, width).transpose(0, 2, 1)).reshape(-1, block)
    codes, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    zero = np.zeros(len(rows), np.int8)
    limit = 2 ** (bits - 1) - 1
    for part in _chunks(rows):
        if bits == 4:
            scale[part], zero[part] = _affine_scale(rows[part], clipping)
            offset = zero[part, None]
            codes[part] = np.clip(np.rint(rows[part] / scale[part, None]) + offset, 0, 15)
        else:
            scale[part] = _symmetric_scale(rows[part], limit, clipping, bits)
            codes[part] = encode(rows[part], scale[part, None], limit)
    kind = ml_dtypes.uint4 if bits == 4 else np.int8
    shaped = codes.reshape(count, width, block).transpose(0, 2, 1).reshape(-1, width)[:depth]
    return QuantizedWeight(
        np.ascontiguousarray(shaped).astype(kind),
        scale.reshape(count, width),
        zero.reshape(count, width).astype(kind) if bits == 4 else None,
    )


def check_bits(bits: int, clipping: str) -> None:
    """Raise unless the quantizers know these options.

    Raises:
        PassError: An option is out of range.
    """
    if not 2 <= bits <= 8:
        raise PassError(f"weights cannot be quantized to {bits} bits", advice="choose 2 to 8")
    if clipping not in CLIPPINGS:
        raise PassError(f"weight clipping '{clipping}' is unknown", advice=f"choose one of {CLIPPINGS}")


def _chunks(rows: np.ndarray) -> list[slice]:
    size = max(1, _CHUNK // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _symmetric_scale(rows: np.ndarray, limit: int, clipping: Clipping, bits: int) -> np.ndarray:
    """The scale of each row, float32, at least ``_TINY``; a row of zeros gets 1."""
    bound = np.abs(rows).max(axis=1, initial=0.0)
    widest = np.where(bound > 0, np.maximum(bound / np.float32(limit), _TINY), np.float32(1.0))
    best = widest.astype(np.float32)
    if clipping == "minmax":
        return best
    energy = np.einsum("ij,ij->i", rows, rows)
    # The unclipped range at its own scale is a candidate too: the search can only win.
    codes = np.rint(rows / best[:, None])
    least = np.square(codes * best[:, None] - rows).sum(axis=1)
    for ratio in _RATIOS_8 if bits > 4 else _RATIOS_4:
        codes = np.clip(np.rint(rows / (widest * ratio)[:, None]), -limit, limit)
        _keep_better(rows, codes, energy, best, least)
    return np.maximum(best, _TINY)


def _keep_better(
    rows: np.ndarray, codes: np.ndarray, energy: np.ndarray, best: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """Update ``best`` and ``least`` where projecting on ``codes`` beats them; the rows that improved."""
    inner = np.einsum("ij,ij->i", rows, codes)
    norm = np.einsum("ij,ij->i", codes, codes)
    safe = np.where(norm > 0, norm, 1.0)
    error = energy - inner * inner / safe
    better: np.ndarray = (error < least) & (inner > 0)
    best[better] = (inner / safe)[better].astype(np.float32)
    least[better] = error[better]
    return better


def _affine_scale(rows: np.ndarray, clipping: Clipping) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row for codes 0 to 15; zero is always represented exactly."""
    low = np.minimum(rows.min(axis=1), 0.0)
    high = np.maximum(rows.max(axis=1), 0.0)
    span = high - low
    widest = np.where(span > 0, np.maximum(span / np.float32(15), _TINY), np.float32(1.0)).astype(np.float32)
    zero = np.clip(np.rint(-low / widest), 0, 15).astype(np.float32)
    best, best_zero = widest.copy(), zero.copy()
    if clipping == "minmax":
        return best, best_zero.astype(np.int8)
    energy = np.einsum("ij,ij->i", rows, rows)
    least = np.square(_affine_codes(rows, best, zero) * best[:, None] - rows).sum(axis=1)
    for ratio in _RATIOS_4:
        scale = widest * ratio
        for shift in (-1.0, 0.0, 1.0):
            moved = np.clip(zero + np.float32(shift), 0, 15)
            better = _keep_better(rows, _affine_codes(rows, scale, moved), energy, best, least)
            best_zero[better] = moved[better]
    return np.maximum(best, _TINY), best_zero.astype(np.int8)


def _affine_codes(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Codes minus zero point."""
    offset = zero[:, None]
    codes: np.ndarray = np.clip(np.rint(rows / scale[:, None]) + offset, 0, 15) - offset
    return codes
