"""What one operator's correction is fitted on: moments over calibration tokens, and the ridge they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.matching import is_held, places_of
from lamina.analysis.moments import RIDGES, Correction, Moments, ridge_correction
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.operators import evenly, patches
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.passes.repair_sites import NAME, RepairSite

ROLES = ("norm", "writer", "reader")
# Squared error that is rounding: nothing to repair.
_ROUNDING = 1e-12
# A correction must leave at most this share of an operator's own error: a trial costs a run of the rest.
WORTH = 0.99

Values = Mapping[str, np.ndarray]
Made = list[tuple[RepairSite, Correction]]
# Site -> moments of (fitted, held-out) tokens, of (first, other) tokens of a sequence each.
Sums = dict[str, tuple[tuple[Moments, Moments], tuple[Moments, Moments]]]


@dataclass(frozen=True)
class Compensation:
    """How to compensate.

    Attributes:
        roles: Which operators: ``norm`` (gain and shift of normalizations), ``writer`` (operators whose
            output ends in a residual sum), ``reader`` (the other linear operators).
        weights: Whether matrices, kernels and gains are fitted too, or biases alone (mean-to-bias).
        add_biases: Whether operators without a bias get one, which costs bytes and perhaps time.
        rows: Calibration rows looked at.
        tokens: Input vectors or windows of each operator, over all rows.
        ridges: Penalties to choose from, relative to the mean variance of what an operator reads.
        shares: How much of a correction is made, to choose from (qep's alpha); the first with every lead, the
            others with the best one.
        leads: Shares of the weight that a sequence's first token gets, to choose from; None: as every other.
            Of a class token alone the output may be made.
    """

    roles: tuple[str, ...] = ROLES
    weights: bool = True
    add_biases: bool = False
    rows: int = 256
    tokens: int = 8192
    ridges: tuple[float, ...] = RIDGES
    shares: tuple[float, ...] = (1.0, 0.5)
    leads: tuple[float | None, ...] = (None, 0.5)

    def __post_init__(self) -> None:
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            what = f"no operator has the role '{unknown[0]}'" if unknown else "no role is given"
            raise PassError(what, advice=f"choose from {', '.join(ROLES)}")
        if self.rows < 2 or self.tokens < 2 or any(r <= 0 for r in self.ridges):
            raise PassError("rows and tokens must be at least 2, ridges positive", where=NAME)


def moments_of(
    wave: Sequence[RepairSite],
    batches: Iterable[tuple[Dataset, Values, Values]],
    share: float,
    fits: Callable[[RepairSite], bool],
) -> Sums:
    """Moments of sites that do not depend on each other, from one pass over the data.

    Args:
        wave: The sites.
        batches: Each with the original's values and the changed program's.
        share: Tokens of each site to a row.
        fits: Whether a map of what a site reads is wanted, or its mean alone.
    """
    sums: Sums = {}
    for number, (batch, targets, values) in enumerate(batches):
        mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
        count = max(2, int(share * len(batch)))
        for site in wave:
            missing = targets[site.target].astype(np.float64) - values[site.value]
            x, y, first = tokens_of(site, values[site.read], missing, mask, count, fits(site))
            if site.node not in sums:
                shape, diagonal = (x.shape[1], y.shape[1]), site.role == "norm"
                a, b, c, d = (Moments.empty(*shape, diagonal=diagonal) for _ in range(4))
                sums[site.node] = (a, b), (c, d)
            part = sums[site.node][is_held(number)]
            part[0].add(x[first], y[first])
            part[1].add(x[~first], y[~first])
    return sums


def corrections(wave: Sequence[RepairSite], sums: Sums, lead: float | None, how: Compensation) -> Made:
    """The best correction of each site that has one; ``lead``: weight of first tokens."""
    made: Made = []
    for site in wave:
        parts = []
        for first, others in sums[site.node]:
            if lead is None:
                parts.append(first + others)
            elif first.count and others.count:
                total = first.count + others.count
                parts.append(first.weighed(lead * total) + others.weighed((1 - lead) * total))
        if len(parts) < 2 or float(parts[1].yy.sum()) <= _ROUNDING * parts[1].count:
            continue
        offset = site.bias is not None or (how.add_biases and site.addable)
        fits = parts[0].x.size > 0 and how.weights and not site.fixed
        found = ridge_correction(parts[0], parts[1], offset=offset, matrix=fits, ridges=how.ridges)
        if found is not None and found.after <= WORTH * found.before:
            made.append((site, found))
    return made


def tokens_of(
    site: RepairSite,
    read: np.ndarray,
    missing: np.ndarray,
    mask: np.ndarray | None,
    count: int,
    weights: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``[n, in]``, ``[n, out]``, and which are a sequence's first: evenly spaced tokens, no padding.

    At most ``count``, and the first tokens. Where only biases are fitted, and for grouped convolutions,
    ``in`` is 0.
    """
    if site.operator is not None and site.operator.kind == "conv":
        y = np.moveaxis(missing, 1, -1).reshape(-1, missing.shape[1])
        y = y[evenly(count, len(y))]
        if not weights or site.operator.group > 1:
            return np.zeros((len(y), 0)), y, np.zeros(len(y), bool)
        x = patches(read, site.operator, count)
        return x.reshape(len(x), -1), y, np.zeros(len(y), bool)
    x, y = read.reshape(-1, read.shape[-1]), missing.reshape(-1, missing.shape[-1])
    length = missing.shape[-2] if missing.ndim > 2 else 0
    places = places_of(missing.shape, mask, len(y), len(y))
    first = places[places % length == 0] if length > 1 else places[:0]
    places = np.union1d(first, places[evenly(count, len(places))])
    leads = np.isin(places, first)
    if not weights:
        return np.zeros((len(places), len(y[0]) if site.role == "norm" else 0)), y[places], leads
    return x[places], y[places], leads
