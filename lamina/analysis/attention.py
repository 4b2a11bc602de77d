"""Ranks of attention maps, of a few whole samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.residual import BranchProbe
from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Taps

# A causal map of more tokens is cut to its first ones, which is the map of the shorter text.
LONGEST = 128


@dataclass(frozen=True)
class AttentionStatistics:
    """Ranks of one branch's attention maps.

    Attributes:
        rank: Mean numerical rank over heads and samples.
        share: Mean of rank over tokens.
        maps: Maps looked at.
    """

    rank: float
    share: float
    maps: int


class AttentionAccumulator:
    """Feeds :class:`AttentionStatistics` of every branch with a Softmax over tokens.

    Args:
        taps: Grows the outputs.
        probes: The branches.
        softmaxes: Node name -> output of each Softmax of the program.
        rows: Samples of the run the shapes were observed in.
    """

    def __init__(
        self, taps: Taps, probes: Sequence[BranchProbe], softmaxes: Mapping[str, str], rows: int
    ) -> None:
        self._outputs: dict[str, str] = {}
        self._ranks: dict[str, list[tuple[int, int]]] = {}
        for probe in probes:
            for value in (softmaxes[n] for n in probe.nodes if n in softmaxes):
                shape = taps.shapes[value][0] if value in taps.shapes else ()
                if len(shape) >= 3 and shape[0] == rows and shape[-2] > 1 and probe.name not in self._outputs:
                    self._outputs[probe.name] = taps.rows(value, "samples")
                    self._ranks[probe.name] = []

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch."""
        if not view.looked:
            return
        for name, output in self._outputs.items():
            for row, maps in zip(view.draw_rows("samples"), values[output], strict=True):
                maps = maps.reshape(-1, *maps.shape[-2:])
                if view.mask is not None and maps.shape[-1] == maps.shape[-2] == view.mask.shape[1]:
                    kept = np.flatnonzero(view.mask[row])
                    maps = maps[:, kept[:, None], kept[None, :]]
                tokens = maps.shape[-2]
                if tokens == maps.shape[-1] and tokens > LONGEST and not np.triu(maps[0], 1).any():
                    maps = maps[:, :LONGEST, :LONGEST]
                least = min(maps.shape[-2:])
                if least:
                    self._ranks[name] += [(int(rank), least) for rank in ranks(maps)]

    def result(self) -> dict[str, AttentionStatistics]:
        """What was seen so far."""
        found = {}
        for name, parts in self._ranks.items():
            if parts:
                rank, size = np.array(parts, dtype=np.float64).T
                found[name] = AttentionStatistics(float(rank.mean()), float((rank / size).mean()), len(parts))
        return found


def ranks(maps: np.ndarray) -> np.ndarray:
    """Numerical rank of each matrix ``[n, a, b]``: singular values over ``max(a, b) * eps * largest``.

    eps is that of float32, the precision the maps were computed in. Squared singular values come from the
    smaller Gram matrix in float64, which resolves ratios down to 1e-8, below that threshold (1e-7 and up).
    """
    wide = maps.astype(np.float64)
    turned = wide.transpose(0, 2, 1)
    gram = turned @ wide if wide.shape[1] > wide.shape[2] else wide @ turned
    values = np.maximum(np.linalg.eigvalsh(gram), 0.0)
    threshold = max(maps.shape[-2:]) * float(np.finfo(np.float32).eps)
    largest = values.max(axis=1, initial=0.0)
    counts: np.ndarray = (values > (threshold**2) * largest[:, None]).sum(axis=1)
    return counts
