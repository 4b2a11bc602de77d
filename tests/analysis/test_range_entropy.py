"""The entropy range against the divergence written out element by element."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from lamina.analysis.range_entropy import least_divergence, window_divergence
from lamina.analysis.ranges import choose_range
from lamina.analysis.streaming import RangeAccumulator

RNG = np.random.default_rng(3)


def direct(counts, first, last, levels):
    """As the slides say it: one step after the other."""
    inside = [float(c) for c in counts[first:last]]
    p = list(inside)
    p[0] += float(sum(counts[:first]))
    p[-1] += float(sum(counts[last:]))
    q = [0.0] * len(inside)
    for step in range(levels):
        bins = [i for i in range(len(inside)) if i * levels // len(inside) == step]
        held = [i for i in bins if inside[i] > 0]
        for i in held:
            q[i] = sum(inside[b] for b in bins) / len(held)
    return p, q


@pytest.mark.parametrize("window", [(0, 64), (5, 40), (20, 37)])
def test_divergence_of_full_bins_is_the_textbook_one(window):
    counts = RNG.integers(1, 50, 64)
    p, q = direct(counts, *window, 16)
    assert window_divergence(counts, *window, 16) == pytest.approx(entropy(p, q), rel=1e-12)


def test_empty_bins_weigh_next_to_nothing_and_never_divide_by_zero():
    counts = RNG.integers(1, 50, 64)
    counts[::3] = 0
    p, q = (np.array(v) for v in direct(counts, 0, 64, 16))
    held = p > 0
    expected = entropy(p[held], q[held])
    assert window_divergence(counts, 0, 64, 16) == pytest.approx(expected, abs=1e-4)
    counts[0], counts[63] = 0, 0
    assert np.isfinite(window_divergence(counts, 10, 50, 16))


def test_the_best_window_is_found():
    counts = np.bincount(np.clip(RNG.laplace(1024, 60, 40000).astype(int), 0, 2047), minlength=2048)
    edges = np.linspace(-1.0, 1.0, 2049)
    low, high = least_divergence(counts, edges, -1.0, 1.0, 256)
    chosen = 1024 * high
    assert low == -high
    widths = range(128, 1025, 8)
    losses = [window_divergence(counts, 1024 - w, 1024 + w, 256) for w in widths]
    assert list(widths)[int(np.argmin(losses))] == pytest.approx(chosen)
    assert chosen < 1024


def test_outliers_are_clipped_and_flat_distributions_are_not():
    def chosen(values):
        total = RangeAccumulator()
        total.add(values.astype(np.float32))
        return 255 * choose_range(total.result(), "entropy")[0]

    bulk = RNG.normal(0, 1, 50000)
    assert chosen(np.concatenate([bulk, [12.0, -12.0]])) < 0.75 * 24
    flat = np.linspace(-1, 1, 50000)
    assert chosen(flat) == pytest.approx(2.0, rel=0.02)


def test_a_relu_spike_does_not_count():
    total = RangeAccumulator()
    positive = np.abs(RNG.normal(0, 1, 20000))
    total.add(np.concatenate([positive, np.zeros(200000)]).astype(np.float32))
    alone = RangeAccumulator()
    alone.add(positive.astype(np.float32))
    assert choose_range(total.result(), "entropy") == choose_range(alone.result(), "entropy")
