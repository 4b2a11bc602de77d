"""How far two arrays are apart: absolute, against the larger one's magnitude, and in ULP."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

DEFAULT_TOLERANCE = 1e-5
# Default tolerance of dtypes too short for 1e-5, in units of their relative spacing.
_SHORT_TYPE_ULPS = 8


@dataclass(frozen=True)
class Difference:
    """How one array differs from a reference.

    Attributes:
        max_abs: Largest absolute difference; infinite where shapes differ or only one side is finite.
        mean_abs: Mean over the elements compared.
        scale: Largest finite magnitude of the reference.
        max_ulp: Largest difference in units in the last place of the reference's own element; None unless
            both are of one floating dtype. Near zero a unit is tiny, so compare ``max_abs`` with ``scale``.
        mean_ulp: Mean of the same.
        count: Elements compared.
        reason: What makes ``max_abs`` infinite, or None.
    """

    max_abs: float
    mean_abs: float
    scale: float
    max_ulp: float | None
    mean_ulp: float | None
    count: int
    reason: str | None = None


def difference(before: np.ndarray, after: np.ndarray, *, finite_only: bool = False) -> Difference:
    """Measure ``after`` against ``before``; NaN equals NaN, an infinity only itself.

    Args:
        before: The reference.
        after: The other one.
        finite_only: Look only where ``before`` is finite.
    """
    infinite = float("inf")
    if before.shape != after.shape:
        said = f"shape {list(after.shape)} against {list(before.shape)}"
        return Difference(infinite, infinite, 0.0, None, None, before.size, said)
    if before.dtype.kind in "OUSb" or after.dtype.kind in "OUSb":
        return _unequal(before, after)
    with np.errstate(all="ignore"):
        return _numbers(before, after, finite_only)


def unit(magnitude: np.ndarray | float, dtype: np.dtype[np.generic]) -> np.ndarray:
    """The unit in the last place of floating ``dtype`` at ``magnitude``, as float64; denormals count."""
    facts = ml_dtypes.finfo(dtype)
    sizes = np.asarray(magnitude, np.float64)
    exponent = np.where(sizes > 0, np.frexp(sizes)[1] - 1, facts.minexp)
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, facts.minexp) - facts.nmant))


def is_discrete(dtype: np.dtype[np.generic]) -> bool:
    """Whether values of ``dtype`` are numbers one counts with, flags or texts: rounding is no excuse."""
    return dtype.kind in "iubOUS"


def epsilon(dtype: np.dtype[np.generic]) -> float:
    """Relative spacing of floating ``dtype`` at 1; 0 for all others."""
    if is_discrete(dtype):
        return 0.0
    real = np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
    return float(ml_dtypes.finfo(real).eps)


def tolerance_of(dtype: np.dtype[np.generic], given: float | None = None) -> float:
    """What counts as equal: nothing but equality for discrete values, else ``given`` or the dtype's own."""
    if is_discrete(dtype):
        return 0.0
    return max(DEFAULT_TOLERANCE, _SHORT_TYPE_ULPS * epsilon(dtype)) if given is None else given


def _unequal(before: np.ndarray, after: np.ndarray) -> Difference:
    wrong = before.astype(object) != after.astype(object)
    share = float(np.mean(wrong)) if wrong.size else 0.0
    return Difference(float(share > 0), share, 1.0, None, None, before.size)


def _numbers(before: np.ndarray, after: np.ndarray, finite_only: bool) -> Difference:
    wide = np.complex128 if "c" in (before.dtype.kind, after.dtype.kind) else np.float64
    a, b = before.astype(wide), after.astype(wide)
    apart = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if is_discrete(before.dtype) and before.dtype == after.dtype:
        apart = np.where(before == after, 0.0, np.maximum(apart, 1.0))  # int64 beyond 2**53
    apart = np.where(same & ~_lost(before, after), 0.0, np.where(np.isnan(apart), np.inf, apart))
    finite = np.isfinite(a)
    looked = apart[finite] if finite_only else apart
    scale = float(np.abs(a[finite]).max(initial=0.0))
    reason = None if np.isfinite(looked).all() else "finite in one model, NaN or infinite in the other"
    ulp: np.ndarray | None = None
    if before.dtype == after.dtype and not is_discrete(before.dtype) and wide is np.float64:
        magnitudes = np.abs(np.where(finite, a, 0.0))
        ulp = apart / unit(magnitudes, before.dtype)
        ulp = ulp[finite] if finite_only else ulp
    return Difference(
        max_abs=float(looked.max(initial=0.0)),
        mean_abs=float(looked.mean()) if looked.size else 0.0,
        scale=scale,
        max_ulp=None if ulp is None else float(ulp.max(initial=0.0)),
        mean_ulp=None if ulp is None else (float(ulp.mean()) if ulp.size else 0.0),
        count=int(looked.size),
        reason=reason,
    )


def _lost(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where integers differ though float64 cannot tell."""
    if is_discrete(before.dtype) and before.dtype == after.dtype:
        return np.asarray(before != after)
    return np.zeros(before.shape, np.bool_)
