"""What a residual branch does to its skip: angles and lengths, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Layout, Taps, lattice, on_lattice

# A branch is void at a token where it lengthens it by less than this share of the spread over branches.
VOID_SHARE = 0.8


@dataclass(frozen=True)
class BranchProbe:
    """The three values of a residual branch: ``output = skip + body``.

    Attributes:
        name: The branch.
        skip: Name of the value that goes past the branch.
        body: Name of what the branch adds; None: the difference of output and skip.
        output: Name of the sum.
        axis: Axis a token's vector lies on; None: 1 for rank 4 (``[b, c, h, w]``), else the last.
        depth: Whether its skip is one of the depths of the residual stream (not nested, not a whole block).
        nodes: Names of its nodes, where attention maps are looked for.
    """

    name: str
    skip: str
    body: str | None
    output: str
    axis: int | None = None
    depth: bool = True
    nodes: tuple[str, ...] = ()

    @staticmethod
    def of(branch: Any) -> BranchProbe:
        """The probe of a branch that :func:`lamina.ir.branches.find_branches` found."""
        axis = 1 if branch.kind == "conv" else -1 if branch.kind in ("attention", "mlp") else None
        top = branch.parent is None
        return BranchProbe(branch.name, branch.skip, branch.body, branch.output, axis, top, branch.nodes)


@dataclass(frozen=True)
class BranchStatistics:
    """How much one residual branch changes its skip. Means run over tokens unless said otherwise.

    A token is one vector along the probe's axis: a position of ``[b, t, d]``, a pixel of ``[b, c, h, w]``
    (an even lattice of them, see :class:`lamina.analysis.needs.Looks`). Padded tokens are left out. Two zero
    vectors have cosine 1, one zero vector gives cosine 0.

    Attributes:
        name: The branch.
        axis: Axis the vectors lie on.
        tokens: Tokens seen.
        samples: Samples seen.
        cosine: Mean of cos(skip, output).
        relative_norm: Mean of ``L2(body) / L2(skip)`` over tokens whose skip is not zero.
        last_token_angle: Mean over samples of ``arccos(cos(skip, output)) / pi`` at the last token that is
            not padding; for convolutional layouts, which have no last token, at all pixels looked at.
        change: Mean of 1 - cos(skip, output), accurate where the cosine is nearly 1.
        void: Share of tokens that the branch lengthens by less than 0.8 of the spread of lengthenings over
            all branches with the same tokens; NaN for blocks.
    """

    name: str
    axis: int
    tokens: int
    samples: int
    cosine: float
    relative_norm: float
    last_token_angle: float
    change: float = float("nan")
    void: float = float("nan")

    @property
    def influence(self) -> float:
        """1 - cosine."""
        return 1.0 - self.cosine if np.isnan(self.change) else self.change


class BranchTap:
    """Reads one branch's vector lengths from a run.

    Args:
        taps: Grows the outputs.
        probe: The branch.
        rows: Samples of the run the shapes were observed in.
        pixels: Positions of an image to look at.
    """

    def __init__(self, taps: Taps, probe: BranchProbe, rows: int, pixels: int) -> None:
        self.probe = probe
        self.problem = _problem(taps, probe)
        layout = None if self.problem else Layout.of(taps.shapes[probe.skip][0], probe.axis, rows)
        if layout is None:
            self.problem = self.problem or f"skip {list(taps.shapes[probe.skip][0])} holds no vectors"
            return
        self.layout: Layout = layout
        rank = len(taps.shapes[probe.skip][0])
        self.axis = rank - 1 if layout.kind == "tokens" else 1
        if layout.kind == "tokens":
            body = taps.length(probe.output, probe.skip) if probe.body is None else taps.length(probe.body)
            self._names = (taps.length(probe.skip), body, taps.length(probe.output))
        else:
            self._names = (taps.rows(probe.skip, "images"), "", taps.rows(probe.output, "images"))
            self._places = lattice(layout.space, pixels)

    def lengths(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """L2 of skip, body and output: float64 ``[samples, places]`` each."""
        if self.layout.kind == "pixels":
            skip, output = (on_lattice(values[self._names[i]], self._places) for i in (0, 2))
            squares = [np.einsum("bcp,bcp->bp", a, a) for a in (skip, output - skip, output)]
        else:
            skip, body, output = (values[n] for n in self._names)
            squares = [np.broadcast_to(a, skip.shape).reshape(len(skip), -1) for a in (skip, body, output)]
            if not self.layout.sampled and skip.ndim == 1:
                squares = [a.reshape(-1, 1) for a in squares]
        first, second, third = (np.sqrt(a.astype(np.float64)) for a in squares)
        return first, second, third


def _problem(taps: Taps, probe: BranchProbe) -> str | None:
    for name in (probe.skip, probe.output):
        if name not in taps.shapes:
            return f"'{name}' is no tensor of the main graph"
    skip, output = taps.shapes[probe.skip][0], taps.shapes[probe.output][0]
    return f"skip {list(skip)} and output {list(output)} differ" if skip != output else None


class BranchAccumulator:
    """Feeds one branch's :class:`BranchStatistics`."""

    def __init__(self, tap: BranchTap) -> None:
        self.tap = tap
        self.tokens = 0
        # of the batch just taken in, [samples, places]: lengths of sums, and what the branch added to them
        self.lengths: np.ndarray | None = None
        self.lengthening: np.ndarray | None = None
        self._samples = 0
        self._void = 0
        self._void_tokens = 0
        self._change = 0.0
        self._ratios = 0.0
        self._ratio_tokens = 0
        self._angles = 0.0
        self._angle_count = 0

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch; images only where it is looked at."""
        self.lengths = self.lengthening = None
        if self.tap.layout.kind == "pixels" and not view.looked:
            return
        skip, body, output = self.tap.lengths(values)
        self.lengths, self.lengthening = output, output - skip
        change = _change(skip, body, output)
        kept = view.kept(*skip.shape)
        self._samples += len(skip)
        self.tokens += int(kept.sum())
        self._change += float(change[kept].sum())
        usable = kept & (skip > 0)
        self._ratios += float((body[usable] / skip[usable]).sum())
        self._ratio_tokens += int(usable.sum())
        if self.tap.layout.kind == "tokens":
            kept = _last_only(kept)
        # 1 - cos = 2 sin^2(angle / 2) keeps small angles accurate
        angles = 2.0 * np.arcsin(np.sqrt(np.clip(change[kept] / 2.0, 0.0, 1.0)))
        self._angles += float(angles.sum()) / np.pi
        self._angle_count += int(kept.sum())

    def add_void(self, void: np.ndarray) -> None:
        """Take in which kept tokens of the batch the branch is void at."""
        self._void += int(void.sum())
        self._void_tokens += void.size

    def result(self) -> BranchStatistics:
        """What was seen so far."""
        change = self._change / max(1, self.tokens)
        return BranchStatistics(
            self.tap.probe.name,
            self.tap.axis,
            self.tokens,
            self._samples,
            1.0 - change,
            self._ratios / max(1, self._ratio_tokens),
            self._angles / max(1, self._angle_count),
            change,
            self._void / self._void_tokens if self._void_tokens else float("nan"),
        )


def add_voids(branches: Sequence[BranchAccumulator], view: BatchView) -> None:
    """Compare the lengthenings of the batch just taken in over all branches with the same tokens."""
    groups: dict[tuple[int, ...], list[BranchAccumulator]] = {}
    for branch in branches:
        if branch.tap.probe.depth and branch.lengthening is not None:
            groups.setdefault(branch.lengthening.shape, []).append(branch)
    for shape, group in groups.items():
        grown = np.stack([b.lengthening for b in group if b.lengthening is not None])
        bound = VOID_SHARE * (grown.max(axis=0) - grown.min(axis=0))
        kept = view.kept(*shape)
        for branch, own in zip(group, grown, strict=True):
            branch.add_void((own < bound)[kept])


def _change(skip: np.ndarray, body: np.ndarray, output: np.ndarray) -> np.ndarray:
    """1 - cos(skip, output) from three lengths of a triangle, by the law of cosines.

    A small branch loses no digits: both terms of the numerator are small. Error of float32 lengths: about
    1e-7 * max(1, L2(body) / L2(skip)).
    """
    product = 2.0 * skip * output
    excess = body * body - np.square(output - skip)
    change = np.divide(excess, product, out=np.ones_like(product), where=product > 0)
    change[(skip == 0) & (output == 0)] = 0.0
    clipped: np.ndarray = np.clip(change, 0.0, 2.0)
    return clipped


def _last_only(kept: np.ndarray) -> np.ndarray:
    """Of the tokens kept along axis 1, only each sample's last."""
    last = np.zeros_like(kept)
    rows = np.flatnonzero(kept.any(axis=1))
    last[rows, kept.shape[1] - 1 - np.argmax(kept[rows, ::-1], axis=1)] = True
    return last
