"""Compensate a finished plan, and keep that only where it lowers the damage on selection data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lamina.backends.backend import run_of
from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.passes.compensate import compensate
from lamina.passes.merge_conv_chain import MergeConvChain
from lamina.planner.apply import removes
from lamina.planner.builder import Builder, Finalist, Mending
from lamina.planner.plan import Move
from lamina.planner.request import Request
from lamina.planner.rounding import round_plan
from lamina.planner.search import Search
from lamina.quality import evaluate, get_metric

# Share of the search's time that one compensation may take.
_SHARE = 0.5
# Plans that miss the drop bound are compensated up to so many times it, and so many of them.
_REACH = 3.0
_TRIES = 2
# Sums of divergences such plans are looked for at, in those of the best feasible plan.
_BEYOND = (1.4, 2.0, 3.0)


def mend(request: Request, builder: Builder, finalist: Finalist) -> Finalist:
    """The finalist with better rounded and repaired weights, where they lower the damage on selection data.

    Rounding comes first: compensation fits what it leaves. Both look at calibration data, once a plan. Bytes
    and operators stay as they are; the final measurement is of the repaired model all the same.
    """
    genome = finalist.candidate.genome
    if not finalist.realized.plan.moves or genome in builder.mended:
        return finalist
    finalist = round_plan(request, builder, finalist)
    realized = finalist.realized
    original, start = builder.prepared.folded.program, time.perf_counter()
    if [p.name for p in original.inputs] != [p.name for p in realized.program.inputs]:
        return finalist  # a cache left with its attention: the two do not run on the same feeds
    try:
        made = compensate(
            original,
            realized.program,
            request.splits.calibration,
            stands_for=standing(realized.plan.moves, realized.program),
            divergence=get_metric(request.metric.divergence, original),
            seconds=_SHARE * request.seconds,
        )
    except DataError:  # too little calibration data to check a fit on
        return finalist
    except PassError as error:  # a bug in a repair costs the repair, not the run
        builder.prepared.undone.append({"pass": "compensate", "where": "plan", "reason": error.what})
        return finalist
    before = after = 0.0
    if made.repairs:
        before, after = _damages(request, (realized.program, made.program))
    kept = after < before
    seconds = time.perf_counter() - start
    builder.mended[genome] = Mending(len(made.fitted), before, after, kept, seconds)
    if not kept:
        return finalist
    plan = replace(realized.plan, repairs=made.repairs)
    mended = replace(finalist, realized=replace(realized, program=made.program, plan=plan))
    builder.done[genome] = mended
    return mended


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
        mended = mend(request, builder, finalist)
        told = builder.mended.get(finalist.candidate.genome)
        if told is None or not told.kept:
            continue
        score = replace(finalist.candidate.score, damage=told.after)
        candidate = replace(finalist.candidate, score=score)
        search.archive[candidate.genome] = candidate
        builder.done[candidate.genome] = replace(mended, candidate=candidate)


def standing(moves: Sequence[Move], program: Program) -> dict[str, str]:
    """What values of a changed program stand for in the original.

    Behind a dropped branch, or one whose replacement was folded into the weights before it, the skip stands
    where the sum was; else what replaces the branch does. Runs of such branches are followed to their end.
    """
    made = {v.name or "" for n in program.graph for v in n.outputs}
    steps: dict[str, str] = {}
    for move in moves:
        if not removes(move) or len(move.site.outputs) != 1 or move.site.transform == MergeConvChain.name:
            continue
        instead = f"{move.site.nodes[-1]}_matched_bias_out"
        skip = instead if instead in made else move.site.inputs[0]
        steps[skip] = move.site.outputs[0]
    found = {}
    for name, last in steps.items():
        while last in steps:
            last = steps[last]
        found[name] = last
    return found


def _damages(request: Request, programs: Sequence[Program]) -> list[float]:
    """Damage of finished programs on the selection data."""
    metric, data = request.metric, request.splits.selection
    original = request.backend.compile(request.program.model, request.draft).run
    reference = original if metric.kind == "divergence" else None

    def score(program: Program) -> float:
        run = run_of(request.backend.compile(program.model, request.draft))
        return metric.score(evaluate(run, data, metric, reference_run=reference))

    before = metric.score(evaluate(original, data, metric, reference_run=reference))
    return [metric.damage(before, score(program)) for program in programs]
