"""Score finished models on report data, which no search saw; every model scored there counts as a look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Executable, run_of, usable_cores
from lamina.data import Dataset
from lamina.planner.builder import Finalist
from lamina.planner.request import Request
from lamina.planner.space import Genome
from lamina.quality import damage_interval, evaluate


@dataclass(frozen=True)
class Verdict:
    """A finalist on report data.

    Attributes:
        finalist: What was scored.
        original: Metric of the original on report data.
        optimized: Metric of the finalist.
        damage: How much worse, in the budget's unit.
        interval: 95 % interval of ``damage``, or None where the metric has no per-sample parts.
        looks: How many finalists had been scored on report data by then, this one included.
    """

    finalist: Finalist
    original: float
    optimized: float
    damage: float
    interval: tuple[float, float] | None
    looks: int = 1


class Judge:
    """Scores finished models on report data, in a fresh session on the target; the original is scored once.

    All cores are used: quality does not depend on them. Where ranges are taken at run time it does depend on
    what shares a batch, so such models are scored in two compositions and the worse one counts.

    Raises:
        LaminaError: The original does not run on the report data.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._target = replace(request.draft, threads=max(request.draft.threads, usable_cores()))
        self._original = request.backend.compile(request.program.model, self._target)
        self._features = self._run(self._original, request.splits.report)
        self._known: dict[Genome, Verdict] = {}

    def score(self, finalist: Finalist) -> Verdict:
        """The verdict on a finished model; one seen before is not scored, or counted, again."""
        genome, request, metric = finalist.candidate.genome, self.request, self.request.metric
        if genome not in self._known:
            model = finalist.realized.program.model
            executable = request.backend.compile(model, self._target)
            before = metric.score(self._features)
            runs = [self._run(executable, data) for data in self._compositions(model)]
            after = max(runs, key=lambda features: metric.damage(before, metric.score(features)))
            value, looks = metric.score(after), len(self._known) + 1
            interval = damage_interval(metric, self._features, after, seed=request.seed)
            damage = metric.damage(before, value)
            self._known[genome] = Verdict(finalist, before, value, damage, interval, looks)
        return self._known[genome]

    def _compositions(self, model: ir.Model) -> list[Dataset]:
        report = self.request.splits.report
        dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.all_nodes())
        if not dynamic or report.fixed_batch or report.batch_size < 2 * report.group:
            return [report]
        return [report, replace(report, batch_size=report.batch_size // 2)]

    def _run(self, executable: Executable, data: Dataset) -> np.ndarray:
        reference = self._original.run if self.request.metric.kind == "divergence" else None
        run = executable.run if executable is self._original else run_of(executable)
        return evaluate(run, data, self.request.metric, reference_run=reference)
