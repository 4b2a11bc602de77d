"""``gradient-trace``: how alike a candidate's loss gradients are to the base model's, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.analysis.gradient_estimates import Estimate
from lamina.analysis.gradient_operators import weighted_operators
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.fx import require_torch
from lamina.ir.program import Program

SAMPLES = 64


@dataclass(frozen=True)
class GradientTrace:
    """Correlation of gradients.

    Attributes:
        score: Mean over the matched weights, in -1..1; higher = better.
        weights: Initializer -> correlation over batches, for weights that both programs have in one shape.
        unmatched: Weights of the base program that the candidate lacks or has in another shape.
        loss: Name of the loss.
    """

    score: float
    weights: Mapping[str, Estimate]
    unmatched: tuple[str, ...]
    loss: str


def gradient_trace(
    base: Program,
    candidate: Program,
    dataset: Dataset,
    loss: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    *,
    device: str = "cpu",
    precision: Any = None,
) -> GradientTrace:
    """Compare the loss gradients of a candidate with those of the base model.

    For each weight both have, Pearson's correlation of the two gradients over the weight's elements, on each
    batch; the mean over batches is the weight's, the mean over weights the score. Correlation has no scale:
    a candidate whose gradients are all twice as long scores the same. Range -1..1, higher = better; 1 for the
    base model itself. Where a gradient is constant over a weight (all zero, for example) it is 0. Weights are
    matched by name, as lamina's transforms keep it; what is not matched counts for nothing, so compare
    candidates of one budget.

    Without labels or tokens the targets are drawn from the base model's own prediction (:meth:`Loss.draw`),
    the same for both: its own answer would have a gradient of zero.

    Source: TraceNAS; form derived from its abstract: scale-free correlation of per-layer gradients on few
    batches. Deviates: weights of other widths are left out instead of cut to fit.

    Args:
        base: The original.
        candidate: Made of it; the same inputs and outputs.
        dataset: Batches of it are compared one by one.
        loss: See :func:`lamina.analysis.gradient_loss.choose_loss`, chosen for ``base``.
        samples: At most so many samples, the first of the data.
        seed: Of drawn targets.
        device: torch device to run on.
        precision: Floating torch dtype in place of the programs' own, or None.

    Raises:
        DataError: No weight is common to both, or the loss does not fit.
        UnsupportedOperator: A program has no FX form.
        MissingTorch: torch is not installed.
    """
    require_torch()
    import torch

    from lamina.analysis.gradient_estimates import Running
    from lamina.analysis.gradient_loss import choose_loss
    from lamina.analysis.gradient_probes import Differentiable

    data = dataset.rows(slice(0, samples))
    chosen = choose_loss(base, data, loss)
    names = _common(base, candidate)
    if not names:
        what = "base and candidate have no weight in common"
        raise DataError(what, advice="give a candidate made from the base by lamina: names must be kept")
    models = [Differentiable(p, names, device, precision) for p in (base, candidate)]
    running = {name: Running() for name in names if all(name in m.weights for m in models)}
    generator = torch.Generator().manual_seed(seed)
    for batch in data.batches():
        outputs = [m.outputs(batch) for m in models]
        target = chosen.draw(outputs[0], generator)
        first, second = (
            m.gradients(chosen.per_sample(o, batch, target).mean())
            for m, o in zip(models, outputs, strict=True)
        )
        for name, r in running.items():
            r.add(_correlation(first[name], second[name]), batch.samples)
    weights = {name: r.estimate() for name, r in running.items()}
    score = sum(e.mean for e in weights.values()) / len(weights)
    unmatched = tuple(dict.fromkeys(o.weight for o in weighted_operators(base) if o.weight not in weights))
    return GradientTrace(score, weights, unmatched, chosen.name)


def _common(base: Program, candidate: Program) -> list[str]:
    shapes = [
        {o.weight: tuple(p.graph.initializers[o.weight].const_value.shape) for o in weighted_operators(p)}  # type: ignore[union-attr]
        for p in (base, candidate)
    ]
    return [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]


def _correlation(a: Any, b: Any) -> float:
    """Pearson's coefficient of two tensors' elements, in float64."""
    x, y = (t.double().flatten() - t.double().mean() for t in (a, b))
    length = float(x.norm() * y.norm())
    return float((x * y).sum()) / length if length > 0 else 0.0
