"""The clipping range that loses the least information, as calibrators of int8 engines choose it."""

from __future__ import annotations

import numpy as np

# Windows tried, evenly spaced in magnitude, the whole range first.
_WINDOWS = 128
# Mass that an empty bin of the quantized distribution gets, relative to a full one: no infinite divergence.
_EMPTY = 1e-4


def least_divergence(
    counts: np.ndarray, edges: np.ndarray, low: float, high: float, levels: int
) -> tuple[float, float]:
    """The real range whose quantized distribution has the least KL divergence from the one observed.

    For each window ``[-t, t]`` (cut at ``low`` and ``high``) the observed distribution P keeps what lies
    inside and counts what lies outside in the bins at its ends; Q merges the bins inside into ``levels``
    steps and spreads each step evenly over its bins that hold anything. A window of fewer bins than levels
    would lose nothing by this measure, so none is tried.
    Source: Migacz 2017, "8-bit inference with TensorRT" (GTC), the scheme of ONNX Runtime's calibrator too.
    Deviates: one-sided values keep their side; exact zeros do not count, for quantizers represent them.

    Args:
        counts: Histogram without exact zeros, ``[bins]``.
        edges: Its edges, ascending, ``[bins + 1]``.
        low: Smallest element, at most 0.
        high: Largest element, at least 0.
        levels: Integers the quantizer has.

    Returns:
        The range; all of ``low`` to ``high`` where the histogram is too short to compare.
    """
    best, found = np.inf, (low, high)
    reach = max(-low, high)
    for bound in reach * np.arange(_WINDOWS, 0, -1) / _WINDOWS:
        bottom, top = max(low, -bound), min(high, bound)
        first = max(0, int(np.searchsorted(edges, bottom, side="right")) - 1)
        last = min(len(counts), int(np.searchsorted(edges, top, side="left")))
        if last - first < levels or not counts[first:last].any():
            continue
        loss = window_divergence(counts, first, last, levels)
        if loss < best:
            best, found = loss, (bottom, top)
    return found


def window_divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """KL(P || Q) in nats for the window of bins ``first`` to ``last``; see :func:`least_divergence`."""
    inside = counts[first:last].astype(np.float64)
    observed = inside.copy()
    observed[0] += counts[:first].sum()
    observed[-1] += counts[last:].sum()
    step = np.arange(len(inside)) * levels // len(inside)
    filled = inside > 0
    share = np.bincount(step, inside, levels) / np.maximum(np.bincount(step, filled, levels), 1)
    merged = np.where(filled, share[step], 0.0)
    p = _smoothed(observed / observed.sum())
    q = _smoothed(merged / merged.sum())
    return float((p * np.log(p / q)).sum())


def _smoothed(p: np.ndarray) -> np.ndarray:
    """A distribution without zeros: empty bins get a little, taken evenly from the others."""
    empty = p <= 0
    if not empty.any():
        return p
    least = _EMPTY / len(p)
    moved = np.where(empty, least, p * (1.0 - least * empty.sum()))
    result: np.ndarray = moved / moved.sum()
    return result
