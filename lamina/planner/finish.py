"""From candidates to the one that is returned: built, timed, revised, and scored on data nobody looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lamina.backends.measure import Ratio
from lamina.budget import FOOTPRINT
from lamina.errors import InfeasibleBudget
from lamina.ir.io import serialized_size
from lamina.planner.affordable import MARGIN, affordable
from lamina.planner.builder import Builder, Finalist
from lamina.planner.costs import fit_scales
from lamina.planner.goal import AIM
from lamina.planner.judge import Judge, Verdict
from lamina.planner.knapsack import solve
from lamina.planner.mend import mend_best, reach
from lamina.planner.realize import Realized
from lamina.planner.request import Request
from lamina.planner.search import Candidate, Goal, Search
from lamina.planner.steady import steadied
from lamina.planner.timing import Relative

# Models built and timed in each of the rounds of "time the best, correct the prices, look again".
BUILDS = 4
ROUNDS = 3
LOOKS = 5
# When report data turns a plan down: the next one's divergence is between these shares of its divergence.
TIGHTER = (0.5, 0.85)


def shortlist(builder: Builder, search: Search) -> None:
    """Time the best predicted candidates, correct the prices by what was seen, look again.

    The best plans of rules are timed too, whatever is predicted of them: what is returned is no worse than
    these as measured.

    Args:
        builder: Builds, times, and keeps what was.
        search: Its candidates were measured on selection data.
    """
    costs, goal, candidates = builder.prepared.costs, search.goal, search.ranked()
    favourites = [c for c in candidates if c.genome in search.favourites and c.feasible(goal)]
    builder.finish(favourites[:BUILDS], seconds=1.5 * (BUILDS + 1))
    for _ in range(ROUNDS):
        feasible = [c for c in candidates if c.feasible(goal) and builder.usable(c.genome)]
        fresh = sorted(feasible, key=lambda c: _predicted(c, costs.predict(c.genome), goal))
        if goal.minimize == "damage":
            fresh = steadied(fresh, costs.space)
        builder.finish(fresh[:BUILDS], seconds=1.5 * (BUILDS + 1))
        before = dict(costs.scale)
        fit_scales(costs, builder.prepared.whole)
        if before == costs.scale or all(
            c.genome in builder.done or not builder.usable(c.genome) for c in feasible
        ):
            break


def _predicted(candidate: Candidate, predicted: dict[str, float], goal: Goal) -> float:
    return candidate.objective(goal) if goal.minimize == "damage" else predicted[goal.minimize]


def _measured(finalist: Finalist, goal: Goal) -> float:
    if goal.minimize == "latency":
        return finalist.relative.ratio
    if goal.minimize == FOOTPRINT:
        predicted = finalist.candidate.predicted
        return finalist.relative.ratio + predicted[FOOTPRINT] - predicted["latency"]
    return finalist.candidate.objective(goal)


def choose(request: Request, builder: Builder, judge: Judge, search: Search) -> Verdict:
    """The best finalist that holds every bound as measured, its damage on report data included.

    When the best one does not hold the drop bound on report data, the next one looked at diverges clearly
    less from the original; every look is counted and told.

    Raises:
        InfeasibleBudget: None does; carries the nearest plans.
    """
    allowed = search.goal.allowed_damage
    shortlist(builder, search)
    for _ in range(LOOKS):
        if not (
            correct_size(request, builder, search)
            or correct_latency(request, builder, search)
            or look_elsewhere(builder, search)
        ):
            break
        shortlist(builder, search)
    reach(request, builder, search)
    goal = search.goal
    limit, failed = float("inf"), None
    for _ in range(LOOKS):
        fit = _fitting(request, builder, search, limit)
        if not fit and request.not_slower and store_only(builder, search):
            fit = _fitting(request, builder, search, limit)
        if not fit:
            break
        finalist = mend_best(request, builder, fit, goal)
        verdict = judge.score(finalist)
        if verdict.damage <= allowed:
            return verdict
        failed = verdict
        limit = finalist.candidate.surrogate * float(np.clip(allowed / verdict.damage, *TIGHTER))
        search.tighten(limit)
    candidates = search.ranked()
    nothing = builder.prepared.costs.space.nothing
    unchanged = next((c for c in candidates if c.genome == nothing), None)
    if unchanged is not None:
        for finalist in builder.finish([unchanged], seconds=3.0) if unchanged.feasible(goal) else ():
            if affordable(request, builder, finalist):
                return judge.score(finalist)
        if original_holds(request, builder):  # nothing measured faster, and it loses nothing
            return judge.score(as_given(request, builder, unchanged))
    raise infeasible(request, builder, search, failed)


def store_only(builder: Builder, search: Search) -> bool:
    """Build the best plan of forms that are only stored narrow and cost no time; whether that is a new one.

    For when every plan that was predicted to be faster measured slower than the original.
    """
    costs, goal, best = builder.prepared.costs, search.goal, search.best()
    masked = [
        [d if o.name in c.transform.storage_only else 1e9 for o, d in zip(c.options, row, strict=True)]
        for c, row in zip(costs.space.choices, search.damage, strict=True)
    ]
    allowed = float("inf") if best is None else best.surrogate
    found = (
        None
        if goal.minimize == "damage"
        else solve(costs, masked, minimize=goal.minimize, allowed_damage=allowed, bounds=goal.bounds)
    )
    genome = found or solve(costs, masked, minimize="damage", bounds=goal.bounds)
    if genome is None or genome in builder.done or not any(genome):
        return False
    candidate = search.measure(genome)
    return candidate is not None and bool(builder.finish([candidate], seconds=3.0))


def correct_size(request: Request, builder: Builder, search: Search) -> bool:
    """Search below the size bound by what finished files hold beyond weights; whether that was news.

    Nodes, names and types of conversions are not in the predicted size: they depend on the neighbours.
    """
    limits = [b.limit(builder.original_size) for b in request.budget.costs if b.axis == "size"]
    if not limits:
        return False
    done = [f for f in builder.done.values() if f.candidate.feasible(search.goal)]
    if not done:
        return _loosen_size(min(limits), builder, search)
    sizes = {f.candidate.genome: serialized_size(f.realized.program.model) for f in done}
    if sizes[_best(done, search.goal).candidate.genome] <= min(limits):
        return False  # that a plan of lesser worth would fit is no reason not to look
    over = [f.candidate for f in done if sizes[f.candidate.genome] > min(limits)]
    beyond = max(sizes[c.genome] - c.predicted["size"] for c in over)
    bound = min(limits) - beyond
    if bound >= search.goal.bounds["size"]:
        return False
    search.goal = replace(search.goal, bounds={**search.goal.bounds, "size": bound})
    search.run()
    return True


def _best(done: Sequence[Finalist], goal: Goal) -> Finalist:
    return min(done, key=lambda f: (f.candidate.objective(goal), f.candidate.surrogate))


def _loosen_size(limit: float, builder: Builder, search: Search) -> bool:
    """Search above the size bound where nothing seems small enough but the smallest plan's file is."""
    harmless = replace(search.goal, bounds={a: b for a, b in search.goal.bounds.items() if a != "size"})
    near = [c for c in search.archive.values() if c.feasible(harmless) and builder.usable(c.genome)]
    near.sort(key=lambda c: c.predicted["size"])
    found = builder.finish(near[:1], seconds=3.0)
    if not found:
        return False
    real, predicted = serialized_size(found[0].realized.program.model), found[0].candidate.predicted["size"]
    bound = limit + predicted - real
    if real > limit or bound <= search.goal.bounds["size"]:
        return False
    search.goal = replace(search.goal, bounds={**search.goal.bounds, "size": bound})
    search.run()
    return True


