"""Samples: inputs by name plus whatever a metric needs (labels, scores), in batches, in disjoint splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lamina.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Samples along axis 0 of every array.

    A sample is usually one row. Where a metric compares inputs (the two sides of an embedding pair),
    ``group`` rows make one sample: rows ``a0, b0, a1, b1, ...`` with ``group=2``. Selecting, splitting and
    batching work on samples, so a group is never torn apart.

    Attributes:
        inputs: Model input name -> array ``[rows, ...]`` in the input's dtype.
        extras: Anything else with one entry a sample (``labels``, ``score``): metrics read it, the model
            does not.
        batch_size: Rows a run gets (the last batch may be shorter).
        group: Rows that make one sample.
        layout: Rows a sample takes of the inputs that differ from ``group``; 0 is an input without a batch
            axis, fed to every run as it is.
        fixed_batch: Samples every run must get, where the model's batch axis is fixed; 0 where it is free.
            Samples that do not fill a batch are left out of :meth:`batches`.
    """

    inputs: Mapping[str, np.ndarray]
    extras: Mapping[str, np.ndarray]
    batch_size: int = 32
    group: int = 1
    layout: Mapping[str, int] = field(default_factory=dict)
    fixed_batch: int = 0

    def __len__(self) -> int:
        """Rows: samples times ``group``."""
        return self.samples * self.group

    @property
    def samples(self) -> int:
        """Samples: what ``rows``, ``batches`` and ``extras`` count."""
        for name, array in self.inputs.items():
            rows = self.layout.get(name, self.group)
            if rows:
                return len(array) // rows
        return 0

    def rows(self, index: Any) -> Dataset:
        """The samples ``index`` selects (a slice, a number, an integer array or a boolean mask)."""
        if isinstance(index, int | np.integer):
            index = np.array([index])
        elif not isinstance(index, slice):
            index = np.asarray(index)
        inputs = {k: _select(v, index, self.layout.get(k, self.group)) for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, extras={k: v[index] for k, v in self.extras.items()})

    def batches(self) -> Iterator[Dataset]:
        """Consecutive datasets of at most ``batch_size`` rows, whole samples each."""
        step = self.fixed_batch or max(1, self.batch_size // self.group)
        stop = self.samples - self.samples % step if self.fixed_batch else self.samples
        for start in range(0, stop, step):
            yield self.rows(slice(start, min(start + step, stop)))


def _select(array: np.ndarray, index: Any, rows: int) -> np.ndarray:
    if rows == 0:
        return array
    if rows == 1:
        return np.asarray(array[index])
    samples = array.reshape(len(array) // rows, rows, *array.shape[1:])[index]
    return np.asarray(samples.reshape(-1, *array.shape[1:]))


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
