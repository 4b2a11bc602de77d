"""How long each example's vectors are at each depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.analysis.residual import BranchAccumulator
from lamina.analysis.sampling import BatchView


class ExampleAccumulator:
    """Keeps the mean length of each branch's sums, example by example, up to a number of examples.

    Args:
        branches: They take in each batch first; those whose first axis does not number samples are left out.
        most: Examples kept.
    """

    def __init__(self, branches: Sequence[BranchAccumulator], most: int) -> None:
        usable = [b for b in branches if b.tap.probe.depth and b.tap.layout.sampled]
        # one set of rows for all: images are looked at in other rows than token streams
        self._kind = usable[-1].tap.layout.kind if usable else "tokens"
        self._branches = [b for b in usable if b.tap.layout.kind == self._kind]
        self._most = most
        self._lengths: dict[str, list[np.ndarray]] = {b.tap.probe.name: [] for b in self._branches}
        self._rows: list[np.ndarray] = []

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch; its share of the examples is spread evenly over its rows."""
        pixels = self._kind == "pixels"
        if pixels and not view.looked:
            return
        rows = view.draw_rows("images") if pixels else np.arange(view.rows)
        before = view.number * self._most // view.batches
        share = (view.number + 1) * self._most // view.batches - before
        share = min(view.share_of(self._most) if pixels else share, len(rows))
        if not share:
            return
        chosen = (np.arange(share) * 2 + 1) * len(rows) // (2 * share)
        for branch in self._branches:
            lengths = branch.lengths
            assert lengths is not None
            kept = view.kept(*lengths.shape)
            mean = (lengths * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
            self._lengths[branch.tap.probe.name].append(mean[chosen].astype(np.float32))
        self._rows.append(view.start + rows[chosen])

    def result(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Branch -> lengths ``[n]``, and the rows of the data they belong to."""
        if not self._rows:
            return {}, np.zeros(0, np.int64)
        lengths = {name: np.concatenate(parts) for name, parts in self._lengths.items()}
        return lengths, np.concatenate(self._rows).astype(np.int64)
