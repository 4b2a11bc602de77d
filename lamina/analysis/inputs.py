"""What weighted operators read: uncentred second moments, and a few vectors kept whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lamina.analysis.operators import WeightedOperator, patches
from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Layout, Taps

# Vectors multiplied at a time: a float32 product of one block is added to a float64 sum.
BLOCK = 512


@dataclass(frozen=True)
class InputStatistics:
    """What one weighted operator reads.

    Attributes:
        moments: float64 ``[group, k, k]``: sum over vectors of ``x x'`` (XtX); k counts a group's
            inputs, of a convolution the elements of a window. ``[group, 0, 0]`` where it was not asked for.
        vectors: Vectors in that sum.
        kept: float32 ``[n, group, k]``: some of those vectors.
        lows: ``[group, k]``: least element of each input among the vectors.
        highs: ``[group, k]``: largest one.
    """

    moments: np.ndarray
    vectors: int
    kept: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    @property
    def minimum(self) -> float:
        """Least element among the vectors."""
        return float(self.lows.min())

    @property
    def maximum(self) -> float:
        """Largest element among the vectors."""
        return float(self.highs.max())


class SecondMoments:
    """Sum of ``x x'`` in float64 over blocks of float32 vectors."""

    def __init__(self, group: int, width: int, kept: int, sums: bool = True) -> None:
        self.total = np.zeros((group, width, width) if sums else (group, 0, 0))
        self.count = 0
        self.lows, self.highs = np.full((group, width), np.inf), np.full((group, width), -np.inf)
        self._waiting: list[np.ndarray] = []
        self._most_kept = kept
        self._kept: list[np.ndarray] = []

    def add(self, vectors: np.ndarray, keep: int) -> None:
        """Take in ``[n, group, width]``, and keep the first ``keep`` of them whole."""
        if not len(vectors):
            return
        self.lows = np.minimum(self.lows, vectors.min(axis=0))
        self.highs = np.maximum(self.highs, vectors.max(axis=0))
        room = self._most_kept - sum(map(len, self._kept))
        if keep and room > 0:
            # spread over the batch, not from its first sample
            chosen = np.linspace(0, len(vectors) - 1, min(keep, room, len(vectors))).astype(int)
            self._kept.append(vectors[chosen].astype(np.float32))
        self.count += len(vectors)
        if not self.total.size:
            return
        self._waiting.append(vectors)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._flush()

    def result(self) -> InputStatistics:
        """What was seen so far."""
        self._flush()
        none = np.zeros((0, *self.lows.shape), np.float32)
        kept = np.concatenate(self._kept) if self._kept else none
        return InputStatistics(self.total, self.count, kept, self.lows, self.highs)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting.clear()
        if rows.shape[1] == 1:
            block = rows[:, 0]
            self.total[0] += block.T @ block
        else:
            self.total += np.matmul(rows.transpose(1, 2, 0), rows.transpose(1, 0, 2))


class InputAccumulator:
    """Feeds the :class:`InputStatistics` of all operators; operators that read one value share them.

    Args:
        taps: Grows the outputs.
        operators: The operators by name.
        rows: Samples of the run the shapes were observed in.
        sums: Whether to take second moments.
    """

    def __init__(
        self, taps: Taps, operators: Mapping[str, WeightedOperator], rows: int, sums: bool = True
    ) -> None:
        self._sums_wanted = sums
        self.skipped: dict[str, str] = {}
        self._key: dict[str, tuple[object, ...]] = {}
        self._taps: dict[tuple[object, ...], tuple[str, Layout, WeightedOperator]] = {}
        self._sums: dict[tuple[object, ...], SecondMoments] = {}
        for name, operator in operators.items():
            shape = taps.shapes[operator.activation][0] if operator.activation in taps.shapes else ()
            axis = 1 if operator.kind == "conv" else -2 if operator.side else -1
            layout = Layout.of(shape, axis if len(shape) >= 2 else None, rows)
            if layout is None or not layout.sampled:
                self.skipped[name] = f"what it reads, shape {list(shape)}, holds no row a sample"
            elif operator.side:
                self.skipped[name] = "its weight stands left of the activation"
            else:
                self._tap(taps, name, operator, layout)

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch."""
        if not view.looked:
            return
        share, keep = view.share_of(view.looks.inputs), view.share_of(view.looks.kept)
        for key, (output, layout, operator) in self._taps.items():
            array = values[output]
            if operator.kind == "conv":
                vectors = patches(array, operator, min(share, len(array) * view.looks.pixels))
            else:
                vectors = array.reshape(-1, 1, layout.width)
            if key not in self._sums:
                group, width = vectors.shape[1:]
                self._sums[key] = SecondMoments(group, width, view.looks.kept, self._sums_wanted)
            self._sums[key].add(vectors, keep)

    def result(self) -> dict[str, InputStatistics]:
        """What was seen so far, by operator."""
        done = {key: total.result() for key, total in self._sums.items() if total.count}
        return {name: done[key] for name, key in self._key.items() if key in done}

    def _tap(self, taps: Taps, name: str, operator: WeightedOperator, layout: Layout) -> None:
        window = (operator.kernel, operator.strides, operator.pads, operator.dilations, operator.group)
        key = (operator.activation, *window) if operator.kind == "conv" else (operator.activation,)
        self._key[name] = key
        if key in self._taps:
            return
        if operator.kind == "conv":
            output = taps.rows(operator.activation, "patched")
        else:
            output = taps.tokens(operator.activation, layout, "inputs")
        self._taps[key] = (output, layout, operator)
