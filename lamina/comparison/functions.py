"""Compare two models: structure, outputs on given and generated inputs, and the tensor where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.comparison.divergence import first_divergence
from lamina.comparison.running import Tally, run_both, summarize, trials
from lamina.comparison.structure import compare_structure, differing, shared_outputs
from lamina.comparison.verdict import Comparison, Divergence, OutputDifference
from lamina.data import Dataset, load_data
from lamina.errors import BudgetError, DataError
from lamina.ir.capture import capture
from lamina.ir.difference import DEFAULT_TOLERANCE
from lamina.ir.probe_inputs import probe_inputs
from lamina.ir.program import Program


def compare(
    a: Any,
    b: Any,
    *,
    data: Any = None,
    target: str | Target = "ort:cpu",
    tolerance: float | None = None,
    samples: int = 16,
    seed: int = 0,
) -> Comparison:
    """Say whether two models are the same function, by running both on given and generated inputs.

    Generated inputs cover ordinary ranges, edge values (zeros, ones, large, negative, tiny, denormal,
    infinite, NaN) and several sizes of every dynamic dim. Inputs the first model does not run on are skipped
    and counted; on edge inputs only what the first model keeps finite, and computes stably, is compared.

    Args:
        a: The model to compare with: anything :func:`lamina.optimize` takes.
        b: The other one; it must run on the first one's inputs and have an output in common.
        data: Samples to compare on as well.
        target: Where both run.
        tolerance: Largest difference that counts as equal, relative to an output's largest magnitude on
            ordinary inputs. None: 1e-5, or 8 units in the last place where the dtype is shorter than that.
            Integers, booleans and strings must always be equal.
        samples: How many inputs to generate; 0 compares on ``data`` alone.
        seed: Of the generated inputs.

    Raises:
        DataError: The models cannot run on the same inputs, have no output in common, or the first runs on
            none of the inputs.
        LaminaError: A model or the data cannot be used.
    """
    _check(tolerance, samples, data)
    first, second = capture(a), capture(b)
    first.require_tensors()
    second.require_tensors()
    structure = compare_structure(first, second)
    dataset = None if data is None else load_data(data, first)
    aim = Target.parse(target)
    backend = get_backend(aim)
    runs = backend.compile(first.model, aim), backend.compile(second.model, aim)
    names = [p.name for p in shared_outputs(first, second)]
    inputs = trials(dataset, probe_inputs(first, samples, seed=seed))
    tally = run_both(*runs, names, inputs, tolerance)
    if not tally.dtypes:
        raise _nothing_ran(tally, first)
    outputs = tuple(summarize(tally, name, tolerance) for name in names)
    return Comparison(
        equal=not structure.interface and not tally.failures and all(o.equal for o in outputs),
        tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        samples=tally.samples,
        skipped=tally.skipped,
        ill_conditioned=tally.ill_conditioned,
        failures=tuple(tally.failures),
        outputs=outputs,
        first_divergence=_locate(first, second, outputs, tally, tolerance, aim),
        structure=structure,
    )


def same_interface(first: Program, second: Program) -> None:
    """Check that two programs take and give the same names and dtypes.

    Raises:
        DataError: They do not.
    """
    for what, one, other in (
        ("inputs", first.inputs, second.inputs),
        ("outputs", first.outputs, second.outputs),
    ):
        if [(p.name, p.dtype) for p in one] != [(p.name, p.dtype) for p in other]:
            raise differing(what, one, other, f"{first.source} and {second.source}")


def damage(a: Any, b: Any, *, data: Any, metric: Any, target: str | Target = "ort:cpu") -> Mapping[str, Any]:
    """Score two models with one metric on the same samples; the difference with its 95 % interval."""
    from lamina.quality import damage_interval, evaluate, get_metric

    first, second = capture(a), capture(b)
    same_interface(first, second)
    dataset: Dataset = load_data(data, first)
    chosen, aim = get_metric(metric, first), Target.parse(target)
    chosen.check(dataset)
    backend = get_backend(aim)
    runs = [backend.compile(p.model, aim).run for p in (first, second)]
    reference = runs[0] if chosen.kind == "divergence" else None
    before, after = (evaluate(run, dataset, chosen, reference_run=reference) for run in runs)
    values = chosen.score(before), chosen.score(after)
    interval = damage_interval(chosen, before, after)
    return {
        "metric": chosen.name,
        "original": values[0],
        "optimized": values[1],
        "damage": chosen.damage(*values),
        "damage_ci95": None if interval is None else list(interval),
        "samples": len(dataset),
    }


def _check(tolerance: float | None, samples: int, data: Any) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise BudgetError(f"tolerance {tolerance} is not a number from 0 on", advice="write it like 1e-5")
    if samples < 0 or (samples == 0 and data is None):
        raise DataError(
            f"{samples} inputs to generate and no data leave nothing to compare on",
            advice="ask for at least 1 generated input, or give data",
        )


def _nothing_ran(tally: Tally, first: Program) -> DataError:
    said = f": {tally.errors[0].what.splitlines()[0]}" if tally.errors else ""
    return DataError(
        f"the first model runs on none of {tally.skipped} inputs{said}",
        where=first.source,
        advice="give data the model runs on",
    )


def _locate(
    first: Program,
    second: Program,
    outputs: Sequence[OutputDifference],
    tally: Tally,
    tolerance: float | None,
    target: Target,
) -> Divergence | None:
    """Look behind the output that differs most, on the input where it does."""
    wrong = [o for o in outputs if not o.equal]
    if not wrong:
        return None
    chosen = max(wrong, key=lambda o: o.max_rel)
    worst = tally.worst(chosen.name)
    if worst is None:
        return None
    return first_divergence(first, second, chosen.name, worst.trial.probe, tolerance, target)
