"""Entropic optimal transport between two small sets, in the log domain."""

from __future__ import annotations

import numpy as np

# Iterations between two absorptions of the scalings into the potentials.
_ABSORB = 20
# Scalings beyond this are absorbed at once: their products with the kernel would overflow.
_LARGE = 1e50


def transport_plan(
    cost: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    entropy: float,
    balance: float = np.inf,
    iterations: int = 500,
    tolerance: float = 1e-4,
) -> np.ndarray:
    """The plan T with the least ``sum T cost + entropy KL(T, rows columns')`` whose rows sum to ``rows``.

    Sinkhorn iterations, stabilized: potentials are kept as logarithms, scalings are absorbed into them.
    Columns sum to ``columns`` where ``balance`` is infinite; else they may differ, at a price of ``balance``
    times their KL divergence (unbalanced transport), and with 0 they are free: every row then goes to what
    is near to it.

    Args:
        cost: float ``[d, m]``, not negative.
        rows: float ``[d]``, positive.
        columns: float ``[m]``, positive, of the same sum.
        entropy: Weight of the entropy, positive, in units of the cost.
        balance: Weight of the columns' marginal, in units of the cost; inf: it is exact.
        iterations: Most of them.
        tolerance: Share of all mass at which it ends: what is still in the wrong columns, or where those may
            differ, what the last iterations moved between them.

    Returns:
        float64 ``[d, m]``; rows are exact whatever the number of iterations.

    Source: Cuturi 2013, arXiv:1306.0895; Chizat et al. 2018, arXiv:1607.05816 (unbalanced); Schmitzer 2019,
        arXiv:1610.06519 (stabilization).
    """
    power = 1.0 if np.isinf(balance) else balance / (balance + entropy)
    exponent = -np.asarray(cost, np.float64) / entropy
    log_columns = np.log(columns)
    f, g = np.zeros(len(rows)), np.zeros(len(columns))  # potentials in units of the entropy
    sums = np.zeros(len(columns)) if power < 1 else np.asarray(columns, np.float64)
    for start in range(0, iterations, _ABSORB):
        # rows of the kernel are scaled to a largest element of 1, so that none is all zero
        f = -(exponent + g + log_columns).max(axis=1)
        kernel = np.exp(exponent + g + log_columns + f[:, None])
        u, v = np.ones(len(rows)), np.ones(len(columns))
        for _ in range(min(_ABSORB, iterations - start)):
            u = rows / (kernel @ v)
            # the column's potential as a whole, g + log v, is what the power damps
            wanted = columns / np.maximum(kernel.T @ u, 1e-300)
            v = wanted**power * np.exp((power - 1) * g)
            if v.max() > _LARGE or v.min() < 1 / _LARGE:
                break
        plan = (rows / (kernel @ v))[:, None] * kernel * v
        g = g + np.log(np.maximum(v, 1e-300))
        moved = np.abs(plan.sum(axis=0) - sums).sum()
        sums = plan.sum(axis=0) if power < 1 else sums
        if moved <= tolerance * rows.sum() or power == 0:
            break
    return plan
