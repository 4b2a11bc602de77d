"""Rules for which branches go first: each yields sets of branches, from one that changes little to more.

A rule is a plain function of :class:`lamina.planner.drop_evidence.DropEvidence`;
:func:`lamina.planner.drop_sets.drop_sets` runs one on a program and data, and
:func:`lamina.passes.drop_branch.apply_drops` applies a set. The planner measures the sets of every rule
(:mod:`lamina.planner.rule_seeds`), so that what it returns is no worse than the best of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lamina.analysis.metrics import METRICS
from lamina.errors import BudgetError
from lamina.planner.drop_evidence import (
    DropEvidence,
    Droppable,
    DropSet,
    Layer,
    Measure,
    layer_similarity,
    require,
)
from lamina.planner.knapsack import least_sum

RuleNeed = Literal["statistics", "damages", "divergence", "loss"]


@dataclass(frozen=True)
class Rule:
    """One way to choose branches.

    Attributes:
        name: The id of METHODS.md.
        source: Paper it is from.
        sets: Evidence -> sets of branches, each in the order they go.
        need: What it reads beyond names, kinds and order; None: no data at all.
    """

    name: str
    source: str
    sets: Callable[[DropEvidence], Iterator[DropSet]]
    need: RuleNeed | None = None

    @property
    def greedy(self) -> bool:
        """Whether every next set takes as many measurements as there are branches left."""
        return self.need in ("divergence", "loss")


# -- one branch at a time, by a score -----------------------------------------------------------------


def joint_branch_drop(evidence: DropEvidence) -> Iterator[DropSet]:
    """One list of all branches by ``E_t cos(x, x + f(x))``; the most similar go first.

    He et al. 2024, arXiv:2406.15786, "joint layer drop". Branches without a similarity (a skip of another
    shape) stay.
    """
    return _prefixes(_by_similarity(evidence, evidence.branches))


def attention_first(evidence: DropEvidence) -> Iterator[DropSet]:
    """Attention by similarity until none is left, then the rest by similarity. arXiv:2406.15786, sec. 3."""
    attention = [b for b in evidence.branches if b.kind == "attention"]
    others = [b for b in evidence.branches if b.kind != "attention"]
    ordered = _by_similarity(evidence, attention) + _by_similarity(evidence, others)
    return _prefixes(ordered) if attention else iter(())


def ranked(metric: str) -> Callable[[DropEvidence], Iterator[DropSet]]:
    """The rule that drops branches by a metric of :mod:`lamina.analysis.metrics`, most redundant first."""
    chosen = next(m for m in METRICS if m.name == metric)

    def sets(evidence: DropEvidence) -> Iterator[DropSet]:
        # branch metrics of one forward run read statistics alone
        values = chosen.rate(None, evidence.statistics())  # type: ignore[arg-type]
        names = [n for n in evidence.names if n in values and np.isfinite(values[n])]
        return _prefixes(sorted(names, key=lambda n: -chosen.redundancy(values[n])))

    return sets


def _by_similarity(evidence: DropEvidence, branches: Sequence[Droppable]) -> list[str]:
    seen = evidence.statistics().branches
    known = [b.name for b in branches if b.name in seen and np.isfinite(seen[b.name].influence)]
    return sorted(known, key=lambda name: seen[name].influence)


def _prefixes(names: Sequence[str]) -> Iterator[DropSet]:
    return (tuple(names[: k + 1]) for k in range(len(names)))


# -- one branch at a time, by measuring what is left --------------------------------------------------


def greedy_output_divergence(evidence: DropEvidence) -> Iterator[DropSet]:
    """Each step drops the branch without which the outputs diverge least from the original's.

    Every remaining branch is tried in every step: ``n (n + 1) / 2`` evaluations for all n branches. FinerCut,
    Zhang et al. 2024, arXiv:2405.18218.
    """
    return _greedy(evidence, require(evidence.divergence, "an output divergence", "greedy-output-divergence"))


def greedy_perplexity(evidence: DropEvidence) -> Iterator[DropSet]:
    """Each step drops the branch without which the calibration perplexity is lowest.

    Ordered by cross-entropy, its logarithm; of labels for classifiers. BlockPruner, Zhong et al. 2024,
    arXiv:2406.10594.
    """
    return _greedy(evidence, require(evidence.loss, "next tokens or labels", "greedy-perplexity"))


def _greedy(evidence: DropEvidence, measure: Measure) -> Iterator[DropSet]:
    parents = {b.name: b.parent for b in evidence.branches}
    chosen: DropSet = ()
    left = list(evidence.names)
    while left:
        values = np.asarray(measure([(*chosen, name) for name in left]), np.float64)
        values = np.where(np.isfinite(values), values, np.inf)
        best = left[int(np.argmin(values))]
        chosen = (*chosen, best)
        left = [n for n in left if n != best and not _inside(n, best, parents)]
        yield chosen


def _inside(name: str, outer: str, parents: dict[str, str | None]) -> bool:
    parent = parents[name]
    while parent is not None and parent != outer:
        parent = parents.get(parent)
    return parent == outer


# -- whole layers -------------------------------------------------------------------------------------


def contiguous_block_drop(evidence: DropEvidence) -> Iterator[DropSet]:
    """For each n the span of n layers whose end is at the least angle to its start.

    ``l* = argmin_l arccos(cos(x_l, x_{l+n})) / pi``, last token. Spans lie in one residual stream and keep
    its width; layers that cannot go whole end them. Gromov et al. 2024, arXiv:2403.17887. Deviates: no
    healing; a normalization behind the sums (post-norm) counts to the layer before the one it enters.
    """
    layers = evidence.layers
    angle = evidence.angles
    for count in range(1, len(layers) + 1):
        spans = []
        for first in range(len(layers) - count + 1):
            span = layers[first : first + count]
            if all(layer.whole for layer in span):
                value = angle(first, first + count - 1)
                spans += [(value, first)] if np.isfinite(value) else []
        if spans:
            _, first = min(spans)
            yield _names(layers[first : first + count])


def balanced_skip(evidence: DropEvidence) -> Iterator[DropSet]:
    """K evenly spaced interior layers, for every k; no data is read.

    Of m layers that may go, all but the first and the last of the network, those at ``(j + 1/2) m / k``.
    Unified layer skipping, Liu et al. 2024, arXiv:2404.06954 (index rule ours).
    """
    interior = [layer for layer in evidence.layers[1:-1] if layer.whole]
    for k in range(1, len(interior) + 1):
        yield _names([interior[int((j + 0.5) * len(interior) / k)] for j in range(k)])


def static_skip_map(evidence: DropEvidence) -> Iterator[DropSet]:
    """Layers by the similarity of what enters and leaves them, ``E_t cos(x_l, x_{l+1})``; highest first.

    Skip to the Good Part: one static map for all tasks, made for each model anew (measure derived).
    """
    return _layers_by_similarity(evidence, evidence.layers)


def subgraph_drop(evidence: DropEvidence) -> Iterator[DropSet]:
    """Layers of one residual stream (encoder, decoder, image tower) by their similarity, the others whole.

    Stream after stream; so sets of one stream grow, and the next stream begins anew. EfficientVLA, Yang et
    al. 2025, arXiv:2506.10100, which drops layers of the language model only.
    """
    streams = dict.fromkeys(layer.stream for layer in evidence.layers)
    if len(streams) > 1:
        for stream in streams:
            own = [layer for layer in evidence.layers if layer.stream == stream]
            yield from _layers_by_similarity(evidence, own)


def _layers_by_similarity(evidence: DropEvidence, layers: Sequence[Layer]) -> Iterator[DropSet]:
    similarity = layer_similarity(evidence.statistics(), layers)
    known = [layer for layer in layers if layer.whole and layer.name in similarity]
    known.sort(key=lambda layer: -similarity[layer.name])
    return (_names(known[: k + 1]) for k in range(len(known)))


def _names(layers: Sequence[Layer]) -> DropSet:
    return tuple(name for layer in layers for name in layer.branches)


# -- sums ---------------------------------------------------------------------------------------------


def additive_unet_drop(evidence: DropEvidence) -> Iterator[DropSet]:
    """For each of n ratios the branches with the least sum of single damages that save that share.

    ``min sum e_l s.t. sum saving_l >= ratio * total``: an exact knapsack (HiGHS). Only branches whose skip
    has the shape of their sum are offered, so what is concatenated across a U-Net keeps its shape. That
    damages add up is the rule's assumption; the planner measures its sets like any other. LAPTOP-Diff, Zhang
    et al. 2024, arXiv:2404.11098.
    """
    damages = evidence.damages()
    branches = [b for b in evidence.branches if np.isfinite(damages.get(b.name, np.nan))]
    # Where a branch goes its inner ones go too; what they save is in what it saves.
    index = {b.name: i for i, b in enumerate(branches)}
    nested = [(index[b.name], index[b.parent]) for b in branches if b.parent in index]
    harm = [max(damages[b.name], 0.0) for b in branches]
    saving = [max(b.saving, 0.0) for b in branches]
    total = sum(s for s, b in zip(saving, branches, strict=True) if b.parent not in index)
    last: DropSet = ()
    for step in range(1, len(branches) + 1):
        chosen = least_sum(harm, saving, total * step / len(branches) * (1 - 1e-9), nested)
        if chosen is None:
            return
        names = tuple(sorted((branches[i].name for i in chosen), key=lambda n: damages[n]))
        if names != last:
            yield names
        last = names


# A third party calls its own rule by handing its plans to the planner's `RuleSeeds`.
RULES: tuple[Rule, ...] = (
    Rule("joint-branch-drop", "He et al. 2024, arXiv:2406.15786", joint_branch_drop, "statistics"),
    Rule("attention-first", "He et al. 2024, arXiv:2406.15786", attention_first, "statistics"),
    Rule(
        "contiguous-block-drop",
        "Gromov et al. 2024, arXiv:2403.17887",
        contiguous_block_drop,
        "statistics",
    ),
    Rule("static-skip-map", "Skip to the Good Part", static_skip_map, "statistics"),
    Rule("balanced-skip", "Liu et al. 2024, arXiv:2404.06954", balanced_skip, None),
    Rule("subgraph-drop", "Yang et al. 2025, arXiv:2506.10100", subgraph_drop, "statistics"),
    Rule("relative-contribution", "Csordas et al. 2025", ranked("relative-contribution"), "statistics"),
    Rule(
        "additive-unet-drop",
        "Zhang et al. 2024, arXiv:2404.11098",
        additive_unet_drop,
        "damages",
    ),
    Rule(
        "greedy-output-divergence",
        "Zhang et al. 2024, arXiv:2405.18218",
        greedy_output_divergence,
        "divergence",
    ),
    Rule("greedy-perplexity", "Zhong et al. 2024, arXiv:2406.10594", greedy_perplexity, "loss"),
)


def rule_names() -> tuple[str, ...]:
    """Names of every rule."""
    return tuple(rule.name for rule in RULES)


def get_rule(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        BudgetError: There is none.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise BudgetError(f"there is no drop rule '{name}'", advice=f"choose from {', '.join(rule_names())}")
