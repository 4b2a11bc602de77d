"""Metrics that say how much it hurts to change a branch or an operator, from forward statistics alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.ir.program import Program


def layer_input_modification(statistics: Statistics) -> Mapping[str, float]:
    """LIM: ``1 - E_t cos(x, y)`` of each branch's input and output.

    x, y ``[tokens, width]``. Range 0 to 2; higher = more important, gets more bits. Layer-wise quantization,
    Dumitru et al. 2024, arXiv:2406.17415 (its LIM is the negative cosine; 1 more does not change an order).
    """
    return {name: b.influence for name, b in statistics.branches.items()}


def outlier_weight_count(program: Program, statistics: Statistics) -> Mapping[str, float]:
    """ZD: share of each operator's weights more than one standard deviation from their mean.

    W ``[out, in]``; ``count(abs(z) > 1) / n``, ``z = (w - mean) / std``. Range 0 to 1; LOWER =
    more important. Dumitru et al. 2024, arXiv:2406.17415, sec. 3.2.
    """
    found = {}
    for name, operator in statistics.operators.items():
        weights = operator.matrices(program)
        spread = float(weights.std())
        found[name] = float((np.abs(weights - weights.mean()) > spread).mean()) if spread > 0 else 0.0
    return found


def compactness(statistics: Statistics) -> Mapping[str, float]:
    """Effective rank over width of each branch's output, from the sampled tokens.

    ``exp(-sum_i p_i ln p_i) / d``, p the squared singular values of the centred ``[n, d]`` over their sum.
    Range 1/d to 1; higher = more important. LieQ, Xiao et al. 2025, arXiv:2508.03332 (formula derived).
    """
    found = {}
    for name, values in _outputs(statistics).items():
        shares = _energies(values)
        positive = shares[shares > 0]
        entropy = float(-(positive * np.log(positive)).sum())
        found[name] = float(np.exp(entropy)) / values.shape[1] if len(positive) else 0.0
    return found


def energy_gain(statistics: Statistics, share: float = 0.1) -> Mapping[str, float]:
    """How much more of its energy the top tenth of singular directions holds after a branch than before it.

    ``E_k(x_{l+1}) - E_k(x_l)``, E_k = sum of the k largest squared singular values over all, centred tokens
    ``[n, d]``, k = max(1, share * d). Range -1 to 1; higher = more important. LieQ, arXiv:2508.03332
    (formula derived).
    """
    found = {}
    tokens = statistics.depths.tokens
    for name, values in _outputs(statistics).items():
        found[name] = _top(values, share) - _top(tokens[name], share)
    return found


def lieq_diagnostics(
    statistics: Statistics, damages: Mapping[str, float] | None = None
) -> Mapping[str, float]:
    """Sum of :func:`compactness`, :func:`energy_gain` and, where measured, the damage of bypassing a branch.

    ``sum_k (s_k - min s_k) / (max s_k - min s_k)`` over the terms s_k, from the tokens ``[n, d]`` of depths.
    Each term is normalised to 0 to 1 over the branches before it is added. Range 0 to 2, to 3 with damages;
    higher = more important. LieQ, arXiv:2508.03332 (weights of the terms derived: equal).

    Args:
        statistics: Collected with ``Need.TOKENS``.
        damages: Branch -> measured damage of dropping it (:mod:`lamina.analysis.single_site`); None: those
            of the statistics, if any. Branches without one are left out.
    """
    damages = statistics.damages if damages is None else damages
    terms = [compactness(statistics), energy_gain(statistics), *([damages] if damages else [])]
    sites = [name for name in terms[0] if all(name in term for term in terms)]
    total = dict.fromkeys(sites, 0.0)
    for term in terms:
        values = np.array([term[name] for name in sites])
        spread = float(np.ptp(values)) if len(values) else 0.0
        for name, value in zip(sites, values, strict=True):
            total[name] += float(value - values.min()) / spread if spread > 0 else 0.0
    return total


def output_kl(statistics: Statistics) -> Mapping[str, float]:
    """``E_t KL(p_original, p_changed)`` in nats of the outputs when one site is changed.

    p ``[positions, classes]``. Range 0 upwards; higher = more harm. Standard definition; the 95 % quantile
    over samples stands beside it (:class:`lamina.analysis.single_site.Damage`). Of models without logits,
    the divergence it was measured with.
    """
    return dict(statistics.damages)


def skip_effect(statistics: Statistics) -> Mapping[str, float]:
    """Mean over later depths m of ``E_t L2(x'_m - x_m) / L2(x_m)`` when a branch is skipped.

    x_m, x'_m ``[tokens, width]``. Range 0 upwards; higher = more important. Csordas et al. 2025,
    arXiv:2505.13898 (norm ratio derived). Each depth: ``statistics.skips``.
    """
    return {name: float(np.mean(list(e.values()))) for name, e in statistics.skips.items() if e}


def hessian_interlayer(statistics: Statistics) -> Mapping[str, float]:
    """``loss(l and m changed) - loss(l) - loss(m)`` of the pairs measured; the interaction term alone.

    Each loss is a mean over outputs ``[positions, classes]``. Range: any sign; higher = more sensitive
    together. Augmenting Hessians with inter-layer dependencies, Schaefer et al. 2023, arXiv:2306.04879 (term
    derived). Its sum with hawq-trace orders tensors; that part needs gradients.
    """
    return dict(statistics.pairs)


def residual_norm_risk(statistics: Statistics) -> Mapping[str, float]:
    """Rank correlation over examples of ``mean_t L2(x_l)`` with the example's loss in low bits.

    x_l ``[tokens, width]`` in full precision, after branch l. Range -1 to 1; far from 0 = the depth tells
    which examples break (:func:`risky_examples`); the sign is fitted, as the abstract names none. Why do some
    inputs break low-bit LLM quantization?, Chang et al. 2025, arXiv:2506.12044.
    """
    if not len(statistics.losses):
        return {}
    losses = _ranks(statistics.losses[statistics.example_rows])
    return {name: _correlation(_ranks(v), losses) for name, v in statistics.examples.items()}


def risky_examples(statistics: Statistics, branch: str, count: int) -> np.ndarray:
    """Rows of the data whose length after ``branch`` predicts the greatest loss, the riskiest first."""
    sign = np.sign(residual_norm_risk(statistics)[branch]) or 1.0
    order = np.argsort(-sign * statistics.examples[branch], kind="stable")
    rows: np.ndarray = statistics.example_rows[order[:count]]
    return rows


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2.0
    found: np.ndarray = middle[inverse]
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    product = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / product if product > 0 else 0.0


def _outputs(statistics: Statistics) -> dict[str, np.ndarray]:
    """Depth -> tokens of the depth after it."""
    names, tokens = statistics.depths.names, statistics.depths.tokens
    pairs = pairwise(names)
    return {a: tokens[b] for a, b in pairs if a in tokens and b in tokens}


def _energies(values: np.ndarray) -> np.ndarray:
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    energies = np.maximum(np.linalg.eigvalsh(centred.T @ centred)[::-1], 0.0)
    total = float(energies.sum())
    return energies / total if total > 0 else energies


def _top(values: np.ndarray, share: float) -> float:
    return float(_energies(values)[: max(1, int(share * values.shape[1]))].sum())
