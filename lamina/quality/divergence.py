"""Divergences: how far a candidate's outputs are from the original's, which is at 0."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lamina.data import Dataset
from lamina.errors import DataError
from lamina.quality.metric import Outputs, RatioMetric, per_sample
from lamina.quality.outputs import (
    are_probabilities,
    class_axis,
    is_cache,
    is_float,
    log_probabilities,
    token_mask,
)


class Divergence(RatioMetric):
    """Base of the divergences: damage is the score itself."""

    higher_is_better = False
    kind = "divergence"


@dataclass(frozen=True)
class KlDivergence(Divergence):
    """Mean over positions of KL(original || candidate) in nats.

    Attributes:
        output: The output with the logits or probabilities.
    """

    output: str = "logits"
    name = "kl"
    divergence = "kl"

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Summed divergence and positions of each sample."""
        (_, values, original), *_ = _pairs(outputs, reference, (self.output,), self.name)
        axis = class_axis(values.ndim)
        ready, log_p, p = _distribution(original, axis)
        if axis in (-1, values.ndim - 1):
            divergence = _by_rows(values, log_p, p, ready)
        else:
            divergence = _kl(values, log_p, p, axis, ready)
        mask = token_mask(batch, values.shape) if values.ndim == 3 else None
        weight = np.ones_like(divergence) if mask is None else mask
        sums = per_sample(divergence * weight, batch).sum(axis=1)
        return np.stack([sums, per_sample(weight, batch).sum(axis=1)], axis=1)


@dataclass(frozen=True)
class CosineDivergence(Divergence):
    """1 minus the mean cosine of the outputs to the original's; a position of ``[b, length, width]`` each.

    Attributes:
        outputs: The outputs compared.
    """

    outputs: tuple[str, ...] = ()
    name = "cosine"

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Summed 1 - cosine and vectors of each sample, one pair of columns an output."""
        columns = []
        for _, values, original in _pairs(outputs, reference, self.outputs, self.name):
            mask = token_mask(batch, values.shape) if values.ndim == 3 else None
            if values.ndim != 3:
                values, original = per_sample(values, batch), per_sample(original, batch)
            distance = _cosine_distance(values, original)
            weight = np.ones_like(distance) if mask is None else mask
            columns += [per_sample(distance * weight, batch), per_sample(weight, batch)]
        return np.stack([c.sum(axis=1) for c in columns], axis=1)


@dataclass(frozen=True)
class RelativeL2(Divergence):
    """Norm of the difference to the original's outputs over the norm of those, over all samples.

    Attributes:
        outputs: The outputs compared; the score is their mean.
    """

    outputs: tuple[str, ...] = ()
    name = "relative-l2"

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Squared norms of difference and original of each sample, one pair of columns an output."""
        columns = []
        for _, values, original in _pairs(outputs, reference, self.outputs, self.name):
            mask = token_mask(batch, values.shape) if values.ndim >= 3 else None
            difference = _difference(values, original)
            if mask is not None:
                shape = mask.shape + (1,) * (values.ndim - 2)
                difference, original = difference * mask.reshape(shape), original * mask.reshape(shape)
            columns += [_squares(difference, batch), _squares(original, batch)]
        return np.stack(columns, axis=1)

    def finish(self, ratios: np.ndarray) -> np.ndarray:
        """Squared to plain; an output that is 0 in the original and stays 0 has not diverged."""
        return np.sqrt(np.nan_to_num(ratios, nan=0.0, posinf=np.inf))


# Elements worked on at a time: their logarithms and exponentials stay in the cache of a core.
_CHUNK = 1 << 16


def _kl(values: np.ndarray, log_p: np.ndarray, p: np.ndarray, axis: int, ready: bool) -> np.ndarray:
    """KL(p || softmax(values)) along ``axis``, float64; values are probabilities where ``ready``."""
    log_q = log_probabilities(values, axis, probabilities=ready)
    with np.errstate(invalid="ignore"):
        terms = log_p - log_q
        terms *= p
        total = terms.sum(axis=axis, dtype=np.float64)
    if np.isnan(total).any():  # what the original rules out counts as nothing, even where both are -inf
        total = np.where(p > 0, terms, np.float32(0)).sum(axis=axis, dtype=np.float64)
    # never negative but for rounding
    return np.asarray(np.maximum(total, 0.0))


def _by_rows(values: np.ndarray, log_p: np.ndarray, p: np.ndarray, ready: bool) -> np.ndarray:
    """:func:`_kl` along the last axis, a few rows at a time: the same numbers in half the time."""
    width = values.shape[-1]
    flat = [a.reshape(-1, width) for a in (values, log_p, p)]
    found = np.empty(len(flat[0]))
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        found[rows] = _kl(flat[0][rows], flat[1][rows], flat[2][rows], -1, ready)
    return found.reshape(values.shape[:-1])


# The array last seen, and what was made of it: many candidates are compared with one original in turn.
_LAST: list[tuple[weakref.ref[np.ndarray], int, tuple[bool, np.ndarray, np.ndarray]]] = []


def _distribution(original: np.ndarray, axis: int) -> tuple[bool, np.ndarray, np.ndarray]:
    """Whether it holds probabilities, their logarithms, and they themselves."""
    for seen, along, made in _LAST:
        if seen() is original and along == axis and not original.flags.writeable:
            return made
    ready = are_probabilities(original, axis)
    log_p = log_probabilities(original, axis, probabilities=ready)
    found = ready, log_p, np.exp(log_p)
    if not original.flags.writeable:
        _LAST[:] = [(weakref.ref(original, lambda _: _LAST.clear()), axis, found)]
    return found


def _pairs(
    outputs: Outputs, reference: Outputs | None, names: tuple[str, ...], metric: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, candidate's and original's array of each compared output."""
    if reference is None:
        what = f"metric '{metric}' compares with the original's outputs, none were given"
        raise DataError(what, advice="pass reference_run= to evaluate")
    chosen = [n for n in names or reference if n in outputs and n in reference and is_float(reference[n])]
    chosen = [n for n in chosen if names or not is_cache(n)] or chosen
    if not chosen:
        what = f"metric '{metric}' finds no real-valued output that both models have"
        raise DataError(what, advice=f"they have {', '.join(outputs)} and {', '.join(reference)}")
    for name in chosen:
        if outputs[name].shape != reference[name].shape:
            got, expected = list(outputs[name].shape), list(reference[name].shape)
            what = f"output '{name}' has shape {got}, the original's {expected}"
            raise DataError(what, advice="compare models with the same interface on the same inputs")
        yield name, outputs[name], reference[name]


def _difference(values: np.ndarray, original: np.ndarray) -> np.ndarray:
    values, original = values.astype(np.float64), original.astype(np.float64)
    with np.errstate(invalid="ignore"):
        # Models mask with -inf: two of those are equal, not NaN apart.
        return np.where(values == original, 0.0, values - original)


def _squares(values: np.ndarray, batch: Dataset) -> np.ndarray:
    flat = per_sample(values.astype(np.float64), batch)
    flat = np.where(np.isneginf(flat), 0.0, flat)
    return np.einsum("nd,nd->n", flat, flat)


def _cosine_distance(values: np.ndarray, original: np.ndarray) -> np.ndarray:
    a, b = values.astype(np.float64), original.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = np.einsum("...d,...d->...", a, b)
    same = (a == b).all(axis=-1)
    cosine = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.where(same, 0.0, np.maximum(1 - cosine, 0.0))
