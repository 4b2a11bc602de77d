"""Choose the scale and zero point a value is quantized with, from its distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamina.analysis.range_entropy import least_divergence
from lamina.analysis.streaming import BINS, RangeStatistics
from lamina.errors import PassError

RANGE_METHODS = ("mse", "percentile", "minmax", "entropy")

# Clipping points tried for each end: even ones, and down to one bin for values with far outliers.
_RATIOS = np.concatenate([np.arange(128, 0, -1) / 128, np.geomspace(1 / 128, 1 / BINS, 65)[1:]])
# How many of the best pairs are judged by the exact error.
_FINALISTS = 24


@dataclass(frozen=True)
class _Grid:
    """Integers a quantizer may use, and whether its zero point is free."""

    low: int
    high: int
    symmetric: bool

    @staticmethod
    def of(bits: int, signed: bool, symmetric: bool) -> _Grid:
        if not 2 <= bits <= 16:
            raise PassError(f"bits={bits} is not possible", advice="choose 2 to 16 bits")
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return _Grid(low, high, symmetric)

    @property
    def middle(self) -> int:
        """Zero point of a symmetric quantizer."""
        return (self.low + self.high + 1) // 2

    def fit(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point for a real range that includes zero."""
        if self.symmetric:
            bound = max(-low, high)
            return _scale(bound / (self.high - self.middle)), self.middle
        scale = _scale((high - low) / (self.high - self.low))
        zero = int(np.clip(np.rint(self.low - low / scale), self.low, self.high))
        return scale, zero

    def reach(self, scale: float, zero: int) -> tuple[float, float]:
        """The real range that scale and zero point represent."""
        return (self.low - zero) * scale, (self.high - zero) * scale


def choose_range(
    stat: RangeStatistics,
    method: str = "mse",
    bits: int = 8,
    signed: bool = False,
    symmetric: bool = False,
    percentile: float = 99.99,
) -> tuple[float, int]:
    """Choose scale and zero point so that ``real = scale * (integer - zero_point)`` serves a value well.

    Zero is always represented exactly. A value that is never negative gets the lowest integer as zero point
    (0 when unsigned), one that is never positive the highest. ``symmetric`` fixes the zero point to the
    middle (0 when signed) and leaves the lowest integer of a signed grid unused when choosing the scale.

    Methods: ``minmax`` covers everything. ``percentile`` leaves ``100 - percentile`` percent of the elements
    that are not zero outside, half of them at each end (all at the one end of a one-sided value). ``mse``
    clips where the expected squared error, clipping plus rounding, is least: every pair of 192 clipping
    points an end is ranked by the usual scale^2/12 rounding model, the best ones, and then each end in turn,
    by the exact error of a histogram whose bins are uniform; elements that are exactly zero cost nothing.
    ``entropy`` clips where the quantized distribution diverges least from the one observed
    (:func:`lamina.analysis.range_entropy.least_divergence`).

    Args:
        stat: The value's distribution.
        method: One of :data:`RANGE_METHODS`.
        bits: Width of the integers.
        signed: Integers from ``-2^(bits-1)`` rather than from 0.
        symmetric: Fix the zero point to the middle of the grid.
        percentile: For the method of that name: percent of the elements to represent, over 50.

    Returns:
        The scale (a positive float32 number) and the zero point.

    Raises:
        PassError: An option is not understood.
    """
    grid = _Grid.of(bits, signed, symmetric)
    low, high = min(stat.minimum, 0.0), max(stat.maximum, 0.0)
    if method not in RANGE_METHODS:
        raise PassError(f"range method '{method}' is unknown", advice=f"choose one of {RANGE_METHODS}")
    if low == high:
        return 1.0, grid.fit(0.0, 1.0)[1]
    if method == "mse":
        return _least_error(stat, grid, low, high)
    if method == "percentile":
        if not 50.0 < percentile <= 100.0:
            raise PassError(f"percentile={percentile} is not possible", advice="choose over 50, at most 100")
        low, high = _percentile_range(stat, low, high, percentile, symmetric)
    if method == "entropy":
        low, high = least_divergence(_without_zeros(stat), stat.edges, low, high, 2**bits)
    return grid.fit(low, high)


