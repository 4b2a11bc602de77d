"""Agreement of two rankings of the same sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 500
# Fewest sites whose rank correlation says anything.
LEAST_SITES = 5


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant or not finite."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    x, y = rankdata(x), rankdata(y)
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length > 0 else float("nan")


def overlap(predicted: np.ndarray, measured: np.ndarray, share: float = 0.25, *, most: bool = False) -> float:
    """Share of the ``ceil(share * sites)`` least (or most) harmful sites that the prediction names too.

    Sites that tie at the edge of the prediction count with the chance that a random choice among them picks
    them, so that a constant prediction gets what chance gives; the measured side breaks ties by order.
    """
    sign = -1.0 if most else 1.0
    guess, truth = sign * np.asarray(predicted, np.float64), sign * np.asarray(measured, np.float64)
    k = int(np.ceil(share * len(truth)))
    wanted = np.zeros(len(truth), bool)
    wanted[np.argsort(truth, kind="stable")[:k]] = True
    edge = np.sort(guess)[k - 1]
    inside, tied = guess < edge, guess == edge
    chance = (k - inside.sum()) / tied.sum()
    return float(((inside & wanted).sum() + chance * (tied & wanted).sum()) / k)


def interval(predicted: np.ndarray, measured: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`spearman`, sites drawn with replacement."""
    found = resampled(predicted, measured, seed)
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def resampled(predicted: np.ndarray, measured: np.ndarray, seed: int = 0) -> np.ndarray:
    """:func:`spearman` of each bootstrap resample, float64 ``[RESAMPLES]``; NaN where one has no spread."""
    draws = np.random.default_rng(seed).integers(0, len(measured), (RESAMPLES, len(measured)))
    x, y = (rankdata(values[draws], axis=1) for values in (predicted, measured))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    length = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    found: np.ndarray = (x * y).sum(axis=1) / np.where(length > 0, length, np.nan)
    return found


def paired(
    predicted: Mapping[str, float], measured: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The two values of each site both know; None for fewer than :data:`LEAST_SITES` or no spread."""
    sites = [s for s in measured if s in predicted]
    a, b = np.array([predicted[s] for s in sites]), np.array([measured[s] for s in sites])
    if len(sites) < LEAST_SITES or not np.isfinite(spearman(a, b)):
        return None
    return a, b
