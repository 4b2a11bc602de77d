"""Which channels become one: the plan by which weights are averaged in front and summed behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.passes.repair import packed, unpacked


@dataclass(frozen=True)
class ChannelMap:
    """Where the mass of each of d channels goes among d' merged ones; at most k places each.

    Attributes:
        width: d'.
        targets: int ``[d, k]``.
        mass: float32 ``[d, k]``, not negative; zero where there is nothing. A channel without any goes.
    """

    width: int
    targets: np.ndarray
    mass: np.ndarray

    @staticmethod
    def of(plan: np.ndarray, most: int, own: np.ndarray | None = None) -> ChannelMap:
        """The largest ``most`` entries of each row of a plan ``[d, d']``.

        Args:
            plan: Not negative.
            most: Entries kept a row.
            own: int ``[d']``: a channel that stays in each merged one, whatever else its row holds.
        """
        order = np.argsort(-plan, axis=1, kind="stable")[:, :most]
        if own is not None:
            lost = ~(order[own] == np.arange(len(own))[:, None]).any(axis=1)
            order[own[lost], -1] = np.flatnonzero(lost)
        mass = np.take_along_axis(plan, order, axis=1)
        return ChannelMap(plan.shape[1], order, mass.astype(np.float32))

    @staticmethod
    def grouped(labels: np.ndarray) -> ChannelMap:
        """Channels with one label become one; labels count from 0, -1: the channel goes."""
        mass = (labels >= 0).astype(np.float32)[:, None]
        return ChannelMap(int(labels.max()) + 1, np.maximum(labels, 0)[:, None], mass)

    @property
    def plan(self) -> np.ndarray:
        """Dense, float64 ``[d, d']``."""
        dense = np.zeros((len(self.targets), self.width))
        np.add.at(dense, (np.arange(len(dense))[:, None], self.targets), self.mass.astype(np.float64))
        return dense

    def narrowed(self, array: np.ndarray, axis: int, *, summed: bool) -> np.ndarray:
        """A weight with d' channels on an axis: each a mean of those merged, or a sum of their shares.

        Computed in float64, returned in the array's dtype.
        """
        plan = self.plan
        total = plan.sum(axis=1, keepdims=True) if summed else plan.sum(axis=0, keepdims=True)
        shares = np.divide(plan, total, out=np.zeros_like(plan), where=total > 0)
        made = np.tensordot(array.astype(np.float64), shares, axes=(axis, 0))
        return np.ascontiguousarray(np.moveaxis(made, -1, axis).astype(array.dtype))

    def parameters(self) -> dict[str, Any]:
        """JSON values."""
        return {"width": self.width, "targets": self.targets.tolist(), "mass": packed(self.mass)}

    @staticmethod
    def read(parameters: Mapping[str, Any]) -> ChannelMap:
        """What :meth:`parameters` wrote."""
        targets = np.asarray(parameters["targets"], dtype=np.int64)
        return ChannelMap(int(parameters["width"]), targets, unpacked(parameters["mass"]))
