"""Every metric, in one tuple: what it rates, what it needs, and which end is which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lamina.analysis import redundancy, sensitivity, weight_error
from lamina.analysis.needs import FORWARD, Need
from lamina.analysis.statistics import Statistics
from lamina.errors import PassError
from lamina.ir.program import Program

Direction = Literal["redundant", "important", "sensitive"]
About = Literal["branch", "depth", "operator", "pair"]


@dataclass(frozen=True)
class Metric:
    """One number a site, from collected statistics.

    Attributes:
        name: The id of METHODS.md; what reports and options call it.
        about: What the sites are: branches, depths (named by the branch they enter, or ``end``), operators,
            pairs of sites.
        direction: What a high value says: ``redundant``, ``important`` (stay) or ``sensitive`` (keep bits).
        source: Paper the definition is from.
        needs: Statistics it reads.
        rate: Site -> value; sites without a value are left out.
        lowest: Whether it is the low end that ``direction`` names.
    """

    name: str
    about: About
    direction: Direction
    source: str
    needs: frozenset[Need]
    rate: Callable[[Program, Statistics], Mapping[str, float]]
    lowest: bool = False

    def redundancy(self, value: float) -> float:
        """The value turned so that higher always means more redundant: for ranking, not for reports."""
        return value if (self.direction == "redundant") != self.lowest else -value


def _of(function: Callable[[Statistics], Mapping[str, float]]) -> Callable[..., Mapping[str, float]]:
    return lambda program, statistics: function(statistics)


def _needs(*needs: Need) -> frozenset[Need]:
    return frozenset(needs)


METRICS: tuple[Metric, ...] = (
    Metric(
        "block-influence",
        "branch",
        "important",
        "ShortGPT, Men et al. 2024, arXiv:2403.03853",
        _needs(Need.LENGTHS),
        _of(redundancy.block_influence),
    ),
    Metric(
        "branch-similarity",
        "branch",
        "redundant",
        "What Matters in Transformers?, He et al. 2024, arXiv:2406.15786",
        _needs(Need.LENGTHS),
        _of(redundancy.branch_similarity),
    ),
    Metric(
        "relative-contribution",
        "branch",
        "important",
        "Do Language Models Use Their Depth Efficiently?, Csordas et al. 2025, arXiv:2505.13898",
        _needs(Need.LENGTHS),
        _of(redundancy.relative_contribution),
    ),
    Metric(
        "angular-distance",
        "branch",
        "important",
        "The Unreasonable Ineffectiveness of the Deeper Layers, Gromov et al. 2024, arXiv:2403.17887",
        _needs(Need.LENGTHS, Need.ANGLES),
        _of(redundancy.angular_distance),
    ),
    Metric(
        "void-rate",
        "branch",
        "redundant",
        "Void in Language Models, Shemiranifar 2025, arXiv:2505.14467",
        _needs(Need.LENGTHS),
        _of(redundancy.void_rate),
    ),
    Metric(
        "entropy-increase",
        "depth",
        "important",
        "Entropy-Based Block Pruning for Efficient LLMs, Yang et al. 2025, arXiv:2504.03794",
        _needs(Need.TOKENS),
        _of(redundancy.entropy_increase),
    ),
    Metric(
        "direct-matching",
        "depth",
        "important",
        "How not to Stitch Representations, Balogh and Jelasity 2024, arXiv:2412.11299",
        _needs(Need.TOKENS),
        _of(redundancy.direct_matching),
    ),
    Metric(
        "linear-cka",
        "depth",
        "redundant",
        "Similarity of Neural Network Representations Revisited, Kornblith et al. 2019, arXiv:1905.00414",
        _needs(Need.TOKENS),
        _of(redundancy.linear_cka),
    ),
    Metric(
        "representation-quality",
        "depth",
        "important",
        "Layer by Layer, Skean et al. 2025, arXiv:2502.02013",
        _needs(Need.SPECTRA, Need.VIEWS),
        _of(redundancy.representation_quality),
    ),
    Metric(
        "attention-rank",
        "branch",
        "important",
        "gamma-MoD, Luo et al. 2024, arXiv:2410.13859",
        _needs(Need.ATTENTION),
        _of(redundancy.attention_rank),
    ),
    Metric(
        "layer-input-modification",
        "branch",
        "sensitive",
        "Layer-Wise Quantization, Dumitru et al. 2024, arXiv:2406.17415",
        _needs(Need.LENGTHS),
        _of(sensitivity.layer_input_modification),
    ),
    Metric(
        "outlier-weight-count",
        "operator",
        "sensitive",
        "Layer-Wise Quantization, Dumitru et al. 2024, arXiv:2406.17415",
        _needs(Need.INPUTS),
        sensitivity.outlier_weight_count,
        lowest=True,
    ),
    Metric(
        "quantization-error-w8",
        "operator",
        "sensitive",
        "exact relative output error of rounding to 8 bits a channel",
        _needs(Need.INPUTS),
        weight_error.output_error_at(8),
    ),
    Metric(
        "quantization-error-w4",
        "operator",
        "sensitive",
        "exact relative output error of rounding to 4 bits a channel",
        _needs(Need.INPUTS),
        weight_error.output_error_at(4),
    ),
    Metric(
        "lieq-diagnostics",
        "depth",
        "sensitive",
        "LieQ, Xiao et al. 2025, arXiv:2508.03332",
        _needs(Need.TOKENS),
        _of(sensitivity.lieq_diagnostics),
    ),
    Metric(
        "output-kl",
        "branch",
        "sensitive",
        "mean KL divergence of the outputs, one site changed",
        _needs(Need.DAMAGES),
        _of(sensitivity.output_kl),
    ),
    Metric(
        "skip-effect",
        "branch",
        "important",
        "Do Language Models Use Their Depth Efficiently?, Csordas et al. 2025, arXiv:2505.13898",
        _needs(Need.SKIPS),
        _of(sensitivity.skip_effect),
    ),
    Metric(
        "hessian-interlayer",
        "pair",
        "sensitive",
        "Augmenting Hessians with Inter-Layer Dependencies, Schaefer et al. 2023, arXiv:2306.04879",
        _needs(Need.PAIRS),
        _of(sensitivity.hessian_interlayer),
    ),
    Metric(
        "residual-norm-risk",
        "branch",
        "sensitive",
        "Why Do Some Inputs Break Low-Bit LLM Quantization?, Chang et al. 2025, arXiv:2506.12044",
        _needs(Need.EXAMPLES, Need.DAMAGES),
        _of(sensitivity.residual_norm_risk),
    ),
)

# Those that one run of the model as it is gives.
FORWARD_METRICS = tuple(metric for metric in METRICS if metric.needs <= FORWARD)


def get_metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        PassError: There is none.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    names = ", ".join(m.name for m in METRICS)
    raise PassError(f"metric '{name}' is unknown", advice=f"choose one of {names}")


def scores(program: Program, statistics: Statistics, metric: str) -> Mapping[str, float]:
    """The metric of every site, in the program's order.

    Raises:
        PassError: No metric is called that.
    """
    return get_metric(metric).rate(program, statistics)


def rank(program: Program, statistics: Statistics, metric: str) -> list[str]:
    """Sites, the most redundant (or least sensitive) first; equal ones in the program's order.

    Raises:
        PassError: No metric is called that.
    """
    chosen = get_metric(metric)
    values = chosen.rate(program, statistics)
    return sorted(values, key=lambda name: -chosen.redundancy(values[name]))
