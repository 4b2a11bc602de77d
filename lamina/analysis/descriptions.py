"""What each metric says, for people: one line a metric, beside what the registry knows."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.analysis.metrics import METRICS
from lamina.analysis.needs import Looks, Need

_LOOKS = Looks()
# How each statistic is taken: every sample, or part of them as the defaults of Looks say.
SAMPLING = {
    Need.LENGTHS: f"tokens: exact; images: up to {_LOOKS.images}, {_LOOKS.pixels} positions each",
    Need.ANGLES: f"tokens: exact; images: up to {_LOOKS.images}, {_LOOKS.pixels} positions each",
    Need.TOKENS: f"{_LOOKS.tokens} tokens",
    Need.SPECTRA: f"{_LOOKS.samples} samples",
    Need.VIEWS: f"{_LOOKS.views} samples",
    Need.ATTENTION: f"{_LOOKS.samples} samples",
    Need.INPUTS: f"{_LOOKS.inputs} vectors an operator; convolutions: windows of {_LOOKS.patched} samples",
    Need.VECTORS: f"{_LOOKS.kept} vectors an operator",
    Need.EXAMPLES: f"up to {_LOOKS.examples} samples",
    Need.DAMAGES: "exact: every sample",
    Need.SKIPS: "exact: every sample",
    Need.PAIRS: "exact: every sample",
}


@dataclass(frozen=True)
class Description:
    """One metric in a line.

    Attributes:
        what: What it rates, in words.
        formula: Its definition.
        range: Values it can take.
        cost: What it takes beyond a plain run.
        sampled: How much of the data it looks at; empty: as :data:`SAMPLING` says of its needs.
    """

    what: str
    formula: str
    range: str
    cost: str
    sampled: str = ""


@dataclass(frozen=True)
class GradientDescription(Description):
    """One of the metrics that need gradients; they have functions of their own, not a place in the registry.

    Attributes:
        about: What is rated.
        direction: What a high value says.
        source: Its paper.
    """

    about: str = ""
    direction: str = ""
    source: str = ""


_SHARED = "the shared run"
_MOMENTS = "the shared run; one product with each weight"

DESCRIPTIONS = {
    "block-influence": Description(
        "how far a branch turns its skip", "1 - E_t cos(x, x + f(x))", "0..2", _SHARED
    ),
    "branch-similarity": Description(
        "how alike a branch's skip and sum are", "E_t cos(x, x + f(x))", "-1..1", _SHARED
    ),
    "relative-contribution": Description(
        "how long what a branch adds is", "E_t L2(f(x)) / L2(x)", "0..", _SHARED
    ),
    "angular-distance": Description(
        "how far a branch turns the last token; any two depths: `angular_matrix`",
        "E arccos(cos(x, x + f(x))) / pi at the last token",
        "0..1",
        _SHARED,
    ),
    "void-rate": Description(
        "share of tokens that a branch hardly lengthens, of each phase",
        "share of t with d_l < 0.8 (max d - min d), d_l = L2(h_l) - L2(h_{l-1})",
        "0..1",
        _SHARED,
    ),
    "entropy-increase": Description(
        "how much more spread out the values are after a branch",
        "H(x_{l+1}) - H(x_l), H the entropy of a histogram of 256 bins",
        "-ln 256..ln 256",
        "the shared run; two histograms a depth",
    ),
    "direct-matching": Description(
        "what no affine map makes of a depth; `fit_map` gives the map",
        "min_{A,b} sum L2(A x + b - y)^2 / sum L2(y - mean y)^2, ridge",
        "0..1",
        "the shared run; a solve of width d a depth",
    ),
    "linear-cka": Description(
        "how alike the tokens of two depths lie to each other; any two: `cka_matrix`",
        "F(Y'X)^2 / (F(X'X) F(Y'Y)), columns centred",
        "0..1",
        "the shared run; three products a depth",
    ),
    "representation-quality": Description(
        "how spread out a sample's tokens are; beside it curvature and InfoNCE of two halves of its tokens",
        "-sum p ln p, p = eig(ZZ') / tr(ZZ')",
        "0..ln min(t, d); curvature 0..1; InfoNCE 0..",
        "the shared run; eigenvalues of a few Gram matrices",
    ),
    "attention-rank": Description(
        "rank of a branch's attention maps",
        "mean over heads and samples of rank(softmax(QK'))",
        "1..t",
        "the shared run; eigenvalues of a few maps",
    ),
    "layer-input-modification": Description(
        "how far a branch changes its input", "1 - E_t cos(x, y)", "0..2", _SHARED
    ),
    "outlier-weight-count": Description(
        "share of an operator's weights far from their mean",
        "count(abs(w - mean) > std) / n",
        "0..1",
        "one pass over the weights",
        "exact: every weight; data only finds the operators",
    ),
    "quantization-error-w8": Description(
        "relative change of an operator's output with weights in 8 bits; other widths, activations and "
        "plain weight error: `quantization_errors`",
        "tr(dW S dW') / tr(W S W'), S = sum x x'",
        "0..",
        _MOMENTS,
    ),
    "quantization-error-w4": Description(
        "the same in 4 bits", "tr(dW S dW') / tr(W S W'), S = sum x x'", "0..", _MOMENTS
    ),
    "lieq-diagnostics": Description(
        "effective rank, energy gain and, once measured, drop damage of a branch",
        "sum of the terms, each scaled to 0..1 over the branches",
        "0..2; 0..3 with damages",
        "the shared run; eigenvalues of width d a depth",
    ),
    "output-kl": Description(
        "how far the outputs move when one site is changed",
        "E_t KL(p, p') and its 95 % quantile; for outputs that are no logits 1 - cos or relative L2",
        "0..",
        "at most 0.6 L plain runs for the L branches (prefix reuse)",
    ),
    "skip-effect": Description(
        "how far later depths move when a branch is skipped",
        "mean over m > l of E_t L2(x'_m - x_m) / L2(x_m)",
        "0..",
        "about 0.6 L plain runs (prefix reuse)",
    ),
    "hessian-interlayer": Description(
        "how much worse two changes are together than apart; to be added to hawq-trace",
        "loss(l and m) - loss(l) - loss(m)",
        "any",
        "at most one plain run a pair looked at, after output-kl",
    ),
    "residual-norm-risk": Description(
        "how well the length of an example's vectors tells its loss in low bits",
        "rank correlation over examples of mean_t L2(x_l) and the loss",
        "-1..1, far from 0 = tells",
        "the shared run and one with rounded weights",
    ),
}

GRADIENT_DESCRIPTIONS = {
    "hawq-trace": GradientDescription(
        "how much the loss bends along a weight, times its rounding error",
        "(tr(H_l) / n_l) L2(Q_b(W) - W)^2",
        "0.. at a minimum",
        "4 backward runs a batch",
        "64 samples, Hutchinson; with a standard error",
        "operator",
        "sensitive",
        "HAWQ-V2, Dong et al. 2020, arXiv:1911.03852",
    ),
    "fisher-diagonal": GradientDescription(
        "how steep the likelihood is along a weight",
        "E (d ln p / d w)^2, mean over the weight",
        "0..",
        "a backward run a sample",
        "64 samples; with a standard error",
        "operator",
        "sensitive",
        "On Surgical Fine-tuning for Language Encoders, Lodha et al. 2023, arXiv:2310.17041",
    ),
    "gradient-trace": GradientDescription(
        "how alike a changed program's gradients are to the original's",
        "mean over weights of corr(g_l, g'_l)",
        "-1..1",
        "a forward and a backward run of both programs",
        "64 samples; with a standard error",
        "candidate",
        "better",
        "TraceNAS (form derived from its abstract)",
    ),
}

_HEAD = (
    "metric",
    "of",
    "what",
    "formula",
    "range",
    "high says",
    "needs",
    "cost",
    "exact or sampled",
    "paper",
)


def metric_table() -> str:
    """Every metric in a line of a Markdown table, the registry's first."""
    lines = [_HEAD, ("-",) * len(_HEAD)]
    for metric in METRICS:
        text = DESCRIPTIONS[metric.name]
        needs = sorted(metric.needs, key=list(Need).index)
        direction = f"{metric.direction}{' (LOW end)' if metric.lowest else ''}"
        sampling = text.sampled or "; ".join(dict.fromkeys(SAMPLING[n] for n in needs))
        names = ", ".join(n.value for n in needs)
        row: tuple[str, ...] = (
            metric.name,
            metric.about,
            text.what,
            f"`{text.formula}`",
            text.range,
            direction,
            names,
        )
        lines.append((*row, text.cost, sampling, metric.source))
    for name, line in GRADIENT_DESCRIPTIONS.items():
        row = (name, line.about, line.what, f"`{line.formula}`", line.range, line.direction, "gradients")
        lines.append((*row, line.cost, line.sampled, line.source))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
