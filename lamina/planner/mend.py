"""Compensate a finished plan, and keep that only where it lowers the damage on selection data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.passes import get_transform
from lamina.passes.compensate import compensate
from lamina.planner.apply import STANDS_FOR
from lamina.planner.builder import Builder, Finalist, Mending
from lamina.planner.evaluator import Score
from lamina.planner.paths import RANKS, with_paths
from lamina.planner.plan import Move
from lamina.planner.request import Request
from lamina.planner.rounding import can_learn, round_plan
from lamina.planner.search import Goal, Search
from lamina.quality import get_metric

# Share of the search's time that all compensation may take.
MEND_SHARE = 0.5
# Plans that miss the drop bound are compensated up to so many times it, and so many of them.
_REACH = 3.0
_TRIES = 2
# Plans that are compensated before the one of least damage is chosen, where that is what is minimized.
CONTENDERS = 3
# Sums of divergences such plans are looked for at, in those of the best feasible plan.
_BEYOND = (1.4, 2.0, 3.0)


def mend(
    request: Request,
    builder: Builder,
    finalist: Finalist,
    goal: Goal,
    *,
    part: float = 1.0,
    learning: bool = True,
) -> Finalist:
    """The finalist with better rounded and repaired weights, where they lower the damage on selection data.

    Rounding comes first: compensation fits what it leaves. Both look at calibration data, once a plan. Bytes
    and operators stay as they are; the final measurement is of the repaired model all the same. Low-rank
    paths, which do cost, come on top where damage is minimized or the plan still misses the drop bound
    (:mod:`lamina.planner.paths`).

    Args:
        request: The budget and the data.
        builder: Holds what was done; all compensation of a run shares half of its time.
        finalist: A finished plan.
        goal: What the search is after.
        part: Share of the time that is left.
        learning: Whether codes may be learned against the outputs.
    """
    genome = finalist.candidate.genome
    if not finalist.realized.plan.moves or genome in builder.mended:
        return finalist
    finalist = round_plan(request, builder, finalist, part=part, learning=learning)
    realized = finalist.realized
    seconds = part * (MEND_SHARE * request.seconds - sum(m.seconds for m in builder.mended.values()))
    if seconds <= 0:
        return finalist
    original, start = builder.prepared.folded.program, time.perf_counter()
    if [p.name for p in original.inputs] != [p.name for p in realized.program.inputs]:
        return finalist  # a cache left with its attention: the two do not run on the same feeds
    stands_for = standing(realized.plan.moves, realized.program)
    wants = _wants_paths(finalist.candidate.score, goal)
    try:
        made = compensate(
            original,
            realized.program,
            request.splits.calibration,
            stands_for=stands_for,
            divergence=get_metric(request.metric.divergence, original),
            seconds=seconds / 2 if wants else seconds,
        )
    except DataError:  # too little calibration data to check a fit on
        return finalist
    except PassError as error:  # a bug in a repair costs the repair, not the run
        builder.prepared.undone.append({"pass": "compensate", "where": "plan", "reason": error.what})
        return finalist
    before = after = 0.0
    if made.repairs:
        before, after = (builder.selection.outcome(p).damage for p in (realized.program, made.program))
    elif wants:
        before = after = builder.selection.outcome(realized.program).damage
    kept, mended, paths = after < before, finalist, 0
    if kept:
        plan = replace(realized.plan, repairs=made.repairs)
        mended = replace(finalist, realized=replace(realized, program=made.program, plan=plan))
    least = min(before, after)
    if wants and _wants_paths(replace(finalist.candidate.score, damage=least), goal):
        left = max(0.0, seconds - (time.perf_counter() - start)) / len(RANKS)
        pathed = with_paths(request, builder, mended, goal, least, stands_for, seconds=left)
        if pathed is not None:
            kept, mended, after = True, pathed, pathed.candidate.score.damage
            paths = len(pathed.realized.plan.paths)
    spent = time.perf_counter() - start
    builder.mended[genome] = Mending(len(made.fitted), before, after, kept, spent, paths)
    if kept:
        builder.done[genome] = mended
    return mended


def mend_best(request: Request, builder: Builder, finalists: Sequence[Finalist], goal: Goal) -> Finalist:
    """The first finalist mended; where damage is minimized, of the first few the one with the least after it.

    What a repair can make up for differs from plan to plan by more than what it is chosen by before. An
    earlier one is left for a later one only where that is better by more than a standard error. Codes of few
    bits are learned for that one alone: it takes all the time there is for it. No further plan is begun where
    those before took as long as the search.

    Args:
        request: The budget and the data.
        builder: Holds what was done.
        finalists: Finished plans that hold the bounds, the best first; at least one.
        goal: What the search is after.
    """
    if goal.minimize != "damage":
        return mend(request, builder, finalists[0], goal)
    tried = finalists[:CONTENDERS]
    mended: list[Finalist] = []
    for i, finalist in enumerate(tried):
        if i and _spent(builder) >= request.seconds:
            break
        mended.append(mend(request, builder, finalist, goal, part=1.0 / (len(tried) - i), learning=False))
    tried = tried[: len(mended)]

    def left(finalist: Finalist, before: Finalist) -> float:
        told = builder.mended.get(before.candidate.genome)
        return told.after if told is not None and told.kept else before.candidate.score.damage

    lasting = [left(*pair) for pair in zip(mended, tried, strict=True)]
    best = lasting.index(min(lasting))
    most = lasting[best] + tried[best].candidate.score.error
    chosen = next(i for i, damage in enumerate(lasting) if damage <= most)
    return _learned(request, builder, tried[chosen], mended[chosen], goal)


def _spent(builder: Builder) -> float:
    """Seconds of rounding and compensation, with what judging them took."""
    rounded = sum(found.seconds for found in builder.rounded.values())
    return rounded + sum(found.seconds for found in builder.mended.values())


def _learned(request: Request, builder: Builder, plain: Finalist, mended: Finalist, goal: Goal) -> Finalist:
    """``plain`` mended anew with codes learned, where that is nearer to the original than ``mended``."""
    genome, told = plain.candidate.genome, builder.rounded.get(plain.candidate.genome)
    if told is None or told.method == "output" or not can_learn(request, builder, plain.realized.plan):
        return mended
    before = told, builder.mended.pop(genome, None), builder.done[genome]
    del builder.rounded[genome]
    again = mend(request, builder, plain, goal)
    old, new = (builder.selection.outcome(f.realized.program).divergence for f in (mended, again))
    if new < old:
        return again
    builder.rounded[genome], builder.done[genome] = before[0], before[2]
    if before[1] is not None:
        builder.mended[genome] = before[1]
    return mended


def _wants_paths(score: Score, goal: Goal) -> bool:
    """Whether less damage is worth bytes and time: it is what is minimized, or there is too much of it."""
    return goal.minimize == "damage" or score.bound(goal.caution) > goal.allowed_damage


def reach(request: Request, builder: Builder, search: Search) -> None:
    """Compensate the best plans that miss the drop bound a little; those that then hold it are feasible.

    Looked at are the plans cheaper than the best feasible one, as predicted, whose damage on selection data
    is at most :data:`_REACH` times what is allowed.
    """
    goal, costs = search.goal, builder.prepared.costs
    allowed = goal.allowed_damage
    if not 0 < allowed < float("inf") or goal.minimize == "damage":
        return
    best = search.best()
    limit = float("inf") if best is None else costs.predict(best.genome)[goal.minimize]
    search.beyond(_BEYOND)
    relaxed = replace(goal, allowed_damage=_REACH * allowed)
    near = [
        c
        for c in search.archive.values()
        if c.feasible(relaxed)
        and not c.feasible(goal)
        and builder.usable(c.genome)
        and c.genome not in builder.mended
        and costs.predict(c.genome)[goal.minimize] < limit
    ]
    near.sort(key=lambda c: costs.predict(c.genome)[goal.minimize])
    for finalist in builder.finish(near[:_TRIES], seconds=1.5 * (_TRIES + 1)):
        mended = mend(request, builder, finalist, goal, part=0.5)
        told = builder.mended.get(finalist.candidate.genome)
        if told is None or not told.kept:
            continue
        candidate = replace(mended.candidate, score=replace(mended.candidate.score, damage=told.after))
        search.archive[candidate.genome] = candidate
        builder.done[candidate.genome] = replace(mended, candidate=candidate)


def standing(moves: Sequence[Move], program: Program) -> dict[str, str]:
    """What values of a changed program stand for in the original.

    Behind a dropped branch, or one whose replacement was folded into the weights before it, the skip stands
    where the sum was; else what replaces the branch does, and the sum of branches that were joined. Runs of
    such branches are followed to their end. What a quantized operator gives stands for what the operator
    gave.
    """
    values = {v.name or "": v for n in program.graph for v in n.outputs}
    steps: dict[str, str] = {}
    for move in moves:
        if len(move.site.outputs) != 1:
            continue
        instead = get_transform(move.site.transform).sum_after(move.site, values)
        if instead is None:
            continue
        steps[instead] = move.site.outputs[0]
    found = {name: str(v.meta[STANDS_FOR]) for name, v in values.items() if STANDS_FOR in v.meta}
    for name, last in steps.items():
        while last in steps:
            last = steps[last]
        found[name] = last
    return found
