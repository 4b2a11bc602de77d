"""``result.json``: everything measured, with predictions beside it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lamina.analysis.cost import CostResult, cost
from lamina.backends.backend import Audit, Latency
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.quantize.caches import coded_feeds
from lamina.planner.bits.evidence import BitEvidence, counts, mean_width, widths_of
from lamina.planner.builder import Builder
from lamina.planner.judge import Verdict
from lamina.planner.plan import Move, Plan
from lamina.planner.request import Request
from lamina.planner.search import Candidate, Goal
from lamina.planner.timing import Relative


@dataclass(frozen=True)
class Final:
    """The last measurements, of the model that is returned.

    Attributes:
        before: Latency of the original on each case.
        after: Of the result.
        relative: Their ratio.
        audit: What the target made of the planned operators.
        onnxruntime_s: Weighted latency of the original in ONNX Runtime, where the target is another backend:
            what a user would compare with.
    """

    before: Sequence[Latency]
    after: Sequence[Latency]
    relative: Relative
    audit: Audit
    onnxruntime_s: float | None = None


def evidence(
    request: Request,
    builder: Builder,
    goal: Goal,
    verdict: Verdict,
    final: Final,
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """The object ``result.json`` holds."""
    candidate, model = verdict.finalist.candidate, verdict.finalist.realized.program.model
    heaviest = max(request.workload, key=lambda c: sum(a.size for a in c.feeds.values()))
    made = verdict.finalist.realized.program
    plan = verdict.finalist.realized.plan
    after_cost = cost(made, coded_feeds(made, heaviest.feeds, plan.caches))
    sizes = builder.original_size, serialized_size(model)
    memory = builder.original_memory(), builder.memory(verdict.finalist)
    predicted = builder.prepared.costs.predict(candidate.genome)
    original = _side(
        request, final.before, sizes[0], builder.prepared.original_cost, memory[0], verdict.original
    )
    optimized = _side(request, final.after, sizes[1], after_cost, memory[1], verdict.optimized)
    checks = request.budget.met(
        original,
        {**optimized, "latency_s": final.relative.ratio * original["latency_s"]},
        verdict.damage,
        allowed_damage=goal.allowed_damage,
    )
    elsewhere = {} if final.onnxruntime_s is None else {"original_on_onnxruntime_s": final.onnxruntime_s}
    return elsewhere | {
        "budget": str(request.budget),
        "met": {axis: check._asdict() for axis, check in checks.items()},
        "target": str(request.target),
        "workload": [_case(c.name, c.weight, c.feeds, final.relative) for c in request.workload],
        "metric": request.metric.name,
        "original": original,
        "optimized": optimized,
        "clock": builder.stopwatch.clock,
        "latency_ratio": final.relative.ratio,
        "latency_ratio_spread": [final.relative.low, final.relative.high],
        "size_ratio": sizes[1] / sizes[0],
        "damage": verdict.damage,
        "damage_ci95": None if verdict.interval is None else list(verdict.interval),
        "n_calibration": request.splits.calibration.samples,
        "n_selection": candidate.score.samples,
        "n_report": request.splits.report.samples,
        "report_looks": verdict.looks,
        "synthetic_data": request.synthetic_data,
        "predicted": {**predicted, "damage": candidate.score.damage},
        "measured": {
            "latency": final.relative.ratio,
            "size": sizes[1],
            "flops": after_cost.flops,
            "damage": verdict.damage,
        },
        "moves": [_move(m) for m in verdict.finalist.realized.plan.moves],
        "kv_cache": caches(plan, made),
        "rounding": rounding(builder, candidate),
        "compensation": mending(builder, candidate),
        "forms": list(builder.prepared.folded.log),
        "undone": [dict(entry) for entry in builder.prepared.undone],
        "audit": {"kernels": dict(final.audit.counts), "fell_back": list(final.audit.fell_back)},
        "coverage": coverage(builder, candidate),
        "widths": widths(builder, candidate),
        "refusals": [asdict(r) for r in builder.prepared.costs.space.refusals],
        "candidates_measured": len(candidates),
        "versions": versions(),
        "device": dict(request.backend.capabilities(request.target)).get("device", "unknown"),
    }


def _side(
    request: Request, latencies: Sequence[Latency], size: int, costs: CostResult, memory: int, metric: float
) -> dict[str, Any]:
    pairs = list(zip(request.workload, latencies, strict=True))
    return {
        "latency_s": sum(c.weight * t.median_s for c, t in pairs),
        "latency_spread": sum(c.weight * t.spread_s for c, t in pairs),
        "cases": {c.name: asdict(t) for c, t in pairs},
        "size_bytes": size,
        "flops": costs.flops,
        "parameters": costs.parameters,
        "peak_memory_bytes": memory,
        "metric": metric,
    }


def _case(name: str, weight: float, feeds: Mapping[str, Any], relative: Relative) -> dict[str, Any]:
    return {
        "name": name,
        "weight": weight,
        "shapes": {k: list(v.shape) for k, v in feeds.items()},
        "latency_ratio": relative.cases[name].median,
        "latency_ratio_spread": [relative.cases[name].low, relative.cases[name].high],
    }


def _move(move: Move) -> dict[str, Any]:
    return {
        "site": move.site.name,
        "kind": move.site.kind,
        "transform": move.site.transform,
        "option": move.option.name,
        "reason": move.reason,
    }


def caches(plan: Plan, made: Program) -> list[dict[str, Any]] | None:
    """Interface ports that became int8, and by what scales a caller reads them; None where none did."""
    ports = {port.name for port in made.inputs}
    found = [asdict(cache) for cache in plan.caches if cache.past in ports]
    return [{"dtype": "int8", "was": "float32", **cache} for cache in found] or None


def mending(builder: Builder, candidate: Candidate) -> dict[str, Any] | None:
    """What compensating the plan did on selection data; None where it was not tried."""
    found = builder.mended.get(candidate.genome)
    return None if found is None else asdict(found)


def rounding(builder: Builder, candidate: Candidate) -> dict[str, Any] | None:
    """What rounding the plan's weights against data did; None where it was not tried."""
    found = builder.rounded.get(candidate.genome)
    return None if found is None else asdict(found)