def correct_latency(request: Request, builder: Builder, search: Search) -> bool:
    """Search as far below the latency bound as finished plans are above prediction; whether that helped.

    For when no plan that was predicted to be fast enough is: others, a little faster, may be.
    """
    bounds = [b for b in request.budget.costs if b.axis == "latency"]
    own = [f for f in builder.done.values() if f.candidate.genome in search.archive]
    done = [f for f in own if f.candidate.feasible(search.goal)]
    if not bounds or not done:
        return False
    limit = min(b.value if b.relative else b.value / builder.original_latency_s for b in bounds)
    if _best(done, search.goal).relative.ratio <= MARGIN * limit:
        return False
    slow = [f for f in done if f.relative.ratio > MARGIN * limit]
    beyond = min(f.relative.ratio / f.candidate.predicted["latency"] for f in slow)
    tighter = min(AIM * limit / beyond, AIM * search.goal.bounds["latency"])
    search.goal = replace(search.goal, bounds={**search.goal.bounds, "latency": tighter})
    search.run()
    return any(c.feasible(search.goal) and c.genome not in builder.done for c in search.archive.values())


def look_elsewhere(builder: Builder, search: Search) -> bool:
    """Look for plans without the moves, and around the plans, that proved broken; whether any are new."""
    again = search.forbid(builder.broken)
    if again:
        search.run()
    detours = [search.detour(genome) for genome in sorted(builder.failed) if builder.blameless(genome)]
    return again or any(detours)


