"""Round the weights of a finished plan against calibration data, and keep that only where it helps."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from lamina.errors import DataError, LaminaError
from lamina.passes.quantize.rounding import Rounding, round_options
from lamina.planner.apply import apply_drops, apply_rest, removes
from lamina.planner.builder import Builder, Finalist, Rounded
from lamina.planner.plan import Plan
from lamina.planner.realize import Realized
from lamina.planner.request import Request

# Share of the search's time that rounding one plan may take, operator after operator.
_SHARE = 0.5
# Seconds that learning codes against the outputs may take in all, as a share of it.
_LEARNING_SHARE = 1.0
# The most bits of a weight for which it was measured (docs/precision.md).
_FEW_BITS = 4


def round_plan(
    request: Request, builder: Builder, finalist: Finalist, *, part: float = 1.0, learning: bool = True
) -> Finalist:
    """The finalist with codes that answer for each other, where that brings the outputs nearer.

    Bytes and operators stay as they are. Judged is the divergence from the original on selection data: the
    same weights in the same bits rarely move a metric that counts right answers. Codes that answer for each
    other on made-up inputs would do so on those alone, so without data there is nothing to do.
    Codes of few bits are learned against the outputs too, in the time that is left for that.

    Args:
        request: The data and the time.
        builder: Holds what was done.
        finalist: A finished plan.
        part: Share of the time left for learning that this plan may take.
        learning: Whether it may take any.
    """
    if request.synthetic_data:
        return finalist
    genome, realized = finalist.candidate.genome, finalist.realized
    moves = realized.plan.moves
    if genome in builder.rounded or not any("weight_bits" in m.option.parameters for m in moves):
        return finalist
    start = time.perf_counter()
    try:
        made = _rounded(request, builder, realized, part if learning else 0.0)
    except DataError:  # too little calibration data
        return finalist
    except LaminaError as error:  # a bug in rounding costs the rounding, not the run
        builder.prepared.undone.append({"pass": "rounding", "where": "plan", "reason": error.what})
        return finalist
    methods = [m.option.parameters["rounding"] for m in made.plan.moves if "codes" in m.option.parameters]
    if not methods:
        return finalist
    count, method = len(methods), "output" if "output" in methods else methods[0]
    before, after = (builder.selection.outcome(p).divergence for p in (realized.program, made.program))
    kept = after < before
    builder.rounded[genome] = Rounded(count, method, before, after, kept, time.perf_counter() - start)
    if not kept:
        return finalist
    rounded = replace(finalist, realized=made)
    builder.done[genome] = rounded
    return rounded


def _rounded(request: Request, builder: Builder, realized: Realized, part: float) -> Realized:
    """The plan with other codes, applied and checked."""
    moves = realized.plan.moves
    rest = [m for m in moves if not removes(m)]
    program = apply_drops(builder.prepared.folded.program, moves)
    chosen = [(m.site, m.option) for m in rest]
    left = part * (_LEARNING_SHARE * request.seconds - builder.learning_s)
    learns = left > 0 and can_learn(request, builder, realized.plan)
    start = time.perf_counter()
    with request.progress.stage("round"):
        options = round_options(
            program,
            chosen,
            request.splits.calibration,
            Rounding("output" if learns else "descent"),
            metric=request.metric,
            # where an operator is left out nothing can be learned, so descent may take that time too
            seconds=_SHARE * request.seconds + (left if learns else 0.0),
            learning=left,
            progress=partial(request.progress.update, "round"),
        )
    if learns:
        builder.learning_s += time.perf_counter() - start
    renewed = [replace(m, option=o) for m, o in zip(rest, options, strict=True)]
    final = tuple(m for m in moves if removes(m)) + tuple(renewed)
    made = Realized(apply_rest(program, final), replace(realized.plan, moves=final))
    builder.prepared.referee.check(made.program, "rounded weights", exact=False)
    return made


def can_learn(request: Request, builder: Builder, plan: Plan) -> bool:
    """Whether learning codes against the outputs is worth its time, and some of that is left."""
    few = any(m.option.parameters.get("weight_bits", 8) <= _FEW_BITS for m in plan.moves)
    return few and builder.learning_s < _LEARNING_SHARE * request.seconds
