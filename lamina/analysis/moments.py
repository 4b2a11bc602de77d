"""Second moments of what an operator reads and what it should add, and the ridge regression they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# Weights of the penalty that are tried, relative to the mean variance of what is read.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_BLOCK = 1024


@dataclass
class Moments:
    """Sums over tokens of x, y, x'x, x'y and y'y, all float64.

    Attributes:
        count: Tokens, or their total weight (:meth:`weighed`).
        x: ``[in]``: sum of x.
        y: ``[out]``: sum of y.
        xx: ``[in, in]``; of a diagonal map ``[in]``: sum of squares.
        xy: ``[in, out]``; of a diagonal map ``[in]``: sum of products.
        yy: ``[out]``: sum of squares of y.
    """

    count: float
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @staticmethod
    def empty(width: int, height: int, *, diagonal: bool = False) -> Moments:
        """No tokens yet, of x ``[width]`` and y ``[height]``; a diagonal map has equal widths."""
        gram, cross = ((width,), (width,)) if diagonal else ((width, width), (width, height))
        first, second = np.zeros(width), np.zeros(height)
        return Moments(0.0, first, second, np.zeros(gram), np.zeros(cross), np.zeros(height))

    @property
    def diagonal(self) -> bool:
        """Whether channel i of x only explains channel i of y."""
        return self.xx.ndim == 1

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take in tokens: x ``[n, in]``, y ``[n, out]``, any floating dtype."""
        for start in range(0, len(x), _BLOCK):
            a = x[start : start + _BLOCK].astype(np.float64)
            b = y[start : start + _BLOCK].astype(np.float64)
            self.count += len(a)
            self.x += a.sum(axis=0)
            self.y += b.sum(axis=0)
            self.yy += np.einsum("no,no->o", b, b)
            if self.diagonal:
                self.xx += np.einsum("ni,ni->i", a, a)
                self.xy += np.einsum("ni,ni->i", a, b)
            else:
                self.xx += a.T @ a
                self.xy += a.T @ b

    def __add__(self, other: Moments) -> Moments:
        pairs = ((self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy))
        x, y, xx, xy = (a + b for a, b in pairs)
        return Moments(self.count + other.count, x, y, xx, xy, self.yy + other.yy)

    def weighed(self, weight: float) -> Moments:
        """The same tokens with ``weight`` in all."""
        by = weight / self.count if self.count else 0.0
        x, y, xx, xy, yy = (by * a for a in (self.x, self.y, self.xx, self.xy, self.yy))
        return Moments(weight if self.count else 0.0, x, y, xx, xy, yy)

    def about(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x'x, x'y and y'y of the tokens less ``x`` and ``y``, from the sums alone."""
        n = self.count
        if self.diagonal:
            gram = self.xx - 2 * x * self.x + n * x * x
            cross = self.xy - x * self.y - self.x * y + n * x * y
        else:
            half = np.outer(x, n / 2 * x - self.x)
            gram = self.xx + half + half.T
            cross = self.xy - np.outer(x, self.y) - np.outer(self.x, y) + n * np.outer(x, y)
        return gram, cross, self.yy - 2 * y * self.y + n * y * y

    def error(self, matrix: np.ndarray, offset: np.ndarray) -> float:
        """Mean over tokens of ``L2(matrix x + offset - y)^2``; matrix ``[out, in]`` or diagonal ``[in]``."""
        energy = float((self.yy - 2 * offset * self.y + self.count * offset * offset).sum())
        if self.diagonal:
            cross = self.xy - self.x * offset
            explained = float((matrix * (matrix * self.xx - 2 * cross)).sum())
        else:
            agreed = float((matrix.T * self.xy).sum()) - float((matrix @ self.x) @ offset)
            explained = float((matrix @ self.xx * matrix).sum()) - 2.0 * agreed
        return max(0.0, energy + explained) / max(self.count, 1e-300)


@dataclass(frozen=True)
class Correction:
    """``matrix x + offset``, to be added to what an operator gives.

    Attributes:
        matrix: float64 ``[out, in]``, of a diagonal map ``[in]``; zeros where only the mean is corrected.
        offset: float64 ``[out]``.
        ridge: Penalty chosen; inf: only the offset.
        before: Mean squared error on held-out tokens without the correction.
        after: With it, as fitted without those tokens.
    """

    matrix: np.ndarray
    offset: np.ndarray
    ridge: float
    before: float
    after: float

    def times(self, share: float) -> Correction:
        """A share of it; the errors stay those of the whole."""
        return replace(self, matrix=share * self.matrix, offset=share * self.offset)


def ridge_correction(
    fitted: Moments, held: Moments, *, offset: bool, matrix: bool = True, ridges: Sequence[float] = RIDGES
) -> Correction | None:
    """Least ``sum L2(A x + b - y)^2 + n r F(A)^2``, r chosen by the error on held-out tokens.

    y is what is missing, so the penalty pulls a refitted weight towards the one it has: with X the changed
    and X0 the original input, ``y = W (x0 - x)`` gives qep's ``W (X0 - X) X' (X X' + damp)^-1``
    (arXiv:2504.09629), and ``matrix=False`` gives mean-to-bias.

    Args:
        fitted: Tokens to fit.
        held: Tokens to choose r on.
        offset: Whether there is a b; without one, moments are not centred.
        matrix: Whether there is an A.
        ridges: What to choose r from, relative to the mean variance of x.

    Returns:
        None where nothing lowers the error on the held-out tokens.
    """
    zero, none = np.zeros_like(fitted.xy.T), np.zeros_like(fitted.y)
    before = held.error(zero, none)
    best: Correction | None = None

    def attempt(ridge: float, found: np.ndarray, shift: np.ndarray) -> float:
        nonlocal best
        error = held.error(found, shift)
        if error < (before if best is None else best.after):
            best = Correction(found, shift, ridge, before, error)
        return error

    mean_y = fitted.y / max(fitted.count, 1e-300) if offset else none
    if offset:
        attempt(float("inf"), zero, mean_y)
    maps = _Maps(fitted, mean_y, offset) if matrix else None
    if maps is None or maps.unit <= 0:
        return best  # x never varies: nothing to learn from it
    # from the middle on in both directions, each until the error rises
    order, middle = sorted(ridges), len(ridges) // 2
    centre = attempt(order[middle], *maps.at(order[middle]))
    for side in (order[middle + 1 :], order[:middle][::-1]):
        last = centre
        for ridge in side:
            error = attempt(ridge, *maps.at(ridge))
            if error >= last:
                break
            last = error
    return best


class _Maps:
    """(A, b) of every ridge, from one set of centred moments."""

    def __init__(self, moments: Moments, mean_y: np.ndarray, offset: bool) -> None:
        count = max(moments.count, 1e-300)
        self._mean_x = moments.x / count if offset else np.zeros_like(moments.x)
        self._mean_y = mean_y
        self._gram, self._cross, _ = moments.about(self._mean_x, mean_y)
        self._diagonal = moments.diagonal
        self.unit = float((self._gram if self._diagonal else np.diagonal(self._gram)).mean())

    def at(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """A and b of one penalty, relative to the mean variance of x."""
        if self._diagonal:
            tiny = np.finfo(np.float64).tiny
            found = self._cross / np.maximum(self._gram + ridge * self.unit, tiny)
            return found, self._mean_y - found * self._mean_x
        found = solve_ridge(self._gram, ridge * self.unit, self._cross).T
        return found, self._mean_y - found @ self._mean_x


def solve_ridge(gram: np.ndarray, penalty: float, cross: np.ndarray) -> np.ndarray:
    """``(gram + penalty I)^-1 cross`` of a positive semidefinite matrix, by Cholesky."""
    from scipy.linalg import cho_factor, cho_solve

    raised = gram.copy()
    raised[np.diag_indices_from(raised)] += penalty
    try:
        return np.asarray(cho_solve(cho_factor(raised, check_finite=False), cross))
    except np.linalg.LinAlgError:  # a penalty below the rounding of the sums
        return np.asarray(np.linalg.lstsq(raised, cross, rcond=None)[0])
