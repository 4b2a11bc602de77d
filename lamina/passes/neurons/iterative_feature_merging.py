"""Merge hidden channels whose incoming weights are nearly equal, the closest pair first; needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.neurons.channel_map import ChannelMap
from lamina.passes.neurons.hidden import Hidden
from lamina.passes.neurons.hidden_sites import hidden_sites
from lamina.passes.neurons.merge_channels import MergeChannels, merge_channels


@dataclass(frozen=True)
class IterativeFeatureMerging(MergeChannels):
    """Again and again, average the two channels with the closest weights in front, and add those behind.

    A channel's vector is all that makes it: rows of every matrix or kernel that does, biases, and scales
    between. Vectors of merged channels are means over all they were merged from.

    Fires, refuses: as :class:`lamina.passes.neurons.merge_channels.MergeChannels`.
    Cost: d^2 distances of vectors in front, d^2 memory (scipy's centroid linkage).
    Source: Chen et al. 2023, arXiv:2310.06756. Deviates: METHODS.md's reading of it; ends at a width as well
        as at a distance; scales between are vectors' parts like weights.

    Attributes:
        eps: Channels farther apart than this are not merged, in units of the root mean square length of the
            vectors; a width that would take such merges is not offered.
    """

    paper: ClassVar[str] = "arXiv:2310.06756"
    name: ClassVar[str] = "iterative-feature-merging"

    eps: float = float("inf")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps < 0:
            raise PassError("eps is not negative", where=self.name)

    def maps(
        self, hidden: Hidden, program: Program, statistics: Any, widths: Sequence[int]
    ) -> Sequence[ChannelMap] | None:
        """Labels of merged channels for each group; None where ``eps`` does not allow so few."""
        arrays = hidden.arrays(program)
        found = []
        for group, width in zip(hidden.groups, widths, strict=True):
            labels = merged_features(group.vectors(arrays, "made"), width=width, eps=self.eps)
            if labels.max() + 1 > width:
                return None
            found.append(ChannelMap.grouped(labels))
        return found


def merged_features(vectors: np.ndarray, *, width: int = 1, eps: float = float("inf")) -> np.ndarray:
    """Which channels become one: merge the closest pair until ``width`` are left or none is within ``eps``.

    Args:
        vectors: float ``[d, n]``: a channel's incoming weights.
        width: How many are left at least.
        eps: Largest distance of a merge, in units of the vectors' root mean square length.

    Returns:
        int64 ``[d]``: labels from 0, in the order of the first channel of each.
    """
    from scipy.cluster.hierarchy import linkage

    units = len(vectors)
    owner = list(range(units))
    members = {i: [i] for i in range(units)}
    length = float(np.sqrt((vectors**2).sum(axis=1).mean()))
    steps = linkage(vectors, "centroid")[: max(0, units - width)] if units > 1 else ()
    for number, (first, second, distance, _) in enumerate(steps):
        if distance > eps * length:
            break
        members[units + number] = members.pop(int(first)) + members.pop(int(second))
    for label, places in members.items():
        for place in places:
            owner[place] = label
    _, first_at, labels = np.unique(owner, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_at))[labels].astype(np.int64)


def merge_features(
    program: Program,
    *,
    keep: float | None = None,
    eps: float = float("inf"),
    sites: Sequence[str] | None = None,
) -> Program:
    """Merge hidden channels of a program.

    Args:
        program: Left unchanged.
        keep: Share of each width that stays at least; None: as few as ``eps`` leaves.
        eps: Largest distance of a merge, in units of the vectors' root mean square length.
        sites: Names of sites (:func:`.hidden_sites.hidden_sites`); all of them when None.

    Raises:
        PassError: There is no such site; neither ``keep`` nor ``eps`` says when to end.
    """
    if (keep is None and np.isinf(eps)) or (keep is not None and not 0 < keep <= 1):
        raise PassError(
            "nothing says when merging ends", advice="give keep, 0 < keep <= 1, or a finite eps, or both"
        )
    how = IterativeFeatureMerging()
    maps: dict[str, Sequence[ChannelMap]] = {name: () for name in sites or ()}
    for hidden in hidden_sites(program)[0]:
        if sites is not None and hidden.name not in sites:
            continue
        arrays = hidden.arrays(program)
        maps[hidden.name] = [
            ChannelMap.grouped(
                merged_features(
                    g.vectors(arrays, "made"), width=1 if keep is None else how.width(g.units, keep), eps=eps
                )
            )
            for g in hidden.groups
        ]
    return merge_channels(program, maps)


def feature_complexity(program: Program, eps: float) -> dict[str, float]:
    """Share of each hidden width's channels that merging within ``eps`` leaves; low is redundant.

    Args:
        program: Left unchanged.
        eps: As for :func:`merge_features`.

    Returns:
        Group name (:func:`lamina.analysis.coupling.coupled_groups`) -> survivors over all, in (0, 1].
    """
    found = {}
    for hidden in hidden_sites(program)[0]:
        arrays = hidden.arrays(program)
        for group in hidden.groups:
            labels = merged_features(group.vectors(arrays, "made"), eps=eps)
            found[group.name] = float(labels.max() + 1) / group.units
    return found
