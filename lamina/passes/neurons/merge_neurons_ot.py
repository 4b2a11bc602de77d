"""Merge hidden neurons by a transport plan between those there are and those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lamina.analysis.channels import channel_distances, collect_channels
from lamina.analysis.moments import Moments
from lamina.analysis.transport import transport_plan
from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.passes.neurons.channel_map import ChannelMap
from lamina.passes.neurons.hidden import Hidden
from lamina.passes.neurons.hidden_sites import hidden_sites
from lamina.passes.neurons.merge_channels import MergeChannels, merge_channels
from lamina.passes.pass_ import Need

# Distances relative to the mean below this are rounding of the moments.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class MergeNeuronsOt(MergeChannels):
    """Transport d hidden neurons to d' of them, by how alike they respond to calibration data.

    Those that stay are chosen by elimination: again and again the neuron goes whose squared distance to the
    nearest one left, times the squared norm of the weights that read it, is least. A Sinkhorn plan between
    all neurons and those left then says which share of each goes where; its cost is the mean squared
    difference of two activations over the energy of the one that goes. Weights in front of a merged neuron
    are the mean of what comes to it by mass; a neuron's weights behind are shared out. Its mass is the energy
    it hands on: mean square of its activation times the squared norm of the weights that read it.

    Fires, refuses: as :class:`lamina.passes.neurons.merge_channels.MergeChannels`.
    Needs: second moments of each hidden width (:meth:`collect`); without them it offers nothing.
    Cost: one run over calibration data; d^2 memory; d^2 for the elimination, d d' an iteration of the plan.
    Source: Verma et al. 2025, arXiv:2507.04517 (DOTResize). Deviates, as far as the abstract and METHODS.md
        say: hidden widths only, so no rotation has to pass a norm; those that stay are chosen by elimination;
        masses are not uniform; the marginal of those that stay is free or soft (exact with ``balance=inf``),
        as an exact one makes neurons with few likes take in unlike ones, which does more damage
        (docs/depth.md); a plan keeps ``most`` targets a neuron.

    Attributes:
        entropy: Of the plan; its distances are relative to a neuron's energy.
        balance: How dear it is for the masses that merged neurons take in to differ in proportion from those
            they have, in the same units; 0: free, inf: exact.
        most: Targets of a neuron.
    """

    paper: ClassVar[str] = "arXiv:2507.04517"
    needs: ClassVar[frozenset[Need]] = frozenset(("channels",))
    name: ClassVar[str] = "merge-neurons-ot"

    entropy: float = 0.003
    balance: float = 0.0
    most: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy <= 0 or self.balance < 0 or self.most < 1:
            raise PassError("entropy is positive, balance not negative, most at least 1", where=self.name)

    def collect(self, program: Program, dataset: Dataset, statistics: Any) -> Any:
        """The statistics with every hidden width's moments; unchanged where there is too little data."""
        axes = {g.value: g.axis for h in hidden_sites(program)[0] for g in h.groups}
        try:
            return replace(statistics, channels=collect_channels(program, dataset, axes))
        except DataError:
            return statistics

    def maps(
        self, hidden: Hidden, program: Program, statistics: Any, widths: Sequence[int]
    ) -> Sequence[ChannelMap] | None:
        """A truncated plan for each group; None where its moments were not collected."""
        if any(g.value not in statistics.channels for g in hidden.groups):
            return None
        arrays = hidden.arrays(program)
        pairs = zip(hidden.groups, widths, strict=True)
        return [
            self.transported(statistics.channels[g.value], g.vectors(arrays, "read"), width)
            for g, width in pairs
        ]

    def transported(self, moments: Moments, read: np.ndarray, width: int) -> ChannelMap:
        """The map of one hidden width.

        Args:
            moments: Of its activations, ``[d]`` wide.
            read: float ``[d, n]``: the weights that read each neuron.
            width: d', at most d; d gives the identity.
        """
        units = len(read)
        if width >= units:
            return ChannelMap.grouped(np.arange(units))
        distances = channel_distances(moments)
        energy = np.diag(moments.xx) / max(moments.count, 1e-300)
        mass = energy * (read**2).sum(axis=1)
        mass = np.maximum(mass, 1e-9 * max(float(mass.mean()), 1e-300))
        kept = remaining(distances, (read**2).sum(axis=1), width)
        # relative to the energy of the neuron that goes: all are blurred alike, quiet ones and loud ones
        unit = np.maximum(energy, 1e-9 * max(float(energy.mean()), 1e-300))
        relative = distances[:, kept] / unit[:, None]
        relative[relative < _ROUNDING] = 0.0
        share = mass / mass.sum()
        plan = transport_plan(
            relative,
            share,
            share[kept] / share[kept].sum(),
            entropy=self.entropy,
            balance=self.balance,
        )
        return ChannelMap.of(plan / plan.max(), min(self.most, width), kept)


def remaining(distances: np.ndarray, weights: np.ndarray, width: int) -> np.ndarray:
    """The ``width`` neurons that stay, ascending: one by one the one goes that its nearest replaces best.

    Args:
        distances: float ``[d, d]``, symmetric: squared error of one neuron in place of another.
        weights: float ``[d]``: what an error of each counts.
        width: How many stay, at least 1.
    """
    far = distances.astype(np.float64)
    np.fill_diagonal(far, np.inf)
    alive = np.ones(len(far), dtype=bool)
    near, nearest = far.argmin(axis=1), far.min(axis=1)
    for _ in range(len(far) - width):
        gone = int(np.where(alive, nearest * weights, np.inf).argmin())
        alive[gone] = False
        far[:, gone] = np.inf
        for i in np.flatnonzero(alive & (near == gone)):
            near[i] = far[i].argmin()
            nearest[i] = far[i, near[i]]
    return np.flatnonzero(alive)


def resize_neurons(
    program: Program,
    dataset: Dataset,
    keep: float,
    sites: Sequence[str] | None = None,
    how: MergeNeuronsOt | None = None,
) -> Program:
    """Make hidden widths a share of what they are, by transport plans.

    Args:
        program: Left unchanged.
        dataset: Calibration samples.
        keep: Share of each width that stays, above 0, at most 1.
        sites: Names of sites (:func:`.hidden_sites.hidden_sites`); all of them when None.
        how: Options.

    Raises:
        PassError: There is no such site; ``keep`` is out of range.
        DataError: Fewer than two batches of data, or data that does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    how = how or MergeNeuronsOt()
    if not 0 < keep <= 1:
        raise PassError(f"keep={keep} is no share of a width", where=how.name, advice="give 0 < keep <= 1")
    chosen = [h for h in hidden_sites(program)[0] if sites is None or h.name in sites]
    axes = {g.value: g.axis for h in chosen for g in h.groups}
    moments = collect_channels(program, dataset, axes)
    maps: dict[str, Sequence[ChannelMap]] = {name: () for name in sites or ()}
    for hidden in chosen:
        arrays = hidden.arrays(program)
        maps[hidden.name] = [
            how.transported(moments[g.value], g.vectors(arrays, "read"), how.width(g.units, keep))
            for g in hidden.groups
        ]
    return merge_channels(program, maps)
