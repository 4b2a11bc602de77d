"""What the planner's guesses are worth: a quarter of the sites measured, the rest placed by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lamina.planner.shortlist import fill, spread
from tools.studies.metric_trust.ranking import paired, spearman
from tools.studies.metric_trust.ratings import ALL, few_name
from tools.studies.metric_trust.summary import Json, mean
from tools.studies.metric_trust.truth import KINDS

DROPS, BITS = "block-influence", "quantization-error-w4"
MEASURED_SHARE, SAMPLES = 4, 16
COLUMNS = ("cheap metric", "a quarter measured", "all on 1 sample", "all on 16 samples")


def guesses(results: Sequence[Json]) -> dict[str, tuple[tuple[float, ...], int]]:
    """Kind -> mean rank correlation with the truth of each of :data:`COLUMNS`, and the models."""
    found = {}
    for kind in KINDS:
        rows = [row for row in (_of_model(result, kind) for result in results) if row is not None]
        if rows:
            found[kind] = tuple(mean(column) for column in zip(*rows, strict=True)), len(rows)
    return found


def _of_model(result: Json, kind: str) -> list[float] | None:
    cheap = _values(result, DROPS if kind == "drop" else BITS, kind)
    one, many = (_values(result, few_name(count), kind) for count in (1, SAMPLES))
    if cheap is None or one is None or many is None:
        return None
    truth = {n: v for n, v in result["truths"][kind]["divergence"].items() if n in cheap}
    guessed = from_quarter(cheap, {n: many[n] for n in truth})
    pairs = [paired(values, truth) for values in (cheap, guessed, one, many)]
    return None if any(p is None for p in pairs) else [spearman(*p) for p in pairs if p is not None]


def from_quarter(cheap: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Damages as the planner would guess them from a quarter of the measured ones (two at least)."""
    names = list(measured)
    order = sorted(range(len(names)), key=lambda i: cheap[names[i]])
    chosen = spread([order], max(2, len(names) // MEASURED_SHARE))
    known = {i: measured[names[i]] for i in chosen}
    known |= fill(order, known)
    return {name: known[i] for i, name in enumerate(names)}


def _values(result: Json, metric: str, kind: str) -> Mapping[str, float] | None:
    if kind not in result["truths"]:
        return None
    for rating in result["ratings"]:
        if rating["metric"] == metric and kind in rating["truths"]:
            values: Mapping[str, float] = rating["values"][ALL]
            return values
    return None
