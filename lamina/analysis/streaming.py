"""Statistics that grow batch by batch and never hold more than one chunk of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BINS = 2048
# Elements turned to float64 at a time: 512 kB, which stays in the cache of a core.
CHUNK = 1 << 16


@dataclass(frozen=True)
class RangeStatistics:
    """The distribution of one value over the calibration data.

    Attributes:
        minimum: Smallest finite element, exact.
        maximum: Largest finite element, exact.
        count: Finite elements seen.
        mean: Mean of them.
        variance: Population variance of them.
        histogram: int64 ``[bins]``; sums to ``count``.
        edges: float64 ``[bins + 1]``, evenly spaced, covering minimum and maximum.
        zeros: Elements that are exactly zero (a quantizer always represents them exactly).
        nonfinite: NaN and infinite elements left out (masked scores, for instance).
    """

    minimum: float
    maximum: float
    count: int
    mean: float
    variance: float
    histogram: np.ndarray
    edges: np.ndarray
    zeros: int = 0
    nonfinite: int = 0


class Moments:
    """Count, mean and sum of squared deviations, combined chunk by chunk (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    def add(self, chunk: np.ndarray) -> None:
        """Take in float64 values."""
        count = chunk.size
        if not count:
            return
        mean = float(chunk.mean())
        deviation = chunk - mean
        # Not np.dot: its threads would wait for the cores that ONNX Runtime's threads spin on (20x slower).
        squares = float(np.multiply(deviation, deviation, out=deviation).sum())
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.squares += squares + delta * delta * (self.count * (count / total))
        self.count = total

    @property
    def variance(self) -> float:
        """Population variance."""
        return self.squares / self.count if self.count else 0.0


class Histogram:
    """A fixed number of even bins whose range doubles when a value falls outside.

    Doubling merges pairs of bins, so no value is looked at twice and every count stays exact.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, dtype=np.int64)
        self.low = 0.0
        self.width = 0.0

    def add(self, chunk: np.ndarray, low: float, high: float) -> None:
        """Take in float64 values, all of them within ``low`` to ``high``."""
        if not self.width:
            self._start(low, high)
        while low < self.low or high > self.low + self.width:
            self._double(low < self.low)
        bins = len(self.counts)
        index = ((chunk - self.low) * (bins / self.width)).astype(np.int64)
        # The top edge belongs to the last bin.
        np.minimum(index, bins - 1, out=index)
        self.counts += np.bincount(index, minlength=bins)

    @property
    def edges(self) -> np.ndarray:
        """The ``bins + 1`` edges."""
        bins = len(self.counts)
        return self.low + self.width * (np.arange(bins + 1, dtype=np.float64) / bins)

    def _start(self, low: float, high: float) -> None:
        # A constant gets a range of its own scale; the smallest normal float32 keeps bins apart from zero.
        least = max(abs(low), abs(high)) * 2.0**-10
        self.low = low
        self.width = max(high - low, least, float(np.finfo(np.float32).tiny) * len(self.counts))

    def _double(self, downwards: bool) -> None:
        bins = len(self.counts)
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(bins, dtype=np.int64)
        if downwards:
            self.low -= self.width
            self.counts[bins // 2 :] = merged
        else:
            self.counts[: bins // 2] = merged
        self.width *= 2.0


class RangeAccumulator:
    """Feeds one value's :class:`RangeStatistics`."""

    def __init__(self, bins: int = BINS) -> None:
        self._moments = Moments()
        self._histogram = Histogram(bins)
        self._minimum = np.inf
        self._maximum = -np.inf
        self._zeros = 0
        self._nonfinite = 0
        self.problem: str | None = None

    def add(self, array: np.ndarray) -> None:
        """Take in one batch's array, of any shape and floating dtype."""
        for part in chunks(array):
            chunk = part.astype(np.float64)
            low, high = (float(chunk.min()), float(chunk.max())) if chunk.size else (0.0, 0.0)
            if not (np.isfinite(low) and np.isfinite(high)):
                finite = chunk[np.isfinite(chunk)]
                self._nonfinite += chunk.size - finite.size
                chunk = finite
                low, high = (float(chunk.min()), float(chunk.max())) if chunk.size else (0.0, 0.0)
            if not chunk.size:
                continue
            self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
            self._zeros += chunk.size - int(np.count_nonzero(chunk))
            self._moments.add(chunk)
            self._histogram.add(chunk, low, high)

    @property
    def count(self) -> int:
        """Finite elements so far."""
        return self._moments.count

    def result(self) -> RangeStatistics:
        """What was seen so far."""
        return RangeStatistics(
            self._minimum,
            self._maximum,
            self._moments.count,
            self._moments.mean,
            self._moments.variance,
            self._histogram.counts.copy(),
            self._histogram.edges,
            self._zeros,
            self._nonfinite,
        )


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    """Flat pieces of ``array``; a contiguous array is not copied."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]
