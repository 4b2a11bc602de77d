"""Are two models the same function? Run both on the same inputs and say how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset, load_data, synthetic
from lamina.errors import DataError
from lamina.ir.capture import capture
from lamina.ir.program import Program


@dataclass(frozen=True)
class OutputDifference:
    """How one output differs, over all samples.

    Attributes:
        name: Output name.
        max_abs: Largest absolute difference.
        max_rel: ``max_abs`` over the largest magnitude of the first model's output.
        max_ulp: Largest difference in units in the last place of the first model's values; None for integers.
    """

    name: str
    max_abs: float
    max_rel: float
    max_ulp: float | None


@dataclass(frozen=True)
class Comparison:
    """The verdict.

    Attributes:
        equal: Whether every output agrees within ``tolerance`` of its largest magnitude.
        tolerance: Relative to the largest magnitude of the output.
        samples: How many samples both models ran.
        outputs: One entry an output.
    """

    equal: bool
    tolerance: float
    samples: int
    outputs: tuple[OutputDifference, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        return asdict(self)


def compare(
    a: Any, b: Any, *, data: Any = None, target: str | Target = "ort:cpu", tolerance: float = 1e-5
) -> Comparison:
    """Run two models on the same samples and compare every output.

    Args:
        a: The model to compare with: anything :func:`lamina.optimize` takes.
        b: The other one; it must have the same inputs and outputs.
        data: Samples; None: synthesized from the first model's shapes.
        target: Where both run.
        tolerance: Largest difference that counts as equal, relative to the output's largest magnitude.

    Raises:
        DataError: The interfaces differ.
        LaminaError: A model or the data cannot be used.
    """
    first, second = capture(a), capture(b)
    same_interface(first, second)
    dataset = synthetic(first, 16, 0) if data is None else load_data(data, first)
    aim = Target.parse(target)
    backend = get_backend(aim)
    runs = backend.compile(first.model, aim), backend.compile(second.model, aim)
    worst: dict[str, list[float]] = {p.name: [0.0, 0.0, 0.0] for p in first.outputs}
    for batch in dataset.batches():
        before, after = (run.run(batch.inputs) for run in runs)
        for name, row in worst.items():
            _update(row, before[name], after[name])
    outputs = tuple(_difference(name, row, first) for name, row in worst.items())
    equal = all(o.max_rel <= tolerance for o in outputs)
    return Comparison(equal, tolerance, len(dataset), outputs)


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
            raise DataError(
                f"the models' {what} differ: {[p.name for p in one]} and {[p.name for p in other]}",
                where=f"{first.source} and {second.source}",
                advice="compare models with the same interface",
            )


def _update(row: list[float], before: np.ndarray, after: np.ndarray) -> None:
    if before.shape != after.shape:
        row[0] = row[2] = float("inf")
        return
    a, b = before.astype(np.float64), after.astype(np.float64)
    apart = np.abs(a - b)
    apart = np.where(np.isnan(a) & np.isnan(b), 0.0, np.where(np.isnan(apart), np.inf, apart))
    apart = np.where(a == b, 0.0, apart)
    row[0] = max(row[0], float(apart.max(initial=0.0)))
    row[1] = max(row[1], float(np.abs(a[np.isfinite(a)]).max(initial=0.0)))
    if np.issubdtype(before.dtype, np.floating):
        row[2] = max(row[2], float((apart / np.spacing(np.abs(before)).astype(np.float64)).max(initial=0.0)))


def _difference(name: str, row: list[float], program: Program) -> OutputDifference:
    floating = next(p for p in program.outputs if p.name == name).dtype.is_floating_point()
    relative = row[0] / row[1] if row[1] > 0 else (0.0 if row[0] == 0 else float("inf"))
    return OutputDifference(name, row[0], relative, row[2] if floating else None)


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
