"""From what was measured to one row a metric and kind of change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.studies.metric_trust.ranking import LEAST_SITES, interval, overlap, paired, spearman
from tools.studies.metric_trust.ratings import ALL, FEW, HALVES, few_name
from tools.studies.metric_trust.truth import KINDS

Json = Mapping[str, Any]
# A difference between two metrics counts from so much mean rank correlation, in so many of the models.
LEAST_GAP, LEAST_SHARE = 0.05, 2 / 3


@dataclass
class Row:
    """One metric against one kind of change; each mapping is model -> value.

    Attributes:
        metric: Its name.
        kind: The change.
        rho: Rank correlation with the damage measured on report data.
        interval: Its 95 % bootstrap interval over sites.
        overlap: Share of the least harmful quarter that it names.
        cost: In plain runs over the calibration data.
        seconds: CPU, one thread.
        stability: Rank correlation of its values on two halves of its data.
        samples: How many it read.
    """

    metric: str
    kind: str
    rho: dict[str, float] = field(default_factory=dict)
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    overlap: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stability: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean rank correlation over the models."""
        return mean(self.rho.values())


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN without any."""
    found = [v for v in values if np.isfinite(v)]
    return float(np.mean(found)) if found else float("nan")


def median(values: Iterable[float]) -> float:
    """Of the finite ones; NaN without any."""
    found = [v for v in values if np.isfinite(v)]
    return float(np.median(found)) if found else float("nan")


def rows_of(results: Sequence[Json]) -> dict[tuple[str, str], Row]:
    """(metric, kind) -> row, over the models with at least :data:`LEAST_SITES` sites that can be ranked."""
    rows: dict[tuple[str, str], Row] = {}
    for result in results:
        for rating in result["ratings"]:
            for kind in rating["truths"]:
                if kind not in result["truths"]:
                    continue
                pair = paired(rating["values"][ALL], result["truths"][kind]["divergence"])
                if pair is None:
                    continue
                name, model = rating["metric"], result["model"]
                row = rows.setdefault((name, kind), Row(name, kind))
                row.rho[model] = spearman(*pair)
                row.interval[model] = interval(*pair)
                row.overlap[model] = overlap(*pair)
                row.seconds[model] = rating["seconds"]
                row.cost[model] = rating["seconds"] / max(result["plain_run_s"], 1e-9)
                row.samples[model] = rating["samples"]
                halves = _halves(rating["values"])
                if halves is not None:
                    row.stability[model] = halves
    return rows


def _halves(values: Mapping[str, Mapping[str, float]]) -> float | None:
    if not all(part in values for part in HALVES):
        return None
    pair = paired(values[HALVES[0]], values[HALVES[1]])
    return None if pair is None else spearman(*pair)


def agreement(result: Json, kind: str) -> float:
    """Rank correlation of the truth on two halves of the report data; NaN for too few sites."""
    first, second = result["truths"][kind]["halves"]
    pair = paired(first, second)
    return float("nan") if pair is None else spearman(*pair)


def with_task(result: Json, kind: str) -> float:
    """Rank correlation of output divergence with damage on the task; NaN without a task."""
    truth = result["truths"][kind]
    pair = paired(truth["divergence"], truth["task"]) if truth["task"] else None
    return float("nan") if pair is None else spearman(*pair)


@dataclass(frozen=True)
class Duel:
    """Two metrics on the models both rate: mean difference of rank correlation, models won, models."""

    gap: float
    won: int
    models: int

    @property
    def verdict(self) -> int:
        """1: the first is better; -1: the second is; 0: undecided."""
        if not self.models or abs(self.gap) < LEAST_GAP:
            return 0
        if self.gap > 0:
            return int(self.won >= LEAST_SHARE * self.models)
        return -int(self.models - self.won >= LEAST_SHARE * self.models)


def duel(rows: Mapping[tuple[str, str], Row], first: str, second: str, kinds: Sequence[str]) -> Duel:
    """Compare two metrics, model by model; over several kinds each model's mean over them counts."""
    gaps: dict[str, list[float]] = {}
    for kind in kinds:
        a, b = rows.get((first, kind)), rows.get((second, kind))
        if a is None or b is None:
            continue
        for model in a.rho:
            if model in b.rho:
                gaps.setdefault(model, []).append(a.rho[model] - b.rho[model])
    each = [float(np.mean(found)) for found in gaps.values()]
    return Duel(mean(each), sum(g > 0 for g in each), len(each))


def compared(rows: Mapping[tuple[str, str], Row], kind: str) -> list[str]:
    """The models on which damage was measured with the most samples, if there are some; else all."""
    most = rows.get((few_name(FEW[-1]), kind))
    if most is not None and most.rho:
        return list(most.rho)
    return list(dict.fromkeys(m for (_, k), row in rows.items() if k == kind for m in row.rho))


def best(rows: Mapping[tuple[str, str], Row], kind: str, models: Sequence[str]) -> list[Row]:
    """The rows of a kind that rate all of the models, best mean rank correlation over these first."""
    found = [row for (_, k), row in rows.items() if k == kind and all(m in row.rho for m in models)]
    return sorted(found, key=lambda row: -mean(row.rho[m] for m in models))


def plain(results: Sequence[Json]) -> dict[str, Any]:
    """The rows and the truth's own agreement as JSON holds them."""
    return {
        "least_sites": LEAST_SITES,
        "rows": [{**vars(row), "mean_rho": row.mean} for row in rows_of(results).values()],
        "truth": {
            r["model"]: {
                kind: {
                    "agreement_of_halves": agreement(r, kind),
                    "with_task": with_task(r, kind),
                    "sites": r["truths"][kind]["sites"],
                    "samples": r["truths"][kind]["samples"],
                    "metric": r["truths"][kind]["metric"],
                }
                for kind in KINDS
                if kind in r["truths"]
            }
            for r in results
        },
    }
