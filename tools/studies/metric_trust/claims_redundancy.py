"""Group 1 of METHODS.md: what can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.studies.metric_trust.claim import (
    EARLIER,
    FAILS,
    LARGER,
    NOT_TESTED,
    REPRODUCES,
    UNDECIDED,
    VERDICTS,
    Claim,
    Rows,
    duel_text,
    each_text,
    ranks_verdict,
    rho_text,
    second_half,
    share_verdict,
)
from tools.studies.metric_trust.ranking import LEAST_SITES
from tools.studies.metric_trust.summary import Json, median


def _block_influence(results: Sequence[Json], rows: Rows) -> Claim:
    name = "block-influence"
    others = ("relative-contribution", EARLIER, LARGER)
    duels = [duel_text(rows, name, other, ["drop"]) for other in others]
    verdicts = [d.verdict for d, _ in duels]
    if all(v > 0 for v in verdicts):
        verdict = REPRODUCES
    else:
        verdict = FAILS if any(v < 0 for v in verdicts) else UNDECIDED
    _, measured = duel_text(rows, name, "skip-effect", ["drop"])
    found = (
        f"Rank correlation with drop damage {rho_text(rows, name, 'drop')}; "
        f"{'; '.join(t for _, t in duels)}. Of what changes the model, {measured}."
    )
    return Claim(name, 'drops by it "significantly" outperform earlier pruning methods', verdict, found)


def _angular(results: Sequence[Json], rows: Rows) -> Claim:
    ratios = second_half(results, lambda r: r["truths"]["drop"]["divergence"])
    late = [v < 1 for v in ratios.values()]
    verdict = share_verdict(late)
    found = (
        f"In transformers, damage of dropping a branch of the second half over that of the first, medians: "
        f"{each_text(ratios)}. Over all models "
        f"angular-distance ranks drops with {rho_text(rows, 'angular-distance', 'drop')}; that earlier is "
        f"worse, with {rho_text(rows, EARLIER, 'drop')}."
    )
    return Claim("angular-distance", "deeper layers are the ones that can go", verdict, found)


def _branch_similarity(results: Sequence[Json], rows: Rows) -> Claim:
    ratios = {}
    for result in results:
        damage = result["truths"].get("drop", {}).get("divergence", {})
        kinds = {kind: _of_kind(result, damage, kind) for kind in _BOTH}
        if all(kinds.values()):
            ratios[result["model"]] = median(kinds["attention"]) / median(kinds["mlp"])
    found = (
        f"Median damage of an attention branch over that of an MLP: {each_text(ratios)}. As a ranking it is "
        f"block-influence turned round: {rho_text(rows, 'branch-similarity', 'drop')}."
    )
    return Claim(
        "branch-similarity",
        "attention is what transformers need least",
        share_verdict([v < 1 for v in ratios.values()]),
        found,
    )


def _of_kind(result: Json, damage: Mapping[str, float], kind: str) -> list[float]:
    return [damage[name] for name, k in result["branches"] if k == kind and name in damage]


_BOTH = ("attention", "mlp")


def _relative_contribution(results: Sequence[Json], rows: Rows) -> Claim:
    ratios = second_half(results, lambda r: r["facts"].get("contribution", {}))
    found = (
        f"In transformers, contribution of the second half over the first, medians: {each_text(ratios)}. "
        f"As a ranking of drops: {rho_text(rows, 'relative-contribution', 'drop')}."
    )
    return Claim(
        "relative-contribution",
        'the second half contributes "much less" (here: half as much)',
        share_verdict([v <= 0.5 for v in ratios.values()]),
        found,
    )


def _void_rate(results: Sequence[Json], rows: Rows) -> Claim:
    found = f"Rank correlation with drop damage {rho_text(rows, 'void-rate', 'drop')}."
    return Claim(
        "void-rate",
        "branches that hardly lengthen tokens can go",
        ranks_verdict(rows, "void-rate", "drop"),
        found,
    )


def _entropy(results: Sequence[Json], rows: Rows) -> Claim:
    found, text = duel_text(rows, "entropy-increase", "block-influence", ["drop"])
    what = f"Rank correlation with drop damage {rho_text(rows, 'entropy-increase', 'drop')}; {text}."
    return Claim(
        "entropy-increase", '"surpasses cosine similarity-based methods"', VERDICTS[found.verdict], what
    )


def _direct_matching(results: Sequence[Json], rows: Rows) -> Claim:
    _, text = duel_text(rows, "direct-matching", "linear-cka", ["drop"])
    found = (
        "Maps fitted on the task loss, which the paper warns of, are not made here. As a ranking of drops: "
        f"{rho_text(rows, 'direct-matching', 'drop')}; {text}. It says what an affine map cannot make: "
        "what a replaced branch loses, not what a dropped one does."
    )
    return Claim("direct-matching", "a linear fit compares layers faithfully", NOT_TESTED, found)


def _linear_cka(results: Sequence[Json], rows: Rows) -> Claim:
    better, text = duel_text(rows, "linear-cka", "block-influence", ["drop"])
    found = f"Rank correlation with drop damage {rho_text(rows, 'linear-cka', 'drop')}; {text}."
    return Claim("linear-cka", "not to be the sole score for drops", VERDICTS[-better.verdict], found)


def _representation(results: Sequence[Json], rows: Rows) -> Claim:
    places = {}
    for result in results:
        values = [v for v in result["facts"].get("quality", {}).values() if np.isfinite(v)]
        if not any(kind == "attention" for _, kind in result["branches"]):
            continue
        if len(values) >= LEAST_SITES:
            places[result["model"]] = float(np.argmax(values)) / (len(values) - 1)
    inside = [0.2 <= p <= 0.8 for p in places.values()]
    found = (
        f"Depth of the greatest token entropy in transformers (0 first, 1 last): {each_text(places)}. "
        "Whether that depth is better for a task is not measured. As a ranking of drops: "
        f"{rho_text(rows, 'representation-quality', 'drop')}."
    )
    return Claim("representation-quality", "middle depths are the richest", share_verdict(inside), found)


def _attention_rank(results: Sequence[Json], rows: Rows) -> Claim:
    name = "attention-rank"
    found = f"Among attention branches, with drop damage: {rho_text(rows, name, 'drop')}."
    return Claim(name, "attention of low rank can go", ranks_verdict(rows, name, "drop"), found)


def _local_rank(results: Sequence[Json], rows: Rows) -> Claim:
    return Claim(
        "local-rank", "rank of the input Jacobian falls late in training", NOT_TESTED, "lamina has none."
    )


CLAIMS = (
    _block_influence,
    _angular,
    _branch_similarity,
    _relative_contribution,
    _void_rate,
    _entropy,
    _direct_matching,
    _linear_cka,
    _representation,
    _attention_rank,
    _local_rank,
)
