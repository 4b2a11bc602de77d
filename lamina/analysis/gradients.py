"""Sensitivity of weighted operators from gradients: ``hawq-trace`` and ``fisher-diagonal``.

They need the ``torch`` extra; this module itself imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.analysis.gradient_estimates import Estimate
from lamina.analysis.gradient_operators import WeightedOperator, quantization_error, weighted_operators
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.fx import require_torch
from lamina.ir.program import Program

GRADIENT_METRICS = ("hawq-trace", "fisher-diagonal")
CURVATURES = ("hessian", "gauss-newton")
SAMPLES = 64
DRAWS = 4


@dataclass(frozen=True)
class OperatorGradients:
    """What derivatives say about one weighted operator.

    Attributes:
        operator: Its node, weight and channel axis.
        parameters: Elements of the weight.
        trace: ``tr(H_l)``, the trace of this weight's block of the Hessian; None where not asked for.
        hawq: Bits -> ``hawq-trace``; its error is that of the trace.
        fisher: ``fisher-diagonal``; None where not asked for.
    """

    operator: WeightedOperator
    parameters: int
    trace: Estimate | None = None
    hawq: Mapping[int, Estimate] = field(default_factory=dict)
    fisher: Estimate | None = None


@dataclass(frozen=True)
class GradientResult:
    """Gradient metrics of a program.

    Attributes:
        operators: In graph order; an operator of two weights has two entries. Operators that share a weight
            have the same numbers: derivatives by a shared weight cannot be told apart.
        loss: Name of the loss that was differentiated.
        curvature: One of :data:`CURVATURES`.
        samples: Samples used.
        draws: Random probes a batch.
        seconds: What it took.
    """

    operators: tuple[OperatorGradients, ...]
    loss: str
    curvature: str
    samples: int
    draws: int
    seconds: float


def gradient_metrics(
    program: Program,
    dataset: Dataset,
    metrics: Sequence[str] = GRADIENT_METRICS,
    bits: Sequence[int] = (8, 4),
    loss: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    *,
    draws: int = DRAWS,
    curvature: str | None = None,
    device: str = "cpu",
    precision: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> GradientResult:
    """Compute gradient metrics of every weighted operator.

    ``hawq-trace``: ``s_{l,b} = (tr(H_l) / n_l) L2(Q_b(W_l) - W_l)^2``, H_l the Hessian of the mean loss by
    the weight, n_l its elements, Q_b symmetric rounding with a scale a channel; >= 0 at a minimum (a trace
    can be negative where the loss is not convex); higher = more important: it wants more bits. Source: Dong
    et al. 2020 (HAWQ-V2), arXiv:1911.03852. Deviates: H is its Gauss-Newton
    part by default; one probe over all layers.

    ``fisher-diagonal``: mean over samples and elements of the squared gradient of the log-likelihood; >= 0;
    higher = more important. Source: Lodha et al. 2023, On Surgical Fine-tuning for Language Encoders,
    arXiv:2310.17041.

    Args:
        program: Left unchanged.
        dataset: Calibration data; batches bound the memory.
        metrics: Which of :data:`GRADIENT_METRICS`.
        bits: Widths for ``hawq-trace``, 2 to 16.
        loss: See :func:`lamina.analysis.gradient_loss.choose_loss`.
        samples: At most so many samples, the first of the data.
        seed: Of the probes and of drawn targets.
        draws: Probes a batch for ``hawq-trace``.
        curvature: ``hessian``, or ``gauss-newton`` for the part of it that is never negative: the same matrix
            where the model's own answer is the target, and far less noise with many layers (docs/fx.md). None
            is ``gauss-newton``, but ``hessian`` for a loss of one's own.
        device: torch device to run on.
        precision: Floating torch dtype in place of the program's own, or None.
        progress: Called after each batch with the samples done and in all, of both metrics together.

    Raises:
        DataError: Unknown metric, bits, curvature, loss or labels; or no data.
        UnsupportedOperator: The program has no FX form.
        MissingTorch: torch is not installed.
    """
    _check(metrics, bits, samples, draws, dataset)
    if curvature not in (None, *CURVATURES):
        raise DataError(f"curvature '{curvature}' is unknown", advice=f"there are {', '.join(CURVATURES)}")
    require_torch()
    from lamina.analysis import gradient_probes as probes
    from lamina.analysis.gradient_loss import choose_loss

    start = time.perf_counter()
    data = dataset.rows(slice(0, samples))
    operators = weighted_operators(program)
    chosen = choose_loss(program, data, loss)
    curvature = curvature or ("hessian" if chosen.function is not None else "gauss-newton")
    model = probes.Differentiable(program, [o.weight for o in operators], device, precision)
    traces: Mapping[str, Estimate] = {}
    fishers: Mapping[str, Estimate] = {}
    tell = _counted(progress, data.samples * len(set(metrics)))
    if "hawq-trace" in metrics:
        traces = probes.traces(model, data, chosen, draws, seed, curvature, tell)
    if "fisher-diagonal" in metrics:
        fishers = probes.fisher_diagonals(model, data, chosen, seed, tell)
    found = tuple(
        _of_operator(program, o, traces, fishers, bits) for o in operators if o.weight in model.weights
    )
    return GradientResult(found, chosen.name, curvature, data.samples, draws, time.perf_counter() - start)


def _counted(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Adds up the samples of batches for ``progress``."""
    done = 0

    def tell(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    return tell


def _check(metrics: Sequence[str], bits: Sequence[int], samples: int, draws: int, dataset: Dataset) -> None:
    unknown = [m for m in metrics if m not in GRADIENT_METRICS]
    if unknown:
        what = f"gradient metric '{unknown[0]}' is unknown"
        raise DataError(what, advice=f"there are {', '.join(GRADIENT_METRICS)}")
    strange = [b for b in bits if not 2 <= b <= 16]
    if strange:
        raise DataError(f"{strange[0]} is no bit width", advice="give widths from 2 to 16")
    if samples < 1 or draws < 1 or not dataset.samples:
        what = f"{dataset.samples} samples, of which {samples} are wanted, with {draws} draws"
        raise DataError(what, advice="give at least one sample and one draw, better 64 and 4")


def _of_operator(
    program: Program,
    operator: WeightedOperator,
    traces: Mapping[str, Estimate],
    fishers: Mapping[str, Estimate],
    bits: Sequence[int],
) -> OperatorGradients:
    tensor = program.graph.initializers[operator.weight].const_value
    assert tensor is not None
    trace, fisher = traces.get(operator.weight), fishers.get(operator.weight)
    hawq = {}
    if trace is not None:
        array = tensor.numpy()
        errors = {b: quantization_error(array, operator.channel_axis, b) for b in bits}
        hawq = {b: trace.times(e / tensor.size) for b, e in errors.items()}
    return OperatorGradients(operator, tensor.size, trace, hawq, fisher)
