"""Quality metrics: how good a model's outputs are, and how much worse a candidate's got.

A metric works in two steps so that evaluation streams: ``features`` keeps a little per sample of each batch,
``score`` turns all of them into one number. Resampling rows of features gives the confidence interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from lamina.data import Dataset

Outputs = Mapping[str, np.ndarray]


class Metric:
    """Base of every quality metric.

    Attributes:
        name: What the user writes.
        higher_is_better: Direction.
        percent: What ``drop<=1%`` means: ``points`` (0.01 absolute) or ``relative`` (losses).
        divergence: Which output divergence predicts this metric's damage best.
        kind: ``score`` is a task metric of one model; ``divergence`` compares with the original's outputs.
    """

    name: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[Literal["points", "relative"]] = "points"
    divergence: ClassVar[Literal["kl", "relative-l2"]] = "relative-l2"
    kind: ClassVar[Literal["score", "divergence"]] = "score"

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Per-sample features ``[rows, k]`` float64; ``reference``: the original's outputs."""
        raise NotImplementedError

    def score(self, features: np.ndarray) -> float:
        """One number from the features of all samples."""
        raise NotImplementedError

    def damage(self, original: float, candidate: float) -> float:
        """How much worse, in the budget's unit: 0.01 is 1 point, or 1 % relative increase of a loss."""
        worse = original - candidate if self.higher_is_better else candidate - original
        return worse if self.percent == "points" else worse / max(abs(original), 1e-12)
