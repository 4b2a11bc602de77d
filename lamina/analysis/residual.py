"""What a residual branch does to its skip: angles and lengths, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.analysis.streaming import CHUNK


@dataclass(frozen=True)
class BranchProbe:
    """The three values of a residual branch: ``output = skip + body``.

    Attributes:
        name: The branch.
        skip: Name of the value that goes past the branch.
        body: Name of what the branch adds; None: the difference of output and skip.
        output: Name of the sum.
        axis: Axis a token's vector lies on; None: 1 for rank 4 (``[b, c, h, w]``), else the last.
    """

    name: str
    skip: str
    body: str | None
    output: str
    axis: int | None = None

    @staticmethod
    def of(branch: Any) -> BranchProbe:
        """The probe of a branch that :func:`lamina.ir.branches.find_branches` found."""
        axis = 1 if branch.kind == "conv" else -1 if branch.kind in ("attention", "mlp") else None
        return BranchProbe(branch.name, branch.skip, branch.body, branch.output, axis)


@dataclass(frozen=True)
class BranchStatistics:
    """How much one residual branch changes its skip. Means run over tokens unless said otherwise.

    A token is one vector along the probe's axis: a position of ``[b, t, d]``, a pixel of ``[b, c, h, w]``.
    Padded tokens are left out. Two zero vectors have cosine 1, one zero vector gives cosine 0.

    Attributes:
        name: The branch.
        axis: Axis the vectors lie on.
        tokens: Tokens seen.
        samples: Samples seen.
        cosine: Mean of cos(skip, output).
        relative_norm: Mean of ``L2(body) / L2(skip)`` over tokens whose skip is not zero.
        last_token_angle: Mean over samples of ``arccos(cos(skip, output)) / pi`` at the last token that is
            not padding; for convolutional layouts, which have no last token, at all pixels.
    """

    name: str
    axis: int
    tokens: int
    samples: int
    cosine: float
    relative_norm: float
    last_token_angle: float


class BranchAccumulator:
    """Feeds one branch's :class:`BranchStatistics`."""

    def __init__(self, probe: BranchProbe) -> None:
        self.probe = probe
        self.problem: str | None = None
        self._axis = -1
        self._tokens = 0
        self._samples = 0
        self._cosines = 0.0
        self._ratios = 0.0
        self._ratio_tokens = 0
        self._angles = 0.0
        self._angle_count = 0

    def add(
        self, skip: np.ndarray, body: np.ndarray | None, output: np.ndarray, mask: np.ndarray | None
    ) -> None:
        """Take in one batch; ``mask`` is boolean ``[b, t]``, False where a token is padding."""
        if self.problem or skip.ndim < 2 or skip.shape != output.shape:
            self.problem = self.problem or f"skip {list(skip.shape)} and output {list(output.shape)} differ"
            return
        axis = self.probe.axis if self.probe.axis is not None else (1 if skip.ndim == 4 else -1)
        self._axis = axis % skip.ndim
        given = (skip, output) if body is None else (skip, output, np.broadcast_to(body, skip.shape))
        arrays = [np.moveaxis(a, self._axis, -1) for a in given]
        sequence = self._axis == skip.ndim - 1
        masked = mask is not None and sequence and skip.ndim >= 3 and mask.shape == skip.shape[:2]
        rows = max(1, CHUNK // max(1, skip[0].size)) if len(skip) else 1
        for start in range(0, len(skip), rows):
            part = slice(start, start + rows)
            kept = mask[part] if masked and mask is not None else None
            lengths_and_cosine = _compare(*(a[part].astype(np.float64) for a in arrays))
            self._add_rows(*lengths_and_cosine, kept, sequence)

    def result(self) -> BranchStatistics:
        """What was seen so far."""
        return BranchStatistics(
            self.probe.name,
            self._axis,
            self._tokens,
            self._samples,
            self._cosines / max(1, self._tokens),
            self._ratios / max(1, self._ratio_tokens),
            self._angles / max(1, self._angle_count),
        )

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._tokens

    def _add_rows(
        self,
        skip_length: np.ndarray,
        body_length: np.ndarray,
        cosine: np.ndarray,
        mask: np.ndarray | None,
        sequence: bool,
    ) -> None:
        kept = np.ones(cosine.shape, dtype=bool)
        if mask is not None:
            kept &= mask.reshape(mask.shape + (1,) * (kept.ndim - 2))
        self._samples += len(kept)
        self._tokens += int(kept.sum())
        self._cosines += float(cosine[kept].sum())
        usable = kept & (skip_length > 0)
        self._ratios += float((body_length[usable] / skip_length[usable]).sum())
        self._ratio_tokens += int(usable.sum())
        if sequence and cosine.ndim >= 2:
            kept = _last_only(kept)
        self._angles += float(np.arccos(np.clip(cosine[kept], -1.0, 1.0)).sum()) / np.pi
        self._angle_count += int(kept.sum())


def _compare(
    skip: np.ndarray, output: np.ndarray, body: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L2(skip), L2(body) and cos(skip, output) along the last axis."""
    body = output - skip if body is None else body
    skip_length = np.sqrt(np.einsum("...d,...d->...", skip, skip))
    body_length = np.sqrt(np.einsum("...d,...d->...", body, body))
    output_length = np.sqrt(np.einsum("...d,...d->...", output, output))
    dot = np.einsum("...d,...d->...", skip, output)
    lengths = skip_length * output_length
    cosine = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)
    cosine[(skip_length == 0) & (output_length == 0)] = 1.0
    return skip_length, body_length, cosine


def _last_only(kept: np.ndarray) -> np.ndarray:
    """Of the tokens kept along axis 1, only each sample's last."""
    last = np.zeros_like(kept)
    tokens: np.ndarray = kept.reshape(*kept.shape[:2], -1).max(axis=2)
    rows = np.flatnonzero(tokens.any(axis=1))
    position = tokens.shape[1] - 1 - np.argmax(tokens[rows, ::-1], axis=1)
    last[rows, position] = kept[rows, position]
    return last