def expected_error(
    stat: RangeStatistics, scale: float, zero: int, bits: int = 8, signed: bool = False
) -> float:
    """Mean squared error of quantizing a value, bins of its histogram taken as uniform."""
    grid = _Grid.of(bits, signed, False)
    return float(_exact_error(stat, grid, np.array([scale]), np.array([zero]))[0]) / max(1, stat.count)


def _scale(value: float) -> float:
    """The nearest float32 number that is not denormal."""
    return float(max(np.float32(value), np.finfo(np.float32).tiny))


# -- percentile -------------------------------------------------------------------------------------


def _percentile_range(
    stat: RangeStatistics, low: float, high: float, percentile: float, symmetric: bool
) -> tuple[float, float]:
    counts = _without_zeros(stat)
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    outside = (100.0 - percentile) / 100.0
    if symmetric and low < 0 < high:
        bound = _symmetric_quantile(stat, share, 1.0 - outside)
        return -min(bound, -low) if low else 0.0, min(bound, high)
    tail = outside / 2 if low < 0 < high else outside
    bottom = float(np.interp(tail, share, stat.edges)) if low < 0 else 0.0
    top = float(np.interp(1.0 - tail, share, stat.edges)) if high > 0 else 0.0
    return min(max(bottom, low), 0.0), max(min(top, high), 0.0)


def _symmetric_quantile(stat: RangeStatistics, share: np.ndarray, inside: float) -> float:
    """The bound that ``inside`` of the elements do not exceed in magnitude."""
    bounds = np.linspace(0.0, max(-stat.minimum, stat.maximum), 4 * len(stat.histogram) + 1)[1:]
    covered = np.interp(bounds, stat.edges, share) - np.interp(-bounds, stat.edges, share)
    return float(bounds[min(int(np.searchsorted(covered, inside)), len(bounds) - 1)])


# -- least squared error ----------------------------------------------------------------------------


def _least_error(stat: RangeStatistics, grid: _Grid, low: float, high: float) -> tuple[float, int]:
    bottoms = low * _RATIOS if low < 0 else np.zeros(1)
    tops = high * _RATIOS if high > 0 else np.zeros(1)
    if grid.symmetric:
        bounds = max(-low, high) * _RATIOS
        pairs = np.stack([-bounds, bounds], axis=1)
        estimate = _estimate_pairs(stat, grid, -bounds, bounds)
    else:
        pairs = np.stack([a.reshape(-1) for a in np.meshgrid(bottoms, tops, indexing="ij")], axis=1)
        estimate = _estimate_pairs(stat, grid, bottoms[:, None], tops[None, :]).reshape(-1)
    best = pairs[np.argsort(estimate, kind="stable")[:_FINALISTS]]
    # The whole range is always judged too: then clipping is never worse than not clipping.
    bottom, top = _best_pair(stat, grid, np.concatenate([best, [[low, high]]]))
    if not grid.symmetric:
        # The rounding model errs where steps are wide against the bulk of the values.
        bottom, top = _best_pair(stat, grid, np.stack([np.full_like(tops, bottom), tops], axis=1))
        bottom, top = _best_pair(stat, grid, np.stack([bottoms, np.full_like(bottoms, top)], axis=1))
    return grid.fit(bottom, top)


def _best_pair(stat: RangeStatistics, grid: _Grid, pairs: np.ndarray) -> tuple[float, float]:
    fitted = [grid.fit(float(a), float(b)) for a, b in pairs]
    scales, zeros = np.array([s for s, _ in fitted]), np.array([z for _, z in fitted])
    low, high = pairs[int(np.argmin(_exact_error(stat, grid, scales, zeros)))]
    return float(low), float(high)


