"""What a quality metric is: features a sample, one score from all of them, damage between two scores.

A metric works in two steps so that evaluation streams: ``features`` keeps a little per sample of each batch,
``score`` turns all of them into one number. Resampling rows of features gives the confidence interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from lamina.data import Dataset
from lamina.errors import DataError

Outputs = Mapping[str, np.ndarray]
Percent = Literal["points", "relative"]


class Metric:
    """Base of every quality metric.

    Attributes:
        name: What the user writes.
        higher_is_better: Direction.
        percent: What ``drop<=1%`` means: ``points`` (0.01 absolute) or ``relative`` (losses).
        divergence: Which output divergence predicts this metric's damage best.
        kind: ``score`` is a task metric of one model; ``divergence`` compares with the original's outputs.
        whole: Whether ``features`` must see all samples at once; evaluation then does not stream.
    """

    name: str = ""
    higher_is_better: bool = True
    percent: Percent = "points"
    divergence: Literal["kl", "relative-l2"] = "relative-l2"
    kind: Literal["score", "divergence"] = "score"
    whole: bool = False

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Per-sample features ``[samples, k]`` float64; ``reference``: the original's outputs."""
        raise NotImplementedError

    def score(self, features: np.ndarray) -> float:
        """One number from the features of all samples."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Dataset) -> tuple[float, dict[str, np.ndarray]]:
        """What the metric counts, where that is a loss with a derivative: its sum, and that by each output.

        Zero and nothing where it is not.
        """
        return 0.0, {}

    def check(self, dataset: Dataset) -> None:
        """Say before the first run whether ``dataset`` holds what the metric reads.

        Raises:
            DataError: It does not.
        """

    def unit(self, original: float) -> Percent:
        """What a percent of damage means, given what the original scores."""
        return self.percent

    def damage(self, original: float, candidate: float) -> float:
        """How much worse, in the budget's unit: 0.01 is 1 point, or 1 % relative increase of a loss."""
        worse = original - candidate if self.higher_is_better else candidate - original
        return worse if self.unit(original) == "points" else worse / max(abs(original), 1e-12)

    def scores(self, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The score of each resample; ``weights[r, i]`` is how often sample ``i`` is in resample ``r``."""
        counts = weights.astype(np.intp)
        return np.array([self.score(np.repeat(features, row, axis=0)) for row in counts])


class RatioMetric(Metric):
    """A metric whose score comes from ratios of sums: features are (numerator, denominator) columns."""

    def score(self, features: np.ndarray) -> float:
        """The mean over column pairs of ``finish(sum of numerators / sum of denominators)``."""
        return float(self.scores(features, np.ones((1, len(features))))[0])

    def scores(self, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """All resamples in one matrix product."""
        sums = weights @ features
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(self.finish(sums[:, 0::2] / sums[:, 1::2]).mean(axis=1))

    def finish(self, ratios: np.ndarray) -> np.ndarray:
        """What one ratio means: itself, unless a metric says otherwise."""
        return ratios


def per_sample(values: np.ndarray, batch: Dataset) -> np.ndarray:
    """``values`` with everything that belongs to one sample in one row."""
    samples = batch.samples
    if samples != 1 and (values.ndim == 0 or len(values) % samples):
        what = f"an output of shape {list(values.shape)} has no part for each of {samples} samples"
        raise DataError(what, advice="use a metric of your own, or batch_size=1")
    return values.reshape(samples, -1)
