"""Codes that answer for each other: rounding against second moments of what the operator reads.

Rounding each weight by itself minimizes the error of the weight; what counts is that of the output, over
inputs x: ``E = sum_rows d S d'``, d the error of a row, S the sum of x x'. All functions work on weights
``[g, n, k]`` (groups of a convolution, else g = 1) and S ``[g, k, k]``, in float64, and read scales and zero
points from the codes they start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lamina.passes.quantize.coded import Coded

# Columns between two updates of everything behind them: products of matrices, not of vectors.
BLOCK = 128
# Of the mean of the diagonal of S, added to it: the value of the paper.
DAMP = 0.01


def gptq(target: np.ndarray, moments: np.ndarray, start: Coded, *, damp: float = DAMP) -> Coded:
    """Round column by column; each column's error is made up for by the columns that are still to come.

    With U the upper Cholesky factor of ``(S + damp)^-1``: ``e = (w_j - q_j) / U_jj``, then
    ``w_l -= e U_jl`` for all l behind j. Columns come in descending order of S_jj (act-order).

    Args:
        target: float64 ``[g, n, k]``: the weights to come near.
        moments: float64 ``[g, k, k]``: S, or any positive multiple.
        start: Codes of the ``g * n`` rows; their scales and zero points are kept.
        damp: Added to the diagonal of S, of its mean.

    Returns:
        ``start`` with other codes; where no S is positive (nothing was read), ``start``.

    Cost: O(g n k^2 + g k^3). Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, batched over groups.
    Deviates: the scales of all groups are fixed before the first column (static groups), so that act-order
    needs no index of groups in the model; no lazy choice of ranges.
    """
    groups, _, width = target.shape
    damped = _damped(moments, damp)
    if damped is None:
        return start
    order = np.argsort(-np.einsum("gkk->gk", damped), axis=1, kind="stable")
    rows = np.arange(groups)[:, None]
    sorted_ = damped[rows[:, :, None], order[:, :, None], order[:, None, :]]
    factor = np.linalg.cholesky(np.linalg.inv(sorted_)).transpose(0, 2, 1)
    places = order[:, None, :]
    given = (target, _by_column(start, start.scale, groups), _by_column(start, start.zero, groups))
    rest, scale, zero = (np.take_along_axis(a, places, axis=2) for a in given)
    codes = np.empty_like(rest)
    for first, last in _spans(width):
        missed = np.empty((*rest.shape[:2], last - first))
        for j in range(first, last):
            exact = rest[:, :, j] / scale[:, :, j] + zero[:, :, j]
            codes[:, :, j] = np.clip(np.rint(exact), start.low, start.high)
            real = (codes[:, :, j] - zero[:, :, j]) * scale[:, :, j]
            error = (rest[:, :, j] - real) / factor[:, j, j, None]
            missed[:, :, j - first] = error
            rest[:, :, j + 1 : last] -= error[:, :, None] * factor[:, None, j, j + 1 : last]
        rest[:, :, last:] -= missed @ factor[:, first:last, last:]
    back = np.empty_like(codes)
    np.put_along_axis(back, places, codes, axis=2)
    return replace(start, codes=back.reshape(start.codes.shape).astype(start.codes.dtype))


def descend(
    target: np.ndarray, moments: np.ndarray, start: Coded, *, sweeps: int = 3, scales: bool = True
) -> Coded:
    """Lower E one code at a time, and one scale at a time, each to its best value given all others.

    With R = (W^ - W) S, code j of a row goes to the code nearest to ``w^_j - R_j / S_jj``; the scale of a
    group with integers c becomes ``s - R_g c' / (c S_gg c')``. No step raises E, so it never ends above
    ``start``; a sweep that changes nothing ends it.

    Args:
        target: float64 ``[g, n, k]``.
        moments: float64 ``[g, k, k]``.
        start: Codes of the ``g * n`` rows.
        sweeps: Most passes over all columns.
        scales: Whether scales move too.

    Cost: O(sweeps g n k^2). Source: Behdin et al. 2023, arXiv:2309.01885 (QuantEase). Deviates: it
    starts from :func:`gptq`, and scales are refitted, which that paper leaves fixed.
    """
    groups, _, width = target.shape
    diagonal = np.einsum("gkk->gk", moments)
    if not (diagonal > 0).any():
        return start
    shape = target.shape
    codes = start.codes.reshape(shape).astype(np.float64)
    zero = _by_column(start, start.zero, groups)
    found = start
    for _ in range(sweeps):
        scale = _by_column(found, found.scale, groups)
        gradient = ((codes - zero) * scale - target) @ moments
        changed = 0
        for first, last in _spans(width):
            moved = np.zeros((*shape[:2], last - first))
            inside = moments[:, first:last, first:last]
            for j in range(first, last):
                curve = np.where(diagonal[:, j] > 0, diagonal[:, j], np.inf)[:, None]
                step = scale[:, :, j]
                exact = codes[:, :, j] - gradient[:, :, j] / (curve * step)
                best = np.clip(np.rint(exact), start.low, start.high)
                difference = (best - codes[:, :, j]) * step
                codes[:, :, j] = best
                moved[:, :, j - first] = difference
                gradient[:, :, j:last] += difference[:, :, None] * inside[:, None, j - first, j - first :]
            changed += int(np.count_nonzero(moved))
            # columns before j are not looked at again in this sweep
            gradient[:, :, last:] += moved @ moments[:, first:last, last:]
        found = replace(found, codes=codes.reshape(found.codes.shape).astype(found.codes.dtype))
        if scales:
            found = _refit(target, moments, found)
        if not changed:
            break
    return found


def output_error(target: np.ndarray, moments: np.ndarray, made: Coded) -> float:
    """E over all rows, as the module says."""
    return float(_row_errors(target, moments, made).sum())


def kept_type(scale: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Scales as float32, or as numbers of float16 where the old ones were, for a file to hold them so."""
    with np.errstate(over="ignore"):
        half = old.astype(np.float16).astype(np.float32)
        rounded = scale.astype(np.float16).astype(np.float32)
    if np.array_equal(half, old) and np.isfinite(rounded).all() and (rounded > 0).all():
        return rounded
    return scale.astype(np.float32)


