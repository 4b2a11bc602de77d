"""A paper's claim, and the words and rules its paragraphs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.studies.metric_trust.ranking import LEAST_SITES
from tools.studies.metric_trust.ratings import BASELINES
from tools.studies.metric_trust.summary import Duel, Json, Row, duel, median
from tools.studies.metric_trust.truth import WIDTHS

Rows = Mapping[tuple[str, str], Row]
WEIGHTS = tuple(f"w{bits}" for bits in WIDTHS)
EARLIER, LARGER = BASELINES
REPRODUCES, FAILS, UNDECIDED = "reproduces", "does not reproduce", "undecided"
NOT_TESTED = "not tested"
VERDICTS = {1: REPRODUCES, -1: FAILS, 0: UNDECIDED}
# Below this mean rank correlation a metric that claims to rank does not.
LEAST_TRUST = 0.3


@dataclass(frozen=True)
class Claim:
    """One paragraph.

    Attributes:
        name: Id of METHODS.md.
        said: What the paper says, or what the id is for.
        verdict: One of the words above.
        found: What was measured, in sentences.
    """

    name: str
    said: str
    verdict: str
    found: str


def rho_text(rows: Rows, metric: str, kind: str) -> str:
    """Mean rank correlation, its spread over models, and how many."""
    row = rows.get((metric, kind))
    if row is None or not row.rho:
        return "no model"
    low, high = min(row.rho.values()), max(row.rho.values())
    return f"{row.mean:.2f} ({low:.2f} to {high:.2f}, {models_text(len(row.rho))})"


def models_text(count: int) -> str:
    """So many models."""
    return f"{count} model{'s' * (count != 1)}"


def duel_text(rows: Rows, first: str, second: str, kinds: Sequence[str]) -> tuple[Duel, str]:
    """Two metrics compared, and that in words."""
    found = duel(rows, first, second, kinds)
    if not found.models:
        return found, f"no model rated by {second} too"
    text = f"against {second} {found.gap:+.2f}, better on {found.won} of {found.models}"
    return found, text


def ranks_verdict(rows: Rows, metric: str, kind: str) -> str:
    """Verdict of a metric whose claim is that it ranks."""
    row = rows.get((metric, kind))
    if row is None or not row.rho:
        return NOT_TESTED
    good = [r >= LEAST_TRUST for r in row.rho.values()]
    if row.mean >= LEAST_TRUST and np.mean(good) >= 2 / 3:
        return REPRODUCES
    return FAILS if row.mean < LEAST_TRUST else UNDECIDED


def second_half(results: Sequence[Json], values: Callable[[Json], Mapping[str, float]]) -> dict[str, float]:
    """Transformer (the papers speak of these) -> median of its later branches over that of the earlier."""
    found = {}
    for result in results:
        kinds = {kind for _, kind in result["branches"]}
        if "drop" not in result["truths"] or "attention" not in kinds:
            continue
        known = values(result)
        ordered = [known[n] for n, _ in result["branches"] if n in known and np.isfinite(known[n])]
        if len(ordered) >= LEAST_SITES:
            middle = len(ordered) // 2
            found[result["model"]] = median(ordered[-middle:]) / max(median(ordered[:middle]), 1e-300)
    return found


def share_verdict(good: Sequence[bool]) -> str:
    """Reproduces in two thirds of the models, or not in two thirds, or undecided."""
    if not good:
        return NOT_TESTED
    share = float(np.mean(good))
    return REPRODUCES if share >= 2 / 3 else FAILS if share <= 1 / 3 else UNDECIDED


def each_text(values: Mapping[str, float]) -> str:
    """Every model with its number."""
    return ", ".join(f"{model} {value:.2f}" for model, value in values.items()) or "no model"