def _estimate_pairs(stat: RangeStatistics, grid: _Grid, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Squared error by the rounding model: ``scale^2 / 12`` inside, squared distance outside."""
    steps = grid.high - (grid.middle if grid.symmetric else grid.low)
    span = high if grid.symmetric else high - low
    below, below_error = _tail(stat, low, upper=False)
    above, above_error = _tail(stat, high, upper=True)
    inside = np.maximum(stat.count - stat.zeros - below - above, 0.0)
    rounding = inside * (span / steps) ** 2 / 12.0
    return rounding + below_error + above_error


def _tail(stat: RangeStatistics, bound: np.ndarray, upper: bool) -> tuple[np.ndarray, np.ndarray]:
    """Elements beyond each bound and the sum of their squared distances to it.

    Bins are uniform. With prefix sums of counts and of first and second moments, any bound costs one look-up.
    """
    edges, counts = stat.edges, stat.histogram.astype(np.float64)
    if upper:
        # Mirror, so that one code path sums what lies below a bound.
        edges, counts, bound = -edges[::-1], counts[::-1], -bound
    left, right = edges[:-1], edges[1:]
    mean, second = (left + right) / 2, (left * left + left * right + right * right) / 3
    sums = [np.concatenate([[0.0], np.cumsum(counts * m)]) for m in (np.ones_like(mean), mean, second)]
    whole = np.clip(np.searchsorted(edges, bound, side="right") - 1, 0, len(counts))
    n, first, squares = (s[whole] for s in sums)
    part = np.minimum(whole, len(counts) - 1)
    reach = np.clip(bound - left[part], 0.0, right[part] - left[part])
    share = np.where(whole < len(counts), counts[part] * reach / (right[part] - left[part]), 0.0)
    error = squares - 2 * bound * first + bound * bound * n + share * reach * reach / 3
    return n + share, np.maximum(error, 0.0)


def _exact_error(stat: RangeStatistics, grid: _Grid, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Sum of squared errors for each (scale, zero point); exact for uniform bins and exact zeros."""
    counts = _without_zeros(stat)
    used = np.flatnonzero(counts)
    if not used.size:
        return np.zeros(len(scales))
    first, last = int(used[0]), int(used[-1]) + 1
    counts, ends = counts[first:last], stat.edges[first : last + 1]
    step = scales[:, None]
    low = (grid.low - zeros)[:, None] * step
    high = (grid.high - zeros)[:, None] * step
    inner = np.minimum(np.maximum(ends, low), high)
    # Beyond the ends the error is the distance to them: the integral of its square is distance^3 / 3.
    beyond = ends - inner
    total = _rounding_integral(inner, step)
    total += beyond * beyond * beyond / 3
    # Differences at the ends of each bin, summed by parts: one product instead of a difference and a product.
    density = counts / np.diff(ends)
    weights = np.concatenate([[0.0], density]) - np.concatenate([density, [0.0]])
    error: np.ndarray = np.einsum("ij,j->i", total, weights)
    return error


def _without_zeros(stat: RangeStatistics) -> np.ndarray:
    """The histogram less the exact zeros, which cost nothing; rounding may have put them one bin off."""
    counts = stat.histogram.astype(np.float64)
    home = int(np.searchsorted(stat.edges, 0.0, side="right")) - 1
    left: float = stat.zeros
    for index in (home, home - 1, home + 1):
        if left and 0 <= index < len(counts):
            taken = min(counts[index], left)
            counts[index] -= taken
            left -= taken
    return counts


def _rounding_integral(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Integral from 0 to x of the squared distance to the nearest multiple of ``step``."""
    nearest = np.rint(x / step)
    rest = x - nearest * step
    integral: np.ndarray = nearest * step**3 / 12 + rest * rest * rest / 3
    return integral
