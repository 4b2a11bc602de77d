"""Means of noisy numbers, one observation at a time, with how far off they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over observations.

    Attributes:
        mean: Of the observations, by their weights.
        standard_error: Of the mean; NaN with fewer than two observations.
        count: Observations.
    """

    mean: float
    standard_error: float
    count: int

    def times(self, factor: float) -> Estimate:
        """The same estimate in another unit."""
        return Estimate(self.mean * factor, self.standard_error * abs(factor), self.count)


class Running:
    """Weighted mean and variance in one pass (West 1979, Comm. ACM 22(9)): nothing is kept but three sums."""

    def __init__(self) -> None:
        self._count = 0
        self._weight = 0.0
        self._squares = 0.0  # of the weights
        self._mean = 0.0
        self._spread = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """One more observation; its weight says how many samples it stands for."""
        self._count += 1
        self._weight += weight
        self._squares += weight * weight
        shift = value - self._mean
        self._mean += shift * weight / self._weight
        self._spread += weight * shift * (value - self._mean)

    def estimate(self) -> Estimate:
        """What the observations say so far.

        The error is that of a weighted mean of independent observations: their variance, without bias, times
        the sum of squared weights over the square of their sum.
        """
        if self._count < 2:
            return Estimate(self._mean, math.nan, self._count)
        variance = self._spread / (self._weight - self._squares / self._weight)
        error = math.sqrt(max(variance, 0.0) * self._squares) / self._weight
        return Estimate(self._mean, error, self._count)
