"""Low-rank paths in a finished plan: priced, and kept where they are worth it and every bound still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lamina.analysis.cost import cost
from lamina.errors import DataError, PassError
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.low_rank_path import FittedPath, Pathed, add_paths, apply_paths
from lamina.planner.affordable import affordable
from lamina.planner.builder import Builder, Finalist
from lamina.planner.realize import Realized
from lamina.planner.request import Request
from lamina.planner.search import Goal
from lamina.quality import get_metric

# Ranks tried, and the shares of the paths, those first that gain most a byte.
RANKS = (4, 16)
SHARES = (1.0, 0.5, 0.25)
# Wall seconds that one set of paths is timed for, beside the original.
_SECONDS = 3.0


def with_paths(
    request: Request,
    builder: Builder,
    finalist: Finalist,
    goal: Goal,
    before: float,
    stands_for: dict[str, str],
    *,
    seconds: float,
) -> Finalist | None:
    """The finalist with low-rank paths beside its quantized operators.

    Where damage is minimized, the highest rank that lowers it on selection data; else the lowest with which
    the plan holds the drop bound there. Bytes and FLOPs of the result are counted and its time is measured
    before it may stand for the plan.

    Args:
        request: The budget, and the calibration and selection data.
        builder: Times, and knows what the original costs.
        finalist: A finished plan, repaired where that helped.
        goal: What the search is after.
        before: Damage of the finalist on selection data.
        stands_for: As for :func:`lamina.passes.repair_sites.repair_sites`.
        seconds: Time that fitting the paths of one rank may take.

    Returns:
        None where no paths lower the damage within the bounds.
    """
    base = finalist.realized
    ranks = RANKS[::-1] if goal.minimize == "damage" else RANKS
    for rank in ranks:
        made = _fitted(request, builder, base.program, stands_for, rank, seconds)
        if made is None:
            return None
        for share in SHARES:
            chosen = best_paths(made.fitted, share)
            program = apply_paths(base.program, [f.path for f in chosen])
            after = builder.selection.outcome(program).damage
            found = replace(finalist.candidate.score, damage=after)
            if after >= before or found.bound(goal.caution) > goal.allowed_damage:
                break  # fewer paths give back less
            plan = replace(base.plan, paths=tuple(f.path for f in chosen))
            (relative,) = builder.stopwatch.compare([program.model], seconds=_SECONDS)
            predicted = _priced(request, finalist, program, base.program)
            candidate = replace(
                finalist.candidate, score=found, predicted={**predicted, "latency": relative.ratio}
            )
            paid = Finalist(candidate, Realized(program, plan), relative)
            builder.forget_memory(candidate.genome)
            if candidate.feasible(goal) and affordable(request, builder, paid):
                return paid
    builder.forget_memory(finalist.candidate.genome)
    return None


def best_paths(fitted: Sequence[FittedPath], share: float) -> list[FittedPath]:
    """A share of the paths, those that gain most a byte, in execution order."""
    order = sorted(range(len(fitted)), key=lambda i: -fitted[i].gain / fitted[i].weight_bytes)
    count = max(1, round(share * len(fitted)))
    return [fitted[i] for i in sorted(order[:count])]


def _fitted(
    request: Request,
    builder: Builder,
    program: Program,
    stands_for: dict[str, str],
    rank: int,
    seconds: float,
) -> Pathed | None:
    original = builder.prepared.folded.program
    try:
        made = add_paths(
            original,
            program,
            request.splits.calibration,
            rank=rank,
            stands_for=stands_for,
            divergence=get_metric(request.metric.divergence, original),
            seconds=seconds,
        )
    except DataError:  # too little calibration data to check a fit on
        return None
    except PassError as error:  # a bug in a path costs the path, not the run
        builder.prepared.undone.append({"pass": "eora", "where": "plan", "reason": error.what})
        return None
    return made if made.paths else None


def _priced(request: Request, finalist: Finalist, program: Program, base: Program) -> dict[str, float]:
    """Predicted costs with what the paths add: bytes of the file, and FLOPs of the heaviest case."""
    feeds = max(request.workload, key=lambda c: sum(a.size for a in c.feeds.values())).feeds
    ports = {port.name for port in program.inputs}
    given = {name: array for name, array in feeds.items() if name in ports}
    flops = cost(program, given).flops - cost(base, given).flops
    grown = serialized_size(program.model) - serialized_size(base.model)
    predicted = dict(finalist.candidate.predicted)
    predicted["size"] += grown
    if "flops" in predicted:
        predicted["flops"] += flops
    return predicted
