"""Group 2 of METHODS.md: what wants bits or must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.studies.metric_trust.claim import (
    EARLIER,
    FAILS,
    LEAST_TRUST,
    NOT_TESTED,
    REPRODUCES,
    UNDECIDED,
    VERDICTS,
    WEIGHTS,
    Claim,
    Rows,
    duel_text,
    each_text,
    models_text,
    ranks_verdict,
    rho_text,
    second_half,
    share_verdict,
)
from tools.studies.metric_trust.ranking import LEAST_SITES
from tools.studies.metric_trust.ratings import ALL, OWN_OUTPUT, few_name
from tools.studies.metric_trust.summary import Json, median


def _lim(results: Sequence[Json], rows: Rows) -> Claim:
    name = "layer-input-modification"
    texts = [f"{k} {rho_text(rows, name, k)}" for k in WEIGHTS]
    verdicts = [ranks_verdict(rows, name, k) for k in WEIGHTS]
    best, text = duel_text(rows, name, EARLIER, WEIGHTS)
    verdict = REPRODUCES if verdicts.count(REPRODUCES) == len(WEIGHTS) else FAILS
    verdict = UNDECIDED if verdict == FAILS and REPRODUCES in verdicts and best.verdict >= 0 else verdict
    found = f"Operators rated as the branch they are in: {'; '.join(texts)}; {text}."
    return Claim(name, "layers that change their input most want bits", verdict, found)


def _outliers(results: Sequence[Json], rows: Rows) -> Claim:
    name = "outlier-weight-count"
    texts = [f"{k} {rho_text(rows, name, k)}" for k in WEIGHTS]
    verdicts = [ranks_verdict(rows, name, k) for k in WEIGHTS]
    verdict = REPRODUCES if verdicts.count(REPRODUCES) == len(WEIGHTS) else FAILS
    found = f"With the paper's sign (few outliers: important): {'; '.join(texts)}."
    return Claim(name, "layers with FEW weights past one deviation want bits", verdict, found)


def _skip_effect(results: Sequence[Json], rows: Rows) -> Claim:
    _, text = duel_text(rows, "skip-effect", "relative-contribution", ["drop"])
    ratios = second_half(results, _skips)
    what = (
        f"In transformers, effect on later depths of skipping a branch of the second half over the first: "
        f"{each_text(ratios)}. As a ranking of drops: {rho_text(rows, 'skip-effect', 'drop')}; {text}."
    )
    return Claim(
        "skip-effect",
        "the second half hardly matters to later ones",
        share_verdict([v <= 0.5 for v in ratios.values()]),
        what,
    )


def _skips(result: Json) -> Mapping[str, float]:
    for rating in result["ratings"]:
        if rating["metric"] == "skip-effect":
            values: Mapping[str, float] = rating["values"][ALL]
            return values
    return {}


def _output_kl(results: Sequence[Json], rows: Rows) -> Claim:
    kinds = ("drop", *WEIGHTS, "w8a8")
    texts = []
    for count in (1, 4, 16, 64):
        known = [rows[few_name(count), k] for k in kinds if (few_name(count), k) in rows]
        if known:
            each = ", ".join(f"{row.kind} {row.mean:.2f}" for row in known)
            most = max(len(row.rho) for row in known)
            texts.append(f"{count} sample{'s' * (count > 1)} ({models_text(most)}): {each}")
    found = f"On calibration samples against report samples: {'; '.join(texts)}."
    return Claim("output-kl", "the default score: what others are judged by", NOT_TESTED, found)


def _gradient_trace(results: Sequence[Json], rows: Rows) -> Claim:
    name, few = "gradient-trace", few_name(4)
    duels = [duel_text(rows, name, few, [kind]) for kind in ("drop", "w4")]
    costs = [median(rows[n, "drop"].cost.values()) for n in (name, few) if (n, "drop") in rows]
    dear = f" It costs {costs[0]:.1f} plain runs, that {costs[1]:.1f}." if len(costs) == 2 else ""
    found = (
        f"drop {rho_text(rows, name, 'drop')}; w4 {rho_text(rows, name, 'w4')}. On drops "
        f"{duels[0][1]}; on w4 {duels[1][1]}.{dear}"
    )
    verdicts = {ranks_verdict(rows, name, kind) for kind in ("drop", "w4")}
    verdict = verdicts.pop() if len(verdicts) == 1 else UNDECIDED
    return Claim(name, "gradients that stay alike mark the better candidate", verdict, found)


def _interlayer(results: Sequence[Json], rows: Rows) -> Claim:
    shares: dict[str, dict[str, float]] = {"drop": {}, "w4": {}}
    for result in results:
        for kind, pairs in result["facts"]["pairs"].items():
            if pairs:
                shares[kind][result["model"]] = median(abs(b - a) / a for a, b in pairs if a > 0)
    hawq = rows.get(("hawq-trace", "w4"))
    weak = hawq is not None and hawq.mean < LEAST_TRUST
    found = (
        "It rates pairs, so it has no rank here. Median size of the pairwise term over the sum of the two "
        f"damages, most suspicious pairs: drops {each_text(shares['drop'])}; w4 {each_text(shares['w4'])}. "
        f"The Hessian alone (hawq-trace) orders w4 with {rho_text(rows, 'hawq-trace', 'w4')}."
    )
    verdict = NOT_TESTED if hawq is None else REPRODUCES if weak else FAILS
    return Claim(
        "hessian-interlayer", "the Hessian alone is typically insufficient to order layers", verdict, found
    )


def _hawq(results: Sequence[Json], rows: Rows) -> Claim:
    found, text = duel_text(rows, "hawq-trace", OWN_OUTPUT, WEIGHTS)
    _, few = duel_text(rows, "hawq-trace", few_name(16), WEIGHTS)
    texts = [f"{k} {rho_text(rows, 'hawq-trace', k)}" for k in WEIGHTS]
    what = f"{'; '.join(texts)}. Over the widths {text}; {few}."
    return Claim("hawq-trace", "curvature says more than rounding error alone", VERDICTS[found.verdict], what)


def _fisher(results: Sequence[Json], rows: Rows) -> Claim:
    _, text = duel_text(rows, "fisher-diagonal", "hawq-trace", WEIGHTS)
    texts = [f"{k} {rho_text(rows, 'fisher-diagonal', k)}" for k in WEIGHTS]
    found = f"Healing by it is not tried. As a rank of bits: {'; '.join(texts)}; {text}."
    return Claim("fisher-diagonal", "says which layers to tune", NOT_TESTED, found)


def _lieq(results: Sequence[Json], rows: Rows) -> Claim:
    name = "lieq-diagnostics"
    texts = [f"{k} {rho_text(rows, name, k)}" for k in ("drop", *WEIGHTS)]
    verdicts = [ranks_verdict(rows, name, k) for k in WEIGHTS]
    verdict = REPRODUCES if verdicts.count(REPRODUCES) == len(WEIGHTS) else FAILS
    found = f"Without its measured term, which would be the truth itself: {'; '.join(texts)}."
    return Claim(name, "its layer scores say where bits are needed", verdict, found)


def _risk(results: Sequence[Json], rows: Rows) -> Claim:
    each, good = [], []
    for result in results:
        risk = result["facts"].get("risk")
        if not risk or risk["examples"] < LEAST_SITES:
            continue
        values = [v for v in risk["branches"].values() if np.isfinite(v)]
        late = values[len(values) // 2 :]
        if late:
            strongest, chance = max(late, key=abs), 1 / np.sqrt(risk["examples"] - 1)
            each.append(
                f"{result['model']} {strongest:+.2f} (chance {chance:.2f}, {risk['examples']} examples)"
            )
            good.append(abs(strongest) >= 3 * chance)
    found = (
        "Strongest rank correlation, over the second half of the depths, of an example's length with its "
        f"loss in 4 bits: {', '.join(each) or 'no model'}. Chance: one standard deviation of a single depth."
    )
    return Claim(
        "residual-norm-risk", "length at late layers tells which inputs break", share_verdict(good), found
    )


CLAIMS = (
    _lim,
    _outliers,
    _skip_effect,
    _output_kl,
    _gradient_trace,
    _interlayer,
    _hawq,
    _fisher,
    _lieq,
    _risk,
)
