"""Metrics that rate branches and depths by how little they change what flows past them.

Each takes collected statistics and returns one number a site; what it needs stands in the registry
(:mod:`lamina.analysis.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from lamina.analysis.linear_map import relative_residual
from lamina.analysis.statistics import Statistics

_BINS = 256


def block_influence(statistics: Statistics) -> Mapping[str, float]:
    """``1 - E_t cos(x, x + f(x))`` of each branch.

    x, f(x): ``[tokens, width]``. Range 0 to 2; higher = more important. Men et al. 2024, arXiv:2403.03853.
    """
    return {name: b.influence for name, b in statistics.branches.items()}


def branch_similarity(statistics: Statistics) -> Mapping[str, float]:
    """``E_t cos(x, x + f(x))`` of each branch.

    x, f(x): ``[tokens, width]``. Range -1 to 1; higher = more redundant. He et al. 2024, arXiv:2406.15786.
    """
    return {name: b.cosine for name, b in statistics.branches.items()}


def relative_contribution(statistics: Statistics) -> Mapping[str, float]:
    """``E_t L2(f(x)) / L2(x)`` of each branch, over tokens whose x is not zero.

    x, f(x): ``[tokens, width]``. Range 0 upwards; higher = more important. Csordas et al. 2025,
    arXiv:2505.13898.
    """
    return {name: b.relative_norm for name, b in statistics.branches.items()}


def angular_distance(statistics: Statistics) -> Mapping[str, float]:
    """``arccos(cos(x, x + f(x))) / pi`` of each branch at each sample's last token, mean over samples.

    x, f(x): ``[samples, width]``. Range 0 to 1; higher = more important. Gromov et al. 2024,
    arXiv:2403.17887. The full matrix over any two depths is ``statistics.depths.angles``
    (:func:`angular_matrix`).
    """
    return {name: b.last_token_angle for name, b in statistics.branches.items()}


def angular_matrix(statistics: Statistics) -> tuple[tuple[str, ...], np.ndarray]:
    """D[l, n]: the angular distance of depth l to depth l + n.

    Returns:
        Depths, and float64 ``[depths, depths]``; NaN past the last depth and between vectors of different
        width or number. Range 0 to 1; lower = more redundant. arXiv:2403.17887, sec. 3.
    """
    angles = statistics.depths.angles
    shifted = np.full_like(angles, np.nan)
    for first in range(len(angles)):
        shifted[first, : len(angles) - first] = angles[first, first:]
    return statistics.depths.names, shifted


def void_rate(statistics: Statistics) -> Mapping[str, float]:
    """Share of tokens at which a branch is void: ``d_l < 0.8 * (max_l d_l - min_l d_l)``.

    ``d_l = L2(h_l) - L2(h_{l-1})``, h_l ``[tokens, width]``: how much the branch lengthens a token; the
    spread is over all branches with the same tokens. Range 0 to 1; higher = more redundant. Void in language
    models, Shemiranifar 2025, arXiv:2505.14467; its use as a static share is ours. One number a phase:
    collect each phase apart.
    """
    return {name: b.void for name, b in statistics.branches.items() if not np.isnan(b.void)}


def entropy_increase(statistics: Statistics) -> Mapping[str, float]:
    """``H(x_{l+1}) - H(x_l)`` of each depth to the next one.

    x_l: ``[n, d]``. H: entropy in nats of a histogram of all elements, 256 even bins over the smallest
    interval that holds both depths. Range -ln 256 to ln 256; higher = more important. Entropy-based block
    pruning, Yang et al. 2025, arXiv:2504.03794; the estimator is ours, the abstract names none.
    """
    found = {}
    tokens = statistics.depths.tokens
    for name, following in _steps(statistics, same=False):
        first, second = tokens[name], tokens[following]
        low = min(float(first.min()), float(second.min()))
        high = max(float(first.max()), float(second.max()))
        found[name] = histogram_entropy(second, low, high) - histogram_entropy(first, low, high)
    return found


def histogram_entropy(values: np.ndarray, low: float, high: float) -> float:
    """Entropy in nats of ``values`` in 256 even bins from ``low`` to ``high``; 0 for an empty interval."""
    if not high > low:
        return 0.0
    counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def direct_matching(statistics: Statistics) -> Mapping[str, float]:
    """Relative residual of the best affine map from each depth to the next.

    ``min_{A,b} sum_t L2(A x_t + b - y_t)^2 / sum_t L2(y_t - mean y)^2``, ridge
    (:func:`lamina.analysis.linear_map.fit_map` also returns the map, for any two depths). x ``[n, d]``,
    y ``[n, e]``. Range 0 to 1; lower = more redundant. How not to stitch representations, Balogh and Jelasity
    2024, arXiv:2412.11299.
    """
    tokens = statistics.depths.tokens
    return {a: relative_residual(tokens[a], tokens[b]) for a, b in _steps(statistics)}


def linear_cka(statistics: Statistics) -> Mapping[str, float]:
    """``F(Y'X)^2 / (F(X'X) F(Y'Y))`` of each depth and the next, columns centred.

    X ``[n, d]``, Y ``[n, e]``: the same tokens at both depths; F: Frobenius norm. Range 0 to 1; higher = more
    redundant. Kornblith et al. 2019, arXiv:1905.00414. :func:`cka_matrix` has any two depths.
    """
    tokens = statistics.depths.tokens
    return {a: cka(tokens[a], tokens[b]) for a, b in _steps(statistics)}


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of two sets of vectors for the same tokens; 1 where both are constant."""
    a, b = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in (x, y))
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    if norms == 0:
        return 1.0 if np.linalg.norm(a) == np.linalg.norm(b) else 0.0
    return float(np.square(np.linalg.norm(b.T @ a)) / norms)


