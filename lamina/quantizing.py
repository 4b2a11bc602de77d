"""``lamina.quantize``: the pipeline for who wants fewer bits and nothing else, no option needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lamina.backends.backend import Target
from lamina.budget import FOOTPRINT, BoundLike, Budget
from lamina.driver import make_request, run
from lamina.errors import BudgetError, InfeasibleBudget
from lamina.passes.quantize import Quantize
from lamina.planner.bits.allocators import allocator_names
from lamina.planner.strategy import SEARCH, strategy_of
from lamina.progress import Progress
from lamina.result import Result

# Widths a whole model can be asked for.
WIDTHS = (8, 4, 3, 2)
MIXED = "mixed"
# What may be lost where nothing says how much.
DROP = "1%"
_TRUST = (
    "no data was given: forms that need ranges were left out, and damage was measured on made-up inputs, "
    "which says little about real ones; give some samples to have it measured, and better forms"
)


def quantize(
    model: Any,
    *,
    data: Any = None,
    metric: Any = None,
    bits: int | str | None = None,
    size: str | float | None = None,
    latency: str | float | None = None,
    drop: str | float | None = None,
    strategy: str | Sequence[str] | None = None,
    kv_cache: int | None = None,
    target: str | Target = "ort:cpu",
    workload: Any = None,
    seconds: float = 60.0,
    seed: int = 0,
    batch_size: int = 32,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model: folds, then for each operator the form that pays, by measured latency and damage.

    A whole model in 8 bits (the default) takes for every operator the fastest 8-bit form that keeps the
    damage: static, dynamic, in blocks, or stored in 8 bits and computed in float where no integer kernel is
    faster. Below 8 bits, and where only a cost is bounded, the least damage is looked for instead. Where
    nothing says how much may be lost, it is 1 %. No plan is slower than the original on its workload.

    Args:
        model: As for :func:`lamina.optimize`.
        data: Samples, as there. None: forms that need no samples, judged on made-up inputs.
        metric: As there. None: divergence of the outputs.
        bits: 8, 4, 3 or 2: the whole model, an operator without such a form in the next wider one it has; or
            ``"mixed"``: each operator its own width. None: 8, or mixed where ``size`` is given.
        size: Bound on the file: ``"0.2x"``, ``"10MB"``.
        latency: Bound on the latency: ``"0.5x"``, ``"4ms"``.
        drop: Bound on the quality lost: ``"1%"``.
        strategy: As there, but allocators of bits only. None: the planner's search.
        kv_cache: 8: key and value caches at the interface become int8 (docs/precision.md); needs data. The
            result may then be slower than the original.
        target: Where the model will run.
        workload: Shapes that matter.
        seconds: Time for measuring candidates.
        seed: Of data splits and search.
        batch_size: Rows a run gets during evaluation.
        example_inputs: For torch modules.
        dynamic_shapes: For torch modules.
        progress: Receives progress.

    Returns:
        The result; ``result.save(directory)`` writes it. ``evidence["quantization"]`` says what was asked,
        ``evidence["widths"]`` what came of it.

    Raises:
        InfeasibleBudget: No plan keeps the bounds; carries the nearest ones.
        LaminaError: Model, data, bits, a bound, metric, target or workload is not usable.
    """
    width = read_bits(bits, size)
    budget, minimize = wanted(width, size=size, latency=latency, drop=drop)
    _only_allocators(strategy)
    request = make_request(
        model,
        budget,
        data=data,
        metric=metric,
        target=target,
        workload=workload,
        transforms=(Quantize.name,),
        minimize=minimize,
        strategy=strategy,
        kv_cache=kv_cache,
        seconds=seconds,
        seed=seed,
        batch_size=batch_size,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        progress=progress,
    )
    try:
        result = run(replace(request, bits=width, data_free=data is None, not_slower=kv_cache is None))
    except InfeasibleBudget as error:
        if drop is None and width is not None:
            hint = f"{error.advice}; with bits mixed, operators may keep more"
            raise InfeasibleBudget(error.what, nearest=error.nearest, advice=hint) from error
        raise
    told = {
        "bits": MIXED if width is None else width,
        "minimized": request.minimize,
        "trust": _TRUST if data is None else None,
    }
    return replace(result, evidence={**result.evidence, "quantization": told})


def read_bits(bits: int | str | None, size: str | float | None = None) -> int | None:
    """The width of the whole model, None where operators may differ.

    Raises:
        BudgetError: It is no width there is.
    """
    if bits is None:
        return None if size is not None else WIDTHS[0]
    text = str(bits).strip().lower()
    if text == MIXED:
        return None
    if text not in [str(width) for width in WIDTHS]:
        raise BudgetError(
            f"bits={bits} is not possible", advice=f"choose {', '.join(map(str, WIDTHS))} or {MIXED}"
        )
    return int(text)


def wanted(
    width: int | None,
    *,
    size: str | float | None = None,
    latency: str | float | None = None,
    drop: str | float | None = None,
) -> tuple[Budget, str]:
    """The budget, and what to make least within it.

    A bounded drop leaves latency to gain, and size too where it is not bounded. Without one, a bound on a
    cost, or fewer than 8 bits, ask for the least damage; where nothing is bounded 1 % may be lost.

    Args:
        width: Of the whole model; the planner puts a size to it once the forms are known.
        size: Bound on the file.
        latency: Bound on the latency.
        drop: Bound on the quality lost.

    Raises:
        BudgetError: A bound is not understood.
    """
    sized = width is not None or size is not None
    costs = size is not None or latency is not None or (width is not None and width < WIDTHS[0])
    if drop is None and not costs:
        drop = DROP
    given = {"size": size, "latency": latency, "drop": drop}
    bounds: dict[str, BoundLike] = {axis: str(b) for axis, b in given.items() if b is not None}
    if width is not None and size is None:
        bounds["size"] = "1x"  # tightened to what the width comes to
    budget = Budget.parse(None, **bounds)
    if drop is None:
        return budget, "damage"
    return budget, "latency" if sized else FOOTPRINT


def _only_allocators(strategy: str | Sequence[str] | None) -> None:
    if strategy_of(strategy).rules and not strategy_of(strategy).search:
        raise BudgetError(
            "drop rules drop branches, and quantizing drops none",
            advice=f"choose from {', '.join((SEARCH, *allocator_names()))}, or use optimize",
        )
