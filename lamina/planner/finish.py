"""From candidates to the one that is returned: built, timed, revised, and scored on data nobody looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lamina.errors import InfeasibleBudget
from lamina.planner.costs import fit_scales
from lamina.planner.prepare import Prepared, build
from lamina.planner.realize import Realized
from lamina.planner.request import Request
from lamina.planner.search import Candidate, Goal
from lamina.planner.space import Genome
from lamina.planner.timing import Relative, Stopwatch
from lamina.quality import damage_interval, evaluate

# Models built and timed in each of the rounds of "time the best, correct the prices, look again".
BUILDS = 4
ROUNDS = 3
LOOKS = 5


@dataclass(frozen=True)
class Finalist:
    """A candidate as a finished model, with what was measured of it.

    Attributes:
        candidate: Genome, prediction and selection score.
        realized: The finished program and its plan.
        relative: Latency against the original.
    """

    candidate: Candidate
    realized: Realized
    relative: Relative


@dataclass(frozen=True)
class Verdict:
    """A finalist on report data.

    Attributes:
        finalist: What was scored.
        original: Metric of the original on report data.
        optimized: Metric of the finalist.
        damage: How much worse, in the budget's unit.
        interval: 95 % interval of ``damage``, or None where the metric has no per-sample parts.
        looks: How many finalists were scored on report data before one held the budget.
    """

    finalist: Finalist
    original: float
    optimized: float
    damage: float
    interval: tuple[float, float] | None
    looks: int = 1


@dataclass
class Builder:
    """Builds and times candidates once each."""

    request: Request
    prepared: Prepared
    stopwatch: Stopwatch
    done: dict[Genome, Finalist] = field(default_factory=dict)

    def finish(self, candidates: Sequence[Candidate], *, seconds: float) -> list[Finalist]:
        """Finished and timed; those seen before are not built again."""
        new = [c for c in candidates if c.genome not in self.done]
        realized = [build(self.request, self.prepared, c.genome, recalibrate=True) for c in new]
        if new:
            times = self.stopwatch.compare([r.program.model for r in realized], seconds=seconds)
            for candidate, made, relative in zip(new, realized, times, strict=True):
                self.done[candidate.genome] = Finalist(candidate, made, relative)
                self.prepared.whole[candidate.genome] = relative.ratio
        return [self.done[c.genome] for c in candidates]


def shortlist(builder: Builder, candidates: Sequence[Candidate], goal: Goal) -> list[Finalist]:
    """Time the best predicted candidates, correct the prices by what was seen, look again.

    Args:
        builder: Builds and times.
        candidates: Measured on selection data.
        goal: What the search was after.

    Returns:
        Finalists, best measured first.
    """
    costs = builder.prepared.costs
    feasible = [c for c in candidates if c.feasible(goal)]
    for _ in range(ROUNDS):
        fresh = sorted(feasible, key=lambda c: _predicted(c, costs.predict(c.genome), goal))
        builder.finish(fresh[:BUILDS], seconds=1.5 * (BUILDS + 1))
        before = dict(costs.scale)
        fit_scales(costs, builder.prepared.whole)
        if before == costs.scale or all(c.genome in builder.done for c in feasible):
            break
    return sorted(builder.done.values(), key=lambda f: _measured(f, goal))


def _predicted(candidate: Candidate, predicted: dict[str, float], goal: Goal) -> float:
    return candidate.objective(goal) if goal.minimize == "damage" else predicted[goal.minimize]


def _measured(finalist: Finalist, goal: Goal) -> float:
    if goal.minimize == "latency":
        return finalist.relative.ratio
    return finalist.candidate.objective(goal)


def judge(request: Request, finalist: Finalist, features: np.ndarray) -> Verdict:
    """Score a finished model on report data.

    Args:
        request: Metric, report data, backend.
        finalist: Built model.
        features: The original's features on report data.
    """
    metric, report = request.metric, request.splits.report
    after = report_features(request, finalist.realized.program.model)
    original, optimized = metric.score(features), metric.score(after)
    interval = damage_interval(metric, features, after, seed=request.seed)
    return Verdict(finalist, original, optimized, metric.damage(original, optimized), interval)


def report_features(request: Request, model: object) -> np.ndarray:
    """Features of a model on report data, run by the target's own backend in a fresh session."""
    raise NotImplementedError