def coverage(builder: Builder, candidate: Candidate) -> dict[str, Any]:
    """Share of time, weight bytes and weighted operators that the moves touch."""
    costs = builder.prepared.costs
    space = costs.space
    touched = [i for i, g in enumerate(candidate.genome) if g or space.dropped(candidate.genome, i)]
    time = sum(
        costs.share[i] for i in touched if candidate.genome[i] and not space.dropped(candidate.genome, i)
    )
    weights = builder.prepared.folded.program.graph.initializers
    names = {w for i in touched for w in space.choices[i].site.weights}
    everything = sum(v.const_value.nbytes for v in weights.values() if v.const_value is not None)
    bytes_touched = sum(
        v.const_value.nbytes for n in names if (v := weights.get(n)) is not None and v.const_value is not None
    )
    weighted = [i for i, c in enumerate(space.choices) if c.site.weights and not c.removes]
    return {
        "time": min(1.0, time / max(costs.base["latency"], 1e-12)),
        "bytes": bytes_touched / max(everything, 1),
        "operators": len(set(weighted) & set(touched)) / max(len(weighted), 1),
        "changed_nothing": not touched
        and not builder.prepared.folded.names
        and not builder.prepared.plan.caches,
    }


def widths(builder: Builder, candidate: Candidate) -> dict[str, Any]:
    """Bits of the weights that some form on offer stores in fewer: mean over weights, operators by width."""
    costs = builder.prepared.costs
    known = BitEvidence(costs, [[0.0] * len(c.options) for c in costs.space.choices], widths_of(costs))
    operators = {str(level): count for level, count in counts(known, candidate.genome).items()}
    return {"mean_bits": mean_width(known, candidate.genome), "operators": operators}


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    found = {}
    for name in (
        "lamina",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "scipy",
        "torch",
        "apache-tvm",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def front(builder: Builder, candidates: Sequence[Candidate], goal: Goal) -> tuple[dict[str, Any], ...]:
    """The Pareto front of measured candidates: latency (measured where built) against damage."""
    costs = builder.prepared.costs
    rows: list[dict[str, Any]] = []
    best = float("inf")
    for candidate in sorted(candidates, key=lambda c: costs.predict(c.genome)["latency"]):
        if candidate.score.damage >= best:
            continue
        best = candidate.score.damage
        predicted, built = costs.predict(candidate.genome), builder.done.get(candidate.genome)
        rows.append(
            {
                "latency_predicted": predicted["latency"],
                "latency_measured": None if built is None else built.relative.ratio,
                "size_predicted": predicted["size"],
                "selection_damage": candidate.score.damage,
                "selection_error": candidate.score.error,
                "feasible": candidate.feasible(goal),
                "moves": sum(1 for g in candidate.genome if g),
            }
        )
    return tuple(rows)


def with_reasons(
    moves: Sequence[Move], builder: Builder, candidate: Candidate, damage: Sequence[Sequence[float]]
) -> tuple[Move, ...]:
    """Moves with their predicted gain and damage, and the reason in words."""
    costs = builder.prepared.costs
    known: dict[tuple[str, str], tuple[int, int]] = {
        (c.transform.name, c.site.name): (i, candidate.genome[i]) for i, c in enumerate(costs.space.choices)
    }
    told = []
    for move in moves:
        index, gene = known[move.site.transform, move.site.name]
        gain, harm = costs.latency_delta(index, gene), damage[index][gene - 1]
        size = costs.delta["size"][index][gene - 1]
        reason = (
            f"latency {gain:+.2%} of the original, size {size / 1e3:+.1f} kB, divergence alone {harm:.2e}"
        )
        told.append(replace(move, reason=reason, latency_s=gain * builder.original_latency_s, damage=harm))
    return tuple(told)


def explained(verdict: Verdict, builder: Builder, damage: Sequence[Sequence[float]]) -> Verdict:
    """The verdict with a reason beside every move of its plan."""
    finalist = verdict.finalist
    plan = finalist.realized.plan
    moves = with_reasons(plan.moves, builder, finalist.candidate, damage)
    realized = replace(finalist.realized, plan=replace(plan, moves=moves))
    return replace(verdict, finalist=replace(finalist, realized=realized))
