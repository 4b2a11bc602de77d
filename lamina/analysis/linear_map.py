"""The affine map that takes one depth to another: ridge regression from second moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.errors import DataError

# Relative to the mean eigenvalue of the covariance: below the noise of float32 activations.
RIDGE = 1e-4
_BLOCK = 512


@dataclass(frozen=True)
class LinearMap:
    """``y = A x + b``.

    Attributes:
        matrix: float64 ``[out, in]``.
        offset: float64 ``[out]``.
        residual: Sum of squared errors over the sum of squared deviations of y, on the tokens of the fit.
        tokens: Tokens of the fit; fewer than some multiples of ``in`` make the residual too good.
    """

    matrix: np.ndarray
    offset: np.ndarray
    residual: float
    tokens: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The map of ``[n, in]``: ``[n, out]``."""
        mapped: np.ndarray = x @ self.matrix.T + self.offset
        return mapped


def fit_map(statistics: Statistics, first: str, last: str, ridge: float = RIDGE) -> LinearMap:
    """The map that replaces all branches from depth ``first`` up to depth ``last``.

    Args:
        statistics: Collected with ``Need.TOKENS``.
        first: Depth that is read: the name of the first branch replaced.
        last: Depth that is made: the branch after the last one replaced, or ``end``.
        ridge: Weight of ``F(A)^2``, relative to the mean variance of x.

    Raises:
        DataError: A depth was not sampled, or the two have no tokens in common.
    """
    depths = statistics.depths
    for name in (first, last):
        if name not in depths.tokens:
            known = ", ".join(depths.tokens) or "none"
            raise DataError(f"depth '{name}' was not sampled", advice=f"sampled are: {known}")
    x, y = depths.tokens[first], depths.tokens[last]
    if depths.group[first] != depths.group[last] or len(x) != len(y):
        raise DataError(
            f"depths '{first}' and '{last}' have different tokens",
            advice="choose two depths between which nothing is subsampled",
        )
    return fit(x, y, ridge)


def fit(x: np.ndarray, y: np.ndarray, ridge: float = RIDGE) -> LinearMap:
    """Least ``sum_t L2(A x_t + b - y_t)^2 + n r F(A)^2``, r = ridge times the mean variance of x.

    Second moments (XtX, XtY) are summed in float64 over blocks of 512 tokens; x ``[n, d]``, y ``[n, e]``.
    """
    count, width = x.shape
    mean_x, mean_y = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    gram, cross = np.zeros((width, width)), np.zeros((width, y.shape[1]))
    energy = 0.0
    for start in range(0, count, _BLOCK):
        a = x[start : start + _BLOCK].astype(np.float64) - mean_x
        b = y[start : start + _BLOCK].astype(np.float64) - mean_y
        gram += a.T @ a
        cross += a.T @ b
        energy += float(np.square(b).sum())
    weight = ridge * np.trace(gram) / max(1, width)
    # A constant x leaves nothing to solve: any positive weight gives the zero map.
    regular = gram + np.eye(width) * (weight if weight > 0 else 1.0)
    matrix = np.linalg.solve(regular, cross).T
    # tr((Y - XA')'(Y - XA')) from the moments alone
    error = energy - 2.0 * float((matrix.T * cross).sum()) + float(((matrix @ gram) * matrix).sum())
    residual = max(0.0, error) / energy if energy > 0 else 0.0
    return LinearMap(matrix, mean_y - matrix @ mean_x, residual, count)


def relative_residual(x: np.ndarray, y: np.ndarray) -> float:
    """:attr:`LinearMap.residual` of the best map from ``x`` to ``y``."""
    return fit(x, y).residual
