"""How far a program's outputs are from the original's, and from what is right, with derivatives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.quality.metric import Metric
from lamina.quality.outputs import are_probabilities, class_axis, float_outputs, gives_logits, token_mask

Outputs = Mapping[str, np.ndarray]
_LEAST = 1e-12
# Weight of a metric's own loss beside the divergence: small enough that the outputs stay as near to the
# original's (docs/precision.md).
_OWN = 0.05


class OutputLoss:
    """Divergence from the original's outputs, summed over positions.

    For logits and probabilities the Kullback-Leibler divergence from the original, nats. For other outputs
    ``L2(y - y0)^2 / (2 L2(y0)^2)`` of each vector along the last axis of a ``[b, length, width]`` output, or
    of each sample: for small errors 1 - cosine and the error of the length. Padding does not count.

    Where a metric's own loss has a derivative (:meth:`lamina.quality.Metric.loss`: cross-entropy), a
    twentieth of it comes on top: a divergence is of second order in a small change, a loss of first, so that
    of all programs as near to the original one that answers better is found.

    Args:
        program: The original: names of outputs, and what they are.
        metric: The metric; None: the divergence alone.
    """

    def __init__(self, program: Program, metric: Metric | None = None) -> None:
        self._metric = metric
        self.classes = gives_logits(program)
        self.outputs = [port.name for port in float_outputs(program)]

    def compare(
        self, outputs: Outputs, original: Outputs, batch: Dataset
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The sum over the batch, and its derivative by each output."""
        total, seeds = 0.0, {}
        for name in self.outputs:
            y, y0 = outputs[name].astype(np.float64), original[name].astype(np.float64)
            weight = _weights(y0, batch, self.classes)
            if not self.classes:
                weight = weight / _lengths(y0)
                total += 0.5 * float((weight * np.square(y - y0)).sum())
                seed = weight * (y - y0)
            elif are_probabilities(y0, axis := class_axis(y.ndim)):
                total += float((weight * y0 * (_log(y0) - _log(y))).sum())
                seed = -weight * y0 / np.maximum(y, _LEAST)
            else:
                logs, logs0 = _log_softmax(y, axis), _log_softmax(y0, axis)
                total += float((weight * np.exp(logs0) * (logs0 - logs)).sum())
                seed = weight * (np.exp(logs) - np.exp(logs0))
            seeds[name] = seed.astype(np.float32)
        if self._metric is not None:
            own, slopes = self._metric.loss(outputs, batch)
            total += _OWN * own
            for name, slope in slopes.items():
                if name in seeds:
                    seeds[name] += np.float32(_OWN) * slope
        return total, seeds

    def probe(
        self, original: Outputs, batch: Dataset, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Random derivatives v by the outputs with ``E v v'`` the curvature of the sum where both agree.

        With p the probabilities, r their roots and s random signs: ``v = r s - p (r's)``, as the curvature is
        ``diag(p) - p p'``; of a squared error, whose curvature is diagonal, its root times s.
        """
        seeds = {}
        for name in self.outputs:
            y0 = original[name].astype(np.float64)
            root = np.sqrt(_weights(y0, batch, self.classes))
            signs = generator.choice((-1.0, 1.0), size=y0.shape)
            if not self.classes:
                seed = root / np.sqrt(_lengths(y0)) * signs
            elif are_probabilities(y0, axis := class_axis(y0.ndim)):
                seed = root * signs / np.sqrt(np.maximum(y0, 1e-6))
            else:
                chance = np.exp(_log_softmax(y0, axis))
                drawn = np.sqrt(chance) * signs
                seed = root * (drawn - chance * drawn.sum(axis=axis, keepdims=True))
            seeds[name] = seed.astype(np.float32)
        return seeds

    def positions(self, original: Outputs, batch: Dataset) -> float:
        """How many positions the sum runs over, of all outputs."""
        found = 0.0
        for name in self.outputs:
            y0 = original[name]
            weight = _weights(y0, batch, self.classes)
            found += float(np.broadcast_to(weight, _one_each(y0, self.classes)).sum())
        return found


def _one_each(y: np.ndarray, classes: bool) -> tuple[int, ...]:
    """Shape of one number a position."""
    axis = class_axis(y.ndim) % y.ndim if classes else y.ndim - 1
    if not classes and y.ndim != 3:
        return (len(y), *(1,) * (y.ndim - 1)) if y.ndim else ()
    return tuple(1 if i == axis else n for i, n in enumerate(y.shape))


def _weights(y: np.ndarray, batch: Dataset, classes: bool) -> np.ndarray:
    """1 for positions that count, 0 for padding; broadcasts with y."""
    mask = token_mask(batch, y.shape) if y.ndim == 3 else None
    return np.ones((1,) * y.ndim) if mask is None else mask[:, :, None]


def _lengths(y: np.ndarray) -> np.ndarray:
    """Squared length of each vector, none below a thousandth of their mean."""
    axes = (2,) if y.ndim == 3 else tuple(range(1, y.ndim))
    found = np.square(y).sum(axis=axes, keepdims=True)
    return np.maximum(found, max(1e-3 * float(found.mean()), _LEAST))


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, _LEAST))


def _log_softmax(y: np.ndarray, axis: int) -> np.ndarray:
    shifted = y - y.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))
