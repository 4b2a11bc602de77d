"""From candidates to the one that is returned: built, timed, revised, and scored on data nobody looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Executable
from lamina.backends.measure import Ratio
from lamina.errors import InfeasibleBudget
from lamina.ir.io import serialized_size
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
# A latency bound must hold when somebody measures again: 1.5 % is what repeated medians differ by here.
MARGIN = 0.985


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
    _memory: dict[Genome | None, int] = field(default_factory=dict)

    @property
    def original_size(self) -> int:
        """Bytes of the original's file."""
        return serialized_size(self.request.program.model)

    @property
    def original_latency_s(self) -> float:
        """Weighted mean latency of the original, seconds."""
        seconds = self.stopwatch.baseline_s
        return sum(c.weight * s for c, s in zip(self.request.workload, seconds, strict=True))

    def original_memory(self) -> int:
        """Peak resident bytes of the original on the heaviest case."""
        return self._peak(None, self.request.program.model)

    def memory(self, finalist: Finalist) -> int:
        """Peak resident bytes of a finished model on the heaviest case."""
        return self._peak(finalist.candidate.genome, finalist.realized.program.model)

    def _peak(self, key: Genome | None, model: ir.Model) -> int:
        if key not in self._memory:
            request = self.request
            heaviest = max(request.workload, key=lambda c: sum(a.size for a in c.feeds.values()))
            path = self.stopwatch.write(model)
            self._memory[key] = request.backend.peak_memory(path, request.target, heaviest)
        return self._memory[key]

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


def choose(request: Request, builder: Builder, candidates: Sequence[Candidate], goal: Goal) -> Verdict:
    """The best finalist that holds every bound as measured, its damage on report data included.

    When the best one does not hold the drop bound on report data, the next one looked at is clearly more
    faithful on selection data; every look is counted and told.

    Raises:
        InfeasibleBudget: None does; carries the nearest plans.
    """
    allowed = goal.allowed_damage
    finalists = [f for f in shortlist(builder, candidates, goal) if affordable(request, builder, f)]
    original = _Features(request)
    limit, failed = float("inf"), None
    for looks in range(1, LOOKS + 1):
        finalist = _next(request, builder, candidates, goal, finalists, limit)
        if finalist is None:
            break
        verdict = original.judge(finalist, looks)
        if verdict.damage <= allowed:
            return verdict
        failed = verdict
        limit = 0.6 * finalist.candidate.score.bound(goal.caution)
    nothing = builder.prepared.costs.space.nothing
    unchanged = next((c for c in candidates if c.genome == nothing), None)
    if unchanged is not None and unchanged.feasible(goal):
        (finalist,) = builder.finish([unchanged], seconds=3.0)
        if affordable(request, builder, finalist):
            return original.judge(finalist, LOOKS)
        if not request.budget.costs:  # nothing measured faster: the model as it was given holds any drop
            return original.judge(as_given(request, builder, unchanged), LOOKS)
    raise infeasible(request, builder, candidates, goal, failed)


def as_given(request: Request, builder: Builder, unchanged: Candidate) -> Finalist:
    """The captured model itself, not even folded."""
    plan = replace(builder.prepared.plan, folds=(), moves=())
    same = {case.name: Ratio(1.0, 1.0, 1.0) for case in request.workload}
    return Finalist(unchanged, Realized(request.program, plan), Relative(1.0, 1.0, 1.0, same))


def _next(
    request: Request,
    builder: Builder,
    candidates: Sequence[Candidate],
    goal: Goal,
    finalists: Sequence[Finalist],
    limit: float,
) -> Finalist | None:
    """The best finalist whose selection damage is below ``limit``; more are built when none is left."""
    fit = [f for f in finalists if f.candidate.score.bound(goal.caution) < limit]
    if not fit and np.isfinite(limit):
        costs = builder.prepared.costs
        faithful = [c for c in candidates if c.feasible(goal) and c.score.bound(goal.caution) < limit]
        faithful.sort(key=lambda c: _predicted(c, costs.predict(c.genome), goal))
        built = builder.finish(faithful[:2], seconds=4.0)
        fit = sorted((f for f in built if affordable(request, builder, f)), key=lambda f: _measured(f, goal))
    return fit[0] if fit else None


def affordable(request: Request, builder: Builder, finalist: Finalist) -> bool:
    """Whether every cost bound holds as measured on the finished model.

    A model slower than the original on some case is never affordable where latency counts.
    """
    budget, relative = request.budget, finalist.relative
    model = finalist.realized.program.model
    if (request.minimize == "latency" or budget.latency is not None) and relative.slower_somewhere:
        return False
    for bound in budget.costs:
        if bound.axis == "latency":
            scale = 1.0 if bound.relative else 1.0 / builder.original_latency_s
            if relative.ratio > bound.value * scale * MARGIN:
                return False
        elif bound.axis == "size":
            if serialized_size(model) > bound.limit(builder.original_size):
                return False
        elif bound.axis == "memory":
            if builder.memory(finalist) > bound.limit(builder.original_memory()):
                return False
        elif finalist.candidate.predicted["flops"] > bound.limit(builder.prepared.original_cost.flops):
            return False
    return True


class _Features:
    """Scores finished models on report data, the original's features computed once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.original = request.backend.compile(request.program.model, request.target)
        self.features = self._run(self.original)

    def _run(self, executable: Executable) -> np.ndarray:
        request = self.request
        reference = self.original.run if request.metric.kind == "divergence" else None
        return evaluate(executable.run, request.splits.report, request.metric, reference_run=reference)

    def judge(self, finalist: Finalist, looks: int) -> Verdict:
        """Score a finished model in a fresh session on the target."""
        request, metric = self.request, self.request.metric
        executable = request.backend.compile(finalist.realized.program.model, request.target)
        after = self._run(executable)
        before, value = metric.score(self.features), metric.score(after)
        interval = damage_interval(metric, self.features, after, seed=request.seed)
        return Verdict(finalist, before, value, metric.damage(before, value), interval, looks)


def infeasible(
    request: Request,
    builder: Builder,
    candidates: Sequence[Candidate],
    goal: Goal,
    failed: Verdict | None,
) -> InfeasibleBudget:
    """The error that names what came nearest and what budget each nearest plan would meet."""
    costs = builder.prepared.costs
    nearest = []
    ranked = sorted(candidates, key=lambda c: (costs.predict(c.genome)["latency"], c.score.damage))
    inside = [c for c in ranked if c.score.bound(goal.caution) <= goal.allowed_damage]
    for candidate in {c.genome: c for c in (*ranked[:1], *inside[:1])}.values():
        predicted = costs.predict(candidate.genome)
        measured = builder.done.get(candidate.genome)
        ratio = measured.relative.ratio if measured else predicted["latency"]
        nearest.append(
            {
                "latency_ratio": ratio,
                "latency_measured": measured is not None,
                "size_bytes": predicted["size"],
                "damage": candidate.score.damage,
                "moves": sum(1 for g in candidate.genome if g),
                "would_meet": f"latency<={ratio * 1.03:.2f}x, size<={predicted['size'] * 1.01 / 1e6:.2f}MB, "
                f"drop<={max(candidate.score.bound(goal.caution), 0) * 100 + 0.05:.2f}%",
            }
        )
    report = "" if failed is None else f"; the best plan lost {failed.damage * 100:.2f} % on report data"
    return InfeasibleBudget(
        f"no plan meets '{request.budget}'{report}",
        nearest=nearest,
        advice="nearest: " + " | ".join(str(n["would_meet"]) for n in nearest),
    )