def _row_errors(target: np.ndarray, moments: np.ndarray, made: Coded) -> np.ndarray:
    error = made.rows().astype(np.float64).reshape(target.shape) - target
    found: np.ndarray = np.einsum("gnk,gnk->gn", error @ moments, error)
    return found


def _refit(target: np.ndarray, moments: np.ndarray, made: Coded) -> Coded:
    """The best scale of each group in turn, given the codes and the other scales."""
    groups, rows, width = target.shape
    scale = made.scale.astype(np.float64).reshape(groups, rows, -1)
    zero = _by_column(made, made.zero, groups)
    whole = made.codes.reshape(target.shape) - zero
    gradient = (whole * _by_column(made, made.scale, groups) - target) @ moments
    for index, first in enumerate(range(0, width, made.block)):
        part = slice(first, min(first + made.block, width))
        counts = whole[:, :, part]
        curve = np.einsum("gnk,gnk->gn", counts @ moments[:, part, part], counts)
        slope = np.einsum("gnk,gnk->gn", gradient[:, :, part], counts)
        old = scale[:, :, index]
        new = old - np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
        # a scale that leaves its neighbourhood has codes that no longer fit it
        step = np.where((new > 0.5 * old) & (new < 2 * old), new, old) - old
        scale[:, :, index] += step
        gradient += (counts * step[:, :, None]) @ moments[:, part, :]
    refitted = replace(made, scale=kept_type(scale.reshape(made.scale.shape), made.scale))
    # the type scales are stored in may cost more than refitting gains
    worse = _row_errors(target, moments, refitted) > _row_errors(target, moments, made)
    return replace(made, scale=np.where(worse.reshape(-1, 1), made.scale, refitted.scale))


def _damped(moments: np.ndarray, damp: float) -> np.ndarray | None:
    """S with its diagonal raised so that it can be inverted; None where all of it is 0."""
    diagonal = np.einsum("gkk->gk", moments)
    mean = diagonal.mean(axis=1)
    if not (mean > 0).any():
        return None
    damped = moments.astype(np.float64)
    index = np.arange(moments.shape[1])
    # a group that reads nothing is rounded to the nearest
    damped[:, index, index] += np.where(mean > 0, damp * mean, 1.0)[:, None]
    return damped


def _by_column(made: Coded, numbers: np.ndarray, groups: int) -> np.ndarray:
    """Numbers a group of elements as float64 ``[g, n, k]``."""
    wide = np.broadcast_to(made.spread(numbers), made.codes.shape).astype(np.float64)
    return wide.reshape(groups, -1, made.codes.shape[1])


def _spans(width: int) -> Iterator[tuple[int, int]]:
    for first in range(0, width, BLOCK):
        yield first, min(first + BLOCK, width)
