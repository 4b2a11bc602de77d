"""The residual stream at each depth: angles between any two, a sample of tokens, spectra of whole samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lamina.analysis.needs import Need
from lamina.analysis.residual import BranchProbe
from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Layout, Taps, lattice, on_lattice

END = "end"


@dataclass(frozen=True)
class Depth:
    """One depth of the stream: what enters a branch, or (:data:`END`) what leaves the last.

    Attributes:
        name: The branch it enters, or :data:`END`.
        value: Name of the value.
        axis: Axis of its vectors.
    """

    name: str
    value: str
    axis: int | None = None


@dataclass(frozen=True)
class Spectrum:
    """Token geometry at one depth, mean over whole samples.

    Attributes:
        entropy: Entropy in nats of the eigenvalues of the uncentred token Gram matrix, divided by their sum.
        curvature: Mean angle, over pi, between successive token differences; NaN for pixels.
        samples: Samples looked at.
    """

    entropy: float
    curvature: float
    samples: int


@dataclass(frozen=True)
class DepthStatistics:
    """What was collected at the depths.

    Attributes:
        names: Depths in execution order.
        angles: float64 ``[depths, depths]``: mean over samples of the angle between two depths at the last
            token, over pi; NaN between depths whose vectors differ in number or width.
        tokens: Depth -> float32 ``[n, width]``: vectors at the same tokens wherever two depths have the same
            tokens (:attr:`group`).
        group: Depth -> number; depths of one number have the same tokens and width.
        spectra: Depth -> token geometry.
    """

    names: tuple[str, ...] = ()
    angles: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    group: Mapping[str, int] = field(default_factory=dict)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)


def depths_of(probes: Sequence[BranchProbe]) -> list[Depth]:
    """The depths in order: each branch's skip, then the last branch's sum. Each value counts once."""
    chosen = [p for p in probes if p.depth]
    found: dict[str, Depth] = {}
    for probe in chosen:
        found.setdefault(probe.skip, Depth(probe.name, probe.skip, probe.axis))
    if chosen:
        last = chosen[-1]
        found.setdefault(last.output, Depth(END, last.output, last.axis))
    return list(found.values())


class DepthAccumulator:
    """Feeds :class:`DepthStatistics`.

    Args:
        taps: Grows the outputs.
        depths: The depths, in order.
        needs: Which of them to collect: ANGLES, TOKENS, SPECTRA.
        rows: Samples of the run the shapes were observed in.
        pixels: Positions of an image to look at.
    """

    def __init__(
        self, taps: Taps, depths: Sequence[Depth], needs: frozenset[Need], rows: int, pixels: int
    ) -> None:
        self._needs, self._pixels = needs, pixels
        self._places: dict[str, np.ndarray] = {}
        self.skipped: dict[str, str] = {}
        self._layouts: dict[str, Layout] = {}
        self._last: dict[str, str] = {}
        self._tokens: dict[str, str] = {}
        self._rows: dict[str, str] = {}
        for depth in depths:
            self._tap(taps, depth, rows)
        self.names = tuple(self._layouts)
        self._groups = _grouped(self._layouts)
        count = len(self.names)
        self._angles, self._angle_counts = np.zeros((count, count)), np.zeros((count, count))
        self._kept: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        self._spectra: dict[str, list[tuple[float, float]]] = {name: [] for name in self.names}

    def _tap(self, taps: Taps, depth: Depth, rows: int) -> None:
        shape = taps.shapes[depth.value][0] if depth.value in taps.shapes else ()
        layout = Layout.of(shape, depth.axis, rows)
        if layout is None or not layout.sampled:
            self.skipped[f"depth {depth.name}"] = f"shape {list(shape)} does not hold one row a sample"
            return
        self._layouts[depth.name] = layout
        pixels = layout.kind == "pixels"
        if self._needs & {Need.ANGLES, Need.TOKENS} and pixels:
            self._last[depth.name] = self._tokens[depth.name] = taps.rows(depth.value, "images")
            self._places[depth.name] = lattice(layout.space, self._pixels)
        elif not pixels:
            if Need.ANGLES in self._needs:
                self._last[depth.name] = taps.tokens(depth.value, layout, "last")
            if Need.TOKENS in self._needs:
                self._tokens[depth.name] = taps.tokens(depth.value, layout, "tokens")
        if Need.SPECTRA in self._needs:
            self._rows[depth.name] = taps.rows(depth.value, "samples")

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch."""
        for group in self._groups:
            pixels = self._layouts[group[0]].kind == "pixels"
            if Need.ANGLES in self._needs and (view.looked or not pixels):
                self._add_angles(group, values)
            if Need.TOKENS in self._needs and view.looked:
                self._add_tokens(group, values, view)
        if Need.SPECTRA in self._needs and view.looked:
            self._add_spectra(values, view)

    def result(self) -> DepthStatistics:
        """What was seen so far."""
        with np.errstate(invalid="ignore"):
            angles = self._angles / np.where(self._angle_counts > 0, self._angle_counts, np.nan)
        tokens = {n: np.concatenate(parts) for n, parts in self._kept.items() if parts}
        group = {name: number for number, names in enumerate(self._groups) for name in names}
        spectra = {n: _mean_spectrum(parts) for n, parts in self._spectra.items() if parts}
        return DepthStatistics(self.names, angles, tokens, group, spectra)

    def _add_angles(self, group: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
        index = [self.names.index(name) for name in group]
        stacked = np.stack([self._vectors(n, values[self._last[n]]) for n in group], axis=1).astype(
            np.float64
        )
        lengths = np.sqrt(np.einsum("ndk,ndk->nd", stacked, stacked))
        zero = lengths == 0
        stacked /= np.where(zero, 1.0, lengths)[..., None]
        cosines = np.matmul(stacked, stacked.transpose(0, 2, 1))
        cosines[zero[:, :, None] & zero[:, None, :]] = 1.0
        sums = np.arccos(np.clip(cosines, -1.0, 1.0)).sum(axis=0) / np.pi
        np.fill_diagonal(sums, 0.0)
        self._angles[np.ix_(index, index)] += sums
        self._angle_counts[np.ix_(index, index)] += len(stacked)

    def _vectors(self, name: str, array: np.ndarray) -> np.ndarray:
        """``[n, width]``; of images at the lattice."""
        if self._layouts[name].kind == "tokens":
            return array
        picked = on_lattice(array, self._places[name])
        return picked.transpose(0, 2, 1).reshape(-1, picked.shape[1])

    def _add_tokens(self, group: Sequence[str], values: Mapping[str, np.ndarray], view: BatchView) -> None:
        for name in group:
            array = self._vectors(name, values[self._tokens[name]])
            if self._layouts[name].kind == "pixels":
                array = array[view.draw_vectors("tokens", len(array))]
            self._kept[name].append(np.array(array, dtype=np.float32))

    def _add_spectra(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        rows = view.draw_rows("samples")
        for name, output in self._rows.items():
            layout = self._layouts[name]
            for row, sample in zip(rows, values[output], strict=True):
                pixels = layout.kind == "pixels"
                x = sample.reshape(layout.width, -1).T if pixels else sample.reshape(-1, layout.width)
                if not pixels:
                    x = x[view.kept(view.rows, layout.places)[row]]
                x = x.astype(np.float64)
                self._spectra[name].append((spectrum_entropy(x), np.nan if pixels else curvature(x)))


def spectrum_entropy(x: np.ndarray) -> float:
    """Entropy of the eigenvalues of ``x x'``, normalised to sum 1, in nats; ``x`` is ``[tokens, width]``."""
    gram = x.T @ x if x.shape[1] < x.shape[0] else x @ x.T
    values = np.maximum(np.linalg.eigvalsh(gram), 0.0) if gram.size else np.zeros(1)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(-(shares * np.log(shares)).sum())


def curvature(x: np.ndarray) -> float:
    """Mean angle over pi between successive differences of the rows; NaN with fewer than three rows."""
    steps = np.diff(x, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    products = lengths[:-1] * lengths[1:]
    usable = products > 0
    if not usable.any():
        return float("nan")
    cosines = np.einsum("td,td->t", steps[:-1], steps[1:])[usable] / products[usable]
    return float(np.arccos(np.clip(cosines, -1.0, 1.0)).mean() / np.pi)


def _grouped(layouts: Mapping[str, Layout]) -> list[list[str]]:
    """Depths whose vectors can be compared one by one."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, layout in layouts.items():
        groups.setdefault((layout.kind, layout.width, layout.space), []).append(name)
    return list(groups.values())


def _mean_spectrum(parts: Sequence[tuple[float, float]]) -> Spectrum:
    entropies, turns = np.array(parts).T
    turns = turns[~np.isnan(turns)]
    return Spectrum(
        float(entropies.mean()), float(turns.mean()) if len(turns) else float("nan"), len(entropies)
    )
