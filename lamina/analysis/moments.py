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
            gram = self.xx - np.outer(x, self.x) - np.outer(self.x, x) + n * np.outer(x, x)
            cross = self.xy - np.outer(x, self.y) - np.outer(self.x, y) + n * np.outer(x, y)
        return gram, cross, self.yy - 2 * y * self.y + n * y * y

    def error(self, matrix: np.ndarray, offset: np.ndarray) -> float:
        """Mean over tokens of ``L2(matrix x + offset - y)^2``; matrix ``[out, in]`` or diagonal ``[in]``."""
        gram, cross, energy = self.about(np.zeros_like(self.x), offset)
        if self.diagonal:
            total = energy + matrix * (matrix * gram) - 2 * matrix * cross
            return max(0.0, float(total.sum())) / max(self.count, 1e-300)
        explained = float((matrix @ gram * matrix).sum()) - 2.0 * float((matrix.T * cross).sum())
        return max(0.0, float(energy.sum()) + explained) / max(self.count, 1e-300)


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
    best = None
    for ridge, found, shift in _maps(fitted, offset, matrix, ridges):
        error = held.error(found, shift)
        if error < (before if best is None else best.after):
            best = Correction(found, shift, ridge, before, error)
    return best


def _maps(
    moments: Moments, offset: bool, matrix: bool, ridges: Sequence[float]
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(ridge, A, b) for the offset alone and for every ridge."""
    count = max(moments.count, 1e-300)
    mean_x = moments.x / count if offset else np.zeros_like(moments.x)
    mean_y = moments.y / count if offset else np.zeros_like(moments.y)
    zero = np.zeros_like(moments.xy.T)
    made = [(float("inf"), zero, mean_y)] if offset else []
    if not matrix:
        return made
    gram, cross, _ = moments.about(mean_x, mean_y)
    if moments.diagonal:
        unit = float(gram.mean())
        for ridge in ridges:
            found = cross / np.maximum(gram + ridge * unit, np.finfo(np.float64).tiny)
            made.append((ridge, found, mean_y - found * mean_x))
        return made
    values, vectors = np.linalg.eigh(gram)
    unit = float(values.clip(0).mean())
    if unit <= 0:
        return made  # x never varies: nothing to learn from it
    turned = vectors.T @ cross
    for ridge in ridges:
        found = (vectors @ (turned / (values.clip(0) + ridge * unit)[:, None])).T
        made.append((ridge, found, mean_y - found @ mean_x))
    return made