def cka_matrix(statistics: Statistics) -> tuple[tuple[str, ...], np.ndarray]:
    """Linear CKA of any two depths: float64 ``[depths, depths]``, NaN where their tokens differ."""
    depths = statistics.depths
    matrix = np.full((len(depths.names),) * 2, np.nan)
    for i, first in enumerate(depths.names):
        for j, second in enumerate(depths.names[: i + 1]):
            if (
                first in depths.tokens
                and second in depths.tokens
                and depths.group[first] == depths.group[second]
            ):
                value = cka(depths.tokens[first], depths.tokens[second])
                matrix[i, j] = matrix[j, i] = value
    return depths.names, matrix


def representation_quality(statistics: Statistics) -> Mapping[str, float]:
    """Entropy of the normalised eigenvalues of the token Gram matrix at each depth, mean over samples.

    ``-sum_i p_i ln p_i``, ``p = eig(Z Z') / tr(Z Z')``, Z ``[t, d]`` the tokens of one sample. Range 0 to
    ln min(t, d); higher = tokens more spread out, which the paper finds good for embeddings. Layer by layer,
    Skean et al. 2025, arXiv:2502.02013. The paper's other two views of the same depth stand beside it:
    :func:`representation_curvature` and :func:`representation_invariance`.
    """
    return {name: s.entropy for name, s in statistics.depths.spectra.items()}


def representation_curvature(statistics: Statistics) -> Mapping[str, float]:
    """Mean angle, over pi, between successive token differences at each depth, mean over samples.

    ``arccos(cos(z_{t+1} - z_t, z_{t+2} - z_{t+1})) / pi``, z_t ``[d]``. Range 0 to 1; lower = the stream runs
    straighter. Depths of images, which have no order, and of samples with fewer than three tokens are left
    out. Skean et al. 2025, arXiv:2502.02013.
    """
    spectra = statistics.depths.spectra.items()
    return {name: s.curvature for name, s in spectra if not np.isnan(s.curvature)}


def representation_invariance(statistics: Statistics) -> Mapping[str, float]:
    """InfoNCE at each depth: how well two views of a sample find each other among other samples' views.

    :func:`lamina.analysis.views.info_nce` of a ``[n, d]`` and b ``[n, d]``, the means over two random
    disjoint halves of each sample's tokens (positions, for images). Range 0 upwards, ln n = chance; lower =
    better. Skean et al. 2025, arXiv:2502.02013. Deviates: the paper perturbs the input text and runs it
    again; token dropping at the depth itself works for any input and costs no run.
    """
    return {name: v.loss for name, v in statistics.views.items()}


def attention_rank(statistics: Statistics) -> Mapping[str, float]:
    """Mean numerical rank of the attention maps ``softmax(QK')`` of each attention branch.

    Maps ``[heads, t, t]``; singular values above ``t * eps_float32`` of the largest count. Range 1 to t;
    lower = more redundant. gamma-MoD, Luo et al. 2024, arXiv:2410.13859.
    """
    return {name: a.rank for name, a in statistics.attention.items()}


def _steps(statistics: Statistics, same: bool = True) -> list[tuple[str, str]]:
    """Each depth with the one after it, where both were sampled (at the same tokens if ``same``)."""
    depths = statistics.depths
    found = []
    for name, following in pairwise(depths.names):
        if name not in depths.tokens or following not in depths.tokens:
            continue
        alike = len(depths.tokens[name]) == len(depths.tokens[following])
        if not same or (alike and depths.group[name] == depths.group[following]):
            found.append((name, following))
    return found
