"""Metrics that rate residual branches by how little they change what flows past them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lamina.analysis.residual import BranchStatistics
from lamina.analysis.statistics import Statistics
from lamina.errors import PassError


@dataclass(frozen=True)
class RedundancyMetric:
    """One number a branch, from collected statistics.

    Attributes:
        name: What reports and options call it.
        direction: Whether a high value says the branch is ``redundant`` or ``important``.
        source: Paper the definition is from.
        of: The metric of one branch.
    """

    name: str
    direction: Literal["redundant", "important"]
    source: str
    of: Callable[[BranchStatistics], float]

    def redundancy(self, branch: BranchStatistics) -> float:
        """The metric turned so that higher always means more redundant: for ranking, not for reports."""
        value = self.of(branch)
        return value if self.direction == "redundant" else -value


def block_influence(branch: BranchStatistics) -> float:
    """``1 - E_t cos(x, x + f(x))``; higher = more important."""
    return 1.0 - branch.cosine


def branch_similarity(branch: BranchStatistics) -> float:
    """``E_t cos(x, x + f(x))``; higher = more redundant."""
    return branch.cosine


def relative_contribution(branch: BranchStatistics) -> float:
    """``E_t L2(f(x)) / L2(x)``; higher = more important."""
    return branch.relative_norm


def angular_distance(branch: BranchStatistics) -> float:
    """``arccos(cos(x, x + f(x))) / pi`` at each sample's last token; higher = more important."""
    return branch.last_token_angle


METRICS: tuple[RedundancyMetric, ...] = (
    RedundancyMetric(
        "block-influence", "important", "ShortGPT, Men et al. 2024, arXiv:2403.03853", block_influence
    ),
    RedundancyMetric(
        "branch-similarity",
        "redundant",
        "What Matters in Transformers?, He et al. 2024, arXiv:2406.15786",
        branch_similarity,
    ),
    RedundancyMetric(
        "relative-contribution",
        "important",
        "Do Language Models Use Their Depth Efficiently?, Csordas et al. 2025, arXiv:2505.13898",
        relative_contribution,
    ),
    RedundancyMetric(
        "angular-distance",
        "important",
        "The Unreasonable Ineffectiveness of the Deeper Layers, Gromov et al. 2024, arXiv:2403.17887",
        angular_distance,
    ),
)


def get_metric(name: str) -> RedundancyMetric:
    """The metric called ``name``.

    Raises:
        PassError: There is none.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    names = ", ".join(m.name for m in METRICS)
    raise PassError(f"redundancy metric '{name}' is unknown", advice=f"choose one of {names}")


def scores(statistics: Statistics, metric: str) -> Mapping[str, float]:
    """The metric of every branch, in the branches' order.

    Raises:
        PassError: No metric is called that.
    """
    rate = get_metric(metric).of
    return {name: rate(branch) for name, branch in statistics.branches.items()}


def rank(statistics: Statistics, metric: str) -> list[str]:
    """Branch names, the most redundant first; equal ones in the program's order.

    Raises:
        PassError: No metric is called that.
    """
    rate = get_metric(metric).redundancy
    return sorted(statistics.branches, key=lambda name: -rate(statistics.branches[name]))
