"""Latency of finished models relative to the original: isolated, in alternation, weighted by the workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from lamina.backends.backend import Backend, Latency, Target, Workload
from lamina.backends.measure import Ratio, Timings
from lamina.ir.io import save_model


@dataclass(frozen=True)
class Relative:
    """How a model's latency compares with the original's.

    Attributes:
        ratio: Weighted mean over cases of time / original's time; below 1 is faster.
        low: 10th percentile over rounds, weighted likewise.
        high: 90th percentile.
        cases: Case name -> its own ratio.
    """

    ratio: float
    low: float
    high: float
    cases: dict[str, Ratio]

    @property
    def slower_somewhere(self) -> bool:
        """Whether any case is slower than the original beyond the noise of the measurement."""
        return any(r.median > 1.0 and r.low > 0.98 for r in self.cases.values())

    @property
    def clearly_slower_somewhere(self) -> bool:
        """Whether any case is slower by more than two measurements of one model differ."""
        return any(r.median > 1.03 and r.low > 1.0 for r in self.cases.values())


class Stopwatch:
    """Times models against the original; each lives in its own process while it is compared.

    What other work the machine does must not decide: where one thread does all the work its CPU time counts,
    which on an idle machine is the wall time, and wall time elsewhere.

    Args:
        backend: The target's backend.
        target: Where the models run.
        workload: Cases.
        original: The original model; it is kept loaded.
        folder: Where models are written for the workers.
        seed: Of the order within rounds.
    """

    def __init__(
        self,
        backend: Backend,
        target: Target,
        workload: Workload,
        original: ir.Model,
        folder: Path,
        seed: int = 0,
    ) -> None:
        self.workload, self.folder = workload, folder
        self._count = 0
        self.timer = backend.timer(target, workload, seed=seed)
        self.original = self.timer.add(self.write(original))
        self.baseline_s = self._original_seconds(seconds=1.0)

    @property
    def clock(self) -> str:
        """``cpu`` or ``wall``: what the figures count."""
        return "cpu" if self.timer.counts_cpu else "wall"

    def write(self, model: ir.Model) -> Path:
        """Save a model where a worker process can load it."""
        self._count += 1
        path = self.folder / f"candidate{self._count}.onnx"
        save_model(model, path)
        return path

    def compare(self, models: Sequence[ir.Model], *, seconds: float) -> list[Relative]:
        """Time models and the original in turn for about ``seconds``; their processes end afterwards."""
        ids = self.timer.add_all([self.write(model) for model in models])
        try:
            timings = self.timer.time([self.original, *ids], None, seconds, cpu=True)
        finally:
            for number in ids:
                self.timer.remove(number)
        return [self._relative(timings, number) for number in ids]

    def latencies(self, model: ir.Model, *, seconds: float) -> tuple[list[Latency], list[Latency], Relative]:
        """Original's and model's latency per case from one alternating measurement, and their ratio."""
        number = self.timer.add(self.write(model))
        timings = self.timer.time([self.original, number], None, seconds, cpu=True)
        self.timer.remove(number)
        before = [timings.latency(self.original, case.name) for case in self.workload]
        after = [timings.latency(number, case.name) for case in self.workload]
        return before, after, self._relative(timings, number)

    def _original_seconds(self, *, seconds: float) -> list[float]:
        """Median latency of the original on each case."""
        timings = self.timer.time([self.original], None, seconds, cpu=True)
        return [timings.latency(self.original, case.name).median_s for case in self.workload]

    def _relative(self, timings: Timings, number: int) -> Relative:
        cases = {case.name: timings.ratio(number, self.original, case.name) for case in self.workload}
        weights = {case.name: case.weight for case in self.workload}
        return Relative(
            sum(weights[n] * r.median for n, r in cases.items()),
            sum(weights[n] * r.low for n, r in cases.items()),
            sum(weights[n] * r.high for n, r in cases.items()),
            cases,
        )

    def close(self) -> None:
        """End every process."""
        self.timer.close()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