def original_holds(request: Request, builder: Builder) -> bool:
    """Whether the captured model itself keeps every cost bound."""
    costs: dict[str, Callable[[], float]] = {
        "latency": lambda: builder.original_latency_s,
        "size": lambda: builder.original_size,
        "memory": builder.original_memory,
        "flops": lambda: builder.prepared.original_cost.flops,
    }
    return all(costs[b.axis]() <= b.limit(costs[b.axis]()) for b in request.budget.costs)


def as_given(request: Request, builder: Builder, unchanged: Candidate) -> Finalist:
    """The captured model itself, not even folded; with its caches in codes where that was asked for."""
    prepared = builder.prepared
    if prepared.plan.caches:
        realized = Realized(prepared.folded.program, prepared.plan)
        return Finalist(unchanged, realized, prepared.folded.relative)
    plan = replace(prepared.plan, folds=(), moves=())
    same = {case.name: Ratio(1.0, 1.0, 1.0) for case in request.workload}
    return Finalist(unchanged, Realized(request.program, plan), Relative(1.0, 1.0, 1.0, same))


def _fitting(request: Request, builder: Builder, search: Search, limit: float) -> list[Finalist]:
    """Finalists whose divergence is at most ``limit``, the best first; below a limit more are built."""
    goal, costs = search.goal, builder.prepared.costs
    if np.isfinite(limit):
        faithful = [
            c
            for c in search.ranked()
            if c.feasible(goal) and c.surrogate <= limit and builder.usable(c.genome)
        ]
        faithful.sort(key=lambda c: _predicted(c, costs.predict(c.genome), goal))
        builder.finish(faithful[:2], seconds=4.0)
    fit = [
        f
        for f in builder.done.values()
        if f.candidate.feasible(goal) and f.candidate.surrogate <= limit and affordable(request, builder, f)
    ]
    fit.sort(key=lambda f: _measured(f, goal))
    if goal.minimize == "damage":
        by_genome = {f.candidate.genome: f for f in fit}
        fit = [by_genome[c.genome] for c in steadied([f.candidate for f in fit], costs.space)]
    return fit


def infeasible(
    request: Request, builder: Builder, search: Search, failed: Verdict | None
) -> InfeasibleBudget:
    """The error that names what came nearest, built and timed, and what budget each of those would meet."""
    costs, goal = builder.prepared.costs, search.goal
    ranked = sorted(
        search.archive.values(), key=lambda c: (costs.predict(c.genome)["latency"], c.score.damage)
    )
    inside = [c for c in ranked if c.score.bound(goal.caution) <= goal.allowed_damage]
    axes = [a for a in goal.bounds if all(a in c.predicted for c in ranked)]
    least = [min(ranked, key=lambda c, a=axis: c.predicted[a]) for axis in axes if ranked]  # type: ignore[misc]
    kept = {c.genome: c for c in (*ranked[:1], *inside[:1], *least)}.values()
    nearest = [_nearest(f, goal) for f in builder.finish(list(kept), seconds=4.0)]
    report = "" if failed is None else f"; the best plan lost {failed.damage * 100:.2f} % on report data"
    fast = " and is no slower than the original" if request.not_slower else ""
    return InfeasibleBudget(
        f"no plan meets '{request.budget}'{fast}{report}",
        nearest=nearest,
        advice="nearest: " + " | ".join(str(n["would_meet"]) for n in nearest),
    )


def _nearest(finalist: Finalist, goal: Goal) -> dict[str, object]:
    score, ratio = finalist.candidate.score, finalist.relative.ratio
    size = serialized_size(finalist.realized.program.model)
    return {
        "latency_ratio": ratio,
        "size_bytes": size,
        "damage": score.damage,
        "moves": len(finalist.realized.plan.moves),
        "would_meet": f"latency<={ratio * 1.03:.2f}x, size<={size * 1.01 / 1e6:.2f}MB, "
        f"drop<={max(score.bound(goal.caution), 0) * 100 + 0.05:.2f}%",
    }
