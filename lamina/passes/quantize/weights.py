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
_RATIOS_2 = np.linspace(1.0, 0.3, 15, dtype=np.float32)
# Types of codes that have a zero point for each block.
_UNSIGNED: dict[int, type] = {4: ml_dtypes.uint4, 2: ml_dtypes.uint2}
# The smallest scale whose products with an activation's scale stay normal numbers.
_TINY = np.float32(2.0**-60)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in integers.

    Attributes:
        codes: int8, or uint4 or uint2 (ml_dtypes), in the weight's own shape.
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

    Eight bits are symmetric int8; four and two bits are unsigned with a zero point for each block: a code
    more a block, and all codes serve a block that lies to one side.

    Returns:
        Codes ``[K, N]``; scales (and zero points) ``[ceil(K / block), N]``.
    """
    check_bits(bits, clipping)
    kind = _UNSIGNED.get(bits, np.int8)
    depth, width = weight.shape
    count = -(-depth // block)
    padded = np.zeros((count * block, width), np.float32)
    padded[:depth] = weight
    rows = np.ascontiguousarray(padded.reshape(count, block, width).transpose(0, 2, 1)).reshape(-1, block)
    codes, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    zero = np.zeros(len(rows), np.int8)
    limit = 2 ** (bits - 1) - 1
    for part in _chunks(rows):
        if kind != np.int8:
            scale[part], zero[part] = _affine_scale(rows[part], clipping, 2**bits - 1)
            offset = zero[part, None]
            codes[part] = np.clip(np.rint(rows[part] / scale[part, None]) + offset, 0, 2**bits - 1)
        else:
            scale[part] = _symmetric_scale(rows[part], limit, clipping, bits)
            codes[part] = encode(rows[part], scale[part, None], limit)
    shaped = codes.reshape(count, width, block).transpose(0, 2, 1).reshape(-1, width)[:depth]
    return QuantizedWeight(
        np.ascontiguousarray(shaped).astype(kind),
        scale.reshape(count, width),
        zero.reshape(count, width).astype(kind) if kind != np.int8 else None,
    )


def quantize_offset(
    rows: np.ndarray, *, block: int, bits: int, clipping: Clipping = "mse"
) -> QuantizedWeight:
    """Quantize rows ``[n, k]`` in blocks along k to codes ``0 .. 2^bits - 1`` about one real zero point.

    The zero point is in the middle of the codes, ``(2^bits - 1) / 2``, which lays the levels evenly about 0
    (at two bits a Gaussian block errs a third less than with a level at 0), or at a level, ``2^(bits-1)``,
    where that errs less: weights with many zeros. Scales are numbers of float16 unless one does not fit it;
    codes are the nearest for the scale as stored.

    Returns:
        uint8 codes ``[n, k]``; float32 scales ``[n, ceil(k / block)]``; float32 zero point ``[1, 1]``.
    """
    check_bits(bits, clipping)
    count = -(-rows.shape[1] // block)
    padded = np.zeros((len(rows), count * block), np.float32)
    padded[:, : rows.shape[1]] = rows
    blocks, top = padded.reshape(-1, block), 2**bits - 1
    best: tuple[float, np.ndarray, np.ndarray, float] | None = None
    for zero in (top / 2, 2.0 ** (bits - 1)):
        scale = np.concatenate([_offset_scale(blocks[p], zero, top, clipping) for p in _chunks(blocks)])
        scale = halves(scale)
        codes = np.clip(np.rint(blocks / scale[:, None] + np.float32(zero)), 0, top)
        error = float(np.square((codes - np.float32(zero)) * scale[:, None] - blocks).sum(dtype=np.float64))
        if best is None or error < best[0]:
            best = error, codes, scale, zero
    assert best is not None
    _, codes, scale, zero = best
    shaped = np.ascontiguousarray(codes.reshape(len(rows), -1)[:, : rows.shape[1]].astype(np.uint8))
    return QuantizedWeight(shaped, scale.reshape(len(rows), count), np.full((1, 1), zero, np.float32))


def halves(scale: np.ndarray) -> np.ndarray:
    """Scales rounded to float16, in float32, where all of them are normal numbers there."""
    limits = np.finfo(np.float16)
    fits = scale.size and scale.min() >= limits.tiny and scale.max() <= limits.max
    return scale.astype(np.float16).astype(np.float32) if fits else scale


def _offset_scale(rows: np.ndarray, zero: float, top: int, clipping: Clipping) -> np.ndarray:
    """The scale of each row for codes ``0 .. top`` about ``zero``; a row of zeros gets the largest of all."""
    below, above = -rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0)
    bound = np.maximum(below / np.float32(zero), above / np.float32(top - zero))
    widest = np.maximum(bound, _TINY).astype(np.float32)
    best = widest.copy()
    if clipping == "mse":
        energy = np.einsum("ij,ij->i", rows, rows)
        least = np.full(len(rows), np.inf, np.float32)
        for ratio in _RATIOS_8 if top > 15 else _RATIOS_4 if top > 3 else _RATIOS_2:
            exact = rows / (widest * ratio)[:, None] + np.float32(zero)
            codes = np.clip(np.rint(exact), 0, top) - np.float32(zero)
            _keep_better(rows, codes, energy, best, least)
    # trap: a tiny scale would cost all the others their float16
    return np.where(bound > 0, best, best.max(initial=_TINY)).astype(np.float32)


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


def _affine_scale(rows: np.ndarray, clipping: Clipping, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row for codes 0 to ``top``; zero is always represented exactly."""
    low = np.minimum(rows.min(axis=1), 0.0)
    high = np.maximum(rows.max(axis=1), 0.0)
    span = high - low
    widest = np.where(span > 0, np.maximum(span / np.float32(top), _TINY), np.float32(1.0)).astype(np.float32)
    zero = np.clip(np.rint(-low / widest), 0, top).astype(np.float32)
    best, best_zero = widest.copy(), zero.copy()
    if clipping == "minmax":
        return best, best_zero.astype(np.int8)
    energy = np.einsum("ij,ij->i", rows, rows)
    least = np.square(_affine_codes(rows, best, zero, top) * best[:, None] - rows).sum(axis=1)
    for ratio in _RATIOS_4 if top > 3 else _RATIOS_2:
        scale = widest * ratio
        for shift in (-1.0, 0.0, 1.0):
            moved = np.clip(zero + np.float32(shift), 0, top)
            better = _keep_better(rows, _affine_codes(rows, scale, moved, top), energy, best, least)
            best_zero[better] = moved[better]
    return np.maximum(best, _TINY), best_zero.astype(np.int8)


def _affine_codes(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int) -> np.ndarray:
    """Codes minus zero point."""
    offset = zero[:, None]
    codes: np.ndarray = np.clip(np.rint(rows / scale[:, None]) + offset, 0, top) - offset
    return codes
