"""Caches in 8 bits as part of a run: in the program before the search, at the interface after it."""

from __future__ import annotations

from dataclasses import replace

from lamina.errors import BudgetError, DataError
from lamina.passes.quantize.cache_edits import expose_caches, quantize_caches
from lamina.passes.quantize.cache_places import NAME, cache_places
from lamina.passes.quantize.caches import calibrate_caches
from lamina.planner.forms import Folded
from lamina.planner.judge import Verdict
from lamina.planner.referee import Referee
from lamina.planner.request import Request
from lamina.planner.timing import Stopwatch

BITS = (8,)


def read_cache_bits(kv_cache: int | str | None) -> int | None:
    """The width of caches, None where they stay as they are.

    Raises:
        BudgetError: It is no width there is.
    """
    if kv_cache is None:
        return None
    if str(kv_cache).strip() not in [str(width) for width in BITS]:
        raise BudgetError(f"kv_cache={kv_cache} is not possible", advice="choose 8, or leave it out")
    return int(kv_cache)


def check_caches(request: Request) -> None:
    """Say before minutes of work whether the caches asked for can be had.

    Raises:
        BudgetError: The target cannot be fed codes.
        DataError: There are no samples to take scales from.
        PassError: A cache has a form that has no codes; names the node.
    """
    if request.kv_cache is None:
        return
    if request.target.backend != "ort":
        raise BudgetError(
            f"caches in 8 bits are for ONNX Runtime, not for {request.target.backend}",
            advice="use target ort:cpu, or leave kv_cache out",
        )
    if request.synthetic_data:
        raise DataError(
            "kv_cache needs samples: the scales of keys and values come from them",
            advice="give data with the inputs of some decoding steps, past keys and values among them",
        )
    cache_places(request.program)


def with_caches(request: Request, folded: Folded, stopwatch: Stopwatch, referee: Referee) -> Folded:
    """The folded program with its caches in codes, verified and timed; from here on this is what is searched.

    Raises:
        LaminaError: A cache has a form that has no codes, or the result does not hold.
    """
    if request.kv_cache is None:
        return folded
    caches = calibrate_caches(folded.program, request.splits.calibration)
    program = quantize_caches(folded.program, caches)
    referee.coded = caches
    referee.check(program, NAME, exact=False)
    (relative,) = stopwatch.compare([expose_caches(program, caches).model], seconds=2.0)
    return replace(folded, program=program, relative=relative, caches=caches)


def exposed(verdict: Verdict) -> Verdict:
    """The verdict on the same model, with its caches in codes at the interface too."""
    finalist = verdict.finalist
    plan = finalist.realized.plan
    if not plan.caches:
        return verdict
    realized = replace(finalist.realized, program=expose_caches(finalist.realized.program, plan.caches))
    return replace(verdict, finalist=replace(finalist, realized=realized))
