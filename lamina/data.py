"""Samples: inputs by name plus whatever a metric needs (labels, scores), in batches, in disjoint splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Samples along axis 0 of every array.

    Attributes:
        inputs: Model input name -> array ``[n, ...]`` in the input's dtype.
        extras: Anything else with n rows (``labels``, ``score``): metrics read it, the model does not.
        batch_size: Rows a run gets (the last batch may be shorter).
    """

    inputs: Mapping[str, np.ndarray]
    extras: Mapping[str, np.ndarray]
    batch_size: int = 32

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if self.inputs else 0

    def rows(self, index: Any) -> Dataset:
        """The samples ``index`` selects (a slice or an integer array)."""
        return Dataset(
            {k: v[index] for k, v in self.inputs.items()},
            {k: v[index] for k, v in self.extras.items()},
            self.batch_size,
        )

    def batches(self) -> Iterator[Dataset]:
        """Consecutive datasets of at most ``batch_size`` rows."""
        for start in range(0, len(self), self.batch_size):
            yield self.rows(slice(start, start + self.batch_size))


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of samples.

    Attributes:
        calibration: Feeds statistics.
        selection: Candidates are judged on it.
        report: The search never sees it; every figure a user is told comes from it.
    """

    calibration: Dataset
    selection: Dataset
    report: Dataset

    def __post_init__(self) -> None:
        for name in ("calibration", "selection", "report"):
            if not len(getattr(self, name)):
                advice = "give at least 3 samples, better 300"
                raise DataError(f"no samples are left for {name}", advice=advice)
