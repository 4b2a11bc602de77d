"""How well two halves of one sample's tokens find each other among those of other samples, at each depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.depths import Depth
from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Layout, Taps, lattice, on_lattice

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Invariance:
    """InfoNCE at one depth.

    Attributes:
        loss: :func:`info_nce` in nats; lower = the depth keeps what tokens of one sample have in common.
        samples: Samples compared with each other; guessing scores the logarithm of it.
    """

    loss: float
    samples: int


class ViewAccumulator:
    """Keeps two views of a few samples at each depth, and compares them in the end.

    A view is the mean vector of one half of a sample's tokens (of an image: positions of the lattice), the
    halves drawn at random and alike at every depth. Samples of fewer than two tokens are left out.

    Args:
        taps: Grows the outputs; pooling happens in the runtime.
        depths: The depths in order.
        rows: Samples of the run the shapes were observed in.
        pixels: Positions of an image to look at.
    """

    def __init__(self, taps: Taps, depths: Sequence[Depth], rows: int, pixels: int) -> None:
        self._outputs: dict[str, tuple[str, int]] = {}
        self._places: dict[str, np.ndarray] = {}
        self._kept: dict[str, list[np.ndarray]] = {}
        for depth in depths:
            shape = taps.shapes[depth.value][0] if depth.value in taps.shapes else ()
            layout = Layout.of(shape, depth.axis, rows)
            if layout is None or not layout.sampled or layout.places < 2:
                continue
            self._kept[depth.name] = []
            if layout.kind == "pixels":
                self._places[depth.name] = lattice(layout.space, pixels)
                count = len(self._places[depth.name])
                self._outputs[depth.name] = taps.rows(depth.value, "images"), count
            else:
                self._outputs[depth.name] = taps.halves(depth.value, layout), layout.places

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch."""
        if not view.looked:
            return
        for name, (output, places) in self._outputs.items():
            if name in self._places:
                # images leave the runtime for other statistics too: a few of them serve here
                images = on_lattice(values[output][view.views_of_images()], self._places[name])
                weights = view.halves_of_images(places)
                pooled = np.matmul(weights, images.transpose(0, 2, 1))
            else:
                weights, pooled = view.halves(places), values[output]
            self._kept[name].append(pooled[weights.any(axis=-1).all(axis=-1)].astype(np.float32))

    def result(self) -> dict[str, Invariance]:
        """What was seen so far; depths with fewer than two samples are left out."""
        stacked = {name: np.concatenate(parts) for name, parts in self._kept.items() if parts}
        return {n: Invariance(info_nce(v[:, 0], v[:, 1]), len(v)) for n, v in stacked.items() if len(v) > 1}


def info_nce(first: np.ndarray, second: np.ndarray, temperature: float = TEMPERATURE) -> float:
    """InfoNCE loss of two views ``[n, width]`` of the same samples, mean of both directions, in nats.

    ``-mean_i ln(exp(s_ii) / sum_j exp(s_ij))``, ``s_ij = cos(a_i, b_j) / temperature``; float64. Range 0
    upwards (at most ``2 / temperature + ln n``); ln n where views tell nothing. A zero vector has cosine 0.
    ``ln n`` less the loss bounds the views' mutual information from below. Van den Oord et al. 2018,
    arXiv:1807.03748; the temperature is ours.
    """
    a, b = (_unit(v.astype(np.float64)) for v in (first, second))
    scores = a @ b.T / temperature
    own = np.diag(scores)
    losses = [np.logaddexp.reduce(scores, axis=axis) - own for axis in (1, 0)]
    return float(np.mean(losses))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = vectors / np.where(lengths > 0, lengths, 1.0)
    return found
