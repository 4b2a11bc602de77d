"""The driver: capture, fold, find, analyze, price, plan, apply, verify, measure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.backends import get_backend
from lamina.backends.backend import Backend, Target, Workload
from lamina.budget import Budget
from lamina.data import Splits, load_splits
from lamina.errors import LaminaError
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes import get_transform, transform_names
from lamina.planner.finish import Finalist, choose
from lamina.planner.forms import pick_forms
from lamina.planner.plan import Plan
from lamina.planner.prepare import Prepared, prepare
from lamina.planner.search import Candidate, Search
from lamina.progress import Progress
from lamina.quality import Metric, get_metric
from lamina.result import Result, read_plan
from lamina.workload import parse_workload


@dataclass(frozen=True)
class Request:
    """Everything the user asked for, understood and checked."""

    program: Program
    budget: Budget
    splits: Splits
    synthetic_data: bool
    metric: Metric
    target: Target
    backend: Backend
    workload: Workload
    transforms: tuple[str, ...]
    minimize: str | None
    seconds: float
    seed: int
    progress: Progress


def optimize(
    model: Any,
    budget: str | Budget | None = None,
    *,
    data: Any = None,
    metric: Any = None,
    target: str | Target = "ort:cpu",
    workload: Any = None,
    transforms: Sequence[str] | None = None,
    minimize: str | None = None,
    seconds: float = 120.0,
    seed: int = 0,
    batch_size: int = 32,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
    **bounds: Any,
) -> Result:
    """Make a model smaller and faster within a measured budget.

    Args:
        model: A path, ``onnx.ModelProto``, ``onnx_ir.Model``, ``torch.nn.Module`` (with ``example_inputs``),
            ``torch.export.ExportedProgram`` or ``torch.fx.GraphModule``.
        budget: ``"latency<=0.5x, size<=10MB, drop<=1%"``; or keywords: ``latency="0.5x", drop="1%"``.
        data: ``.npz`` path, a directory of them, arrays by input name, or any iterable of samples; or a
            mapping ``{"calibration": ..., "selection": ..., "report": ...}``. None: synthesized inputs.
        metric: ``top1``, ``perplexity``, ``cross-entropy``, ``spearman``, ``cosine``, ``kl``,
            ``module:function`` or a callable ``f(outputs, data) -> float`` (higher is better). None: output divergence.
        target: ``ort:cpu?threads=2``, ``tvm:llvm?threads=2``.
        workload: Shapes that matter, ``"1x128@0.2; 1x1@0.8"``. None: batch 1.
        transforms: Names of transforms to use; all by default.
        minimize: Overrides what is minimized: ``latency``, ``size``, ``flops``, ``memory`` or ``damage``.
        seconds: Time for measuring candidates (pricing, statistics and final timing come on top).
        seed: Of data splits and search.
        batch_size: Rows a run gets during evaluation.
        example_inputs: For torch modules: a tensor, tuple or dict.
        dynamic_shapes: For torch modules, as ``torch.export`` takes them.
        progress: Receives progress.
        **bounds: Budget bounds as keywords.

    Returns:
        The result; ``result.save(directory)`` writes it.

    Raises:
        InfeasibleBudget: Nothing found meets the budget; carries the nearest plans.
        LaminaError: Model, data, budget, metric, target or workload is not usable.
    """
    progress = progress or Progress()
    with progress.stage("capture"):
        program = capture(model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
        splits = load_splits(data, program, seed=seed, batch_size=batch_size)
        aim = Target.parse(target)
        names = tuple(transforms) if transforms is not None else transform_names()
        for name in names:
            get_transform(name)
        request = Request(
            program,
            Budget.parse(budget, **bounds),
            splits,
            data is None,
            get_metric(metric, program),
            aim,
            get_backend(aim),
            parse_workload(workload, program, splits.selection),
            names,
            minimize,
            seconds,
            seed,
            progress,
        )
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        return _optimize(request, Path(folder))


def _optimize(request: Request, folder: Path) -> Result:
    progress = request.progress
    with progress.stage("fold"):
        forms = pick_forms(request.program, request.backend, request.target, request.workload, folder, progress)
    prepared = prepare(request, forms, folder)
    with progress.stage("search"):
        candidates = find_candidates(request, prepared)
    with progress.stage("verify"):
        finalist = choose(request, prepared, candidates, folder)
    return report(request, prepared, finalist, candidates)
