"""Scores for the depth study: reference models on their data, padding cut away, latency beside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lamina.analysis.needs import DEFAULT_MASK
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.data.splitting import load_splits
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.fold import fold
from lamina.planner.timing import Stopwatch
from lamina.quality import Metric, damage_interval, evaluate, get_metric
from lamina.quality.evaluation import reference_outputs
from lamina.workload import parse_workload
from tools.bench.cases import Case

TARGET = Target.parse("ort:cpu?threads=1")
# Padded data is scored in so many parts of about equal length.
PARTS = 4
# Of padded calibration data, rows of at most this quantile of length are fitted on.
SHORT = 0.9
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Judged:
    """One program on one set of samples: per-sample features of the metric and of the divergence."""

    metric: np.ndarray
    divergence: np.ndarray


class Judge:
    """Scores programs against the original on one set of samples.

    Args:
        original: What outputs are compared with; run once.
        data: Samples.
        metric: The task's metric.
        divergence: How far outputs are from the original's.
    """

    def __init__(self, original: Program, data: Dataset, metric: Metric, divergence: Metric) -> None:
        self.metric, self.divergence, self.samples = metric, divergence, data.samples
        self._parts = by_length(data)
        run = runner(original)
        self._references = [reference_outputs(run, part) for part in self._parts]
        self.original = self._judged(self._references)

    def __call__(self, program: Program) -> Judged:
        """Run the program on all samples."""
        run = runner(program)
        return self._judged([reference_outputs(run, part) for part in self._parts])

    def diverges(self, program: Program) -> float:
        """Divergence alone, one number."""
        return self.divergence.score(self(program).divergence)

    def report(self, found: Judged) -> dict[str, Any]:
        """Score, damage with its interval, and divergence."""
        scores = [self.metric.score(x.metric) for x in (self.original, found)]
        interval = damage_interval(self.metric, self.original.metric, found.metric)
        return {
            "report": scores[1],
            "damage": self.metric.damage(*scores),
            "damage_ci95": None if interval is None else list(interval),
            "divergence": self.divergence.score(found.divergence),
        }

    def _judged(self, outputs: Sequence[list[Outputs]]) -> Judged:
        def features(metric: Metric) -> np.ndarray:
            made = []
            for part, run, reference in zip(self._parts, outputs, self._references, strict=True):
                replay = iter(run)
                made.append(evaluate(lambda _, r=replay: next(r), part, metric, reference))  # type: ignore[misc]
            return np.concatenate(made)

        return Judged(features(self.metric), features(self.divergence))


def runner(program: Program) -> Callable[[Mapping[str, np.ndarray]], Any]:
    """Runs the program as it would ship."""
    return get_backend(TARGET).compile(program.model, TARGET).run


def by_length(data: Dataset) -> list[Dataset]:
    """The samples in parts of about equal length, padding cut off; one part without masks."""
    lengths = _lengths(data)
    if lengths is None:
        return [data]
    order = np.argsort(lengths, kind="stable")
    return [_cut(data.rows(part)) for part in np.array_split(order, PARTS) if len(part)]


def short(data: Dataset) -> Dataset:
    """The samples of at most the :data:`SHORT` quantile of length, padding behind the longest cut off."""
    lengths = _lengths(data)
    if lengths is None:
        return data
    return _cut(data.rows(np.flatnonzero(lengths <= np.quantile(lengths, SHORT))))


def _lengths(data: Dataset) -> np.ndarray | None:
    """Tokens of each sample's longest row."""
    mask = data.inputs.get(DEFAULT_MASK)
    if mask is None:
        return None
    found: np.ndarray = (mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)).reshape(-1, data.group).max(1)
    return found


def _cut(data: Dataset) -> Dataset:
    lengths = _lengths(data)
    if lengths is None:
        return data
    width, longest = data.inputs[DEFAULT_MASK].shape[1], int(lengths.max())
    cut = {k: v[:, :longest] if v.ndim == 2 and v.shape[1] == width else v for k, v in data.inputs.items()}
    return replace(data, inputs={k: np.ascontiguousarray(v) for k, v in cut.items()})


@dataclass(frozen=True)
class Study:
    """One reference model with all that its rows are scored by."""

    case: Case
    program: Program
    calibration: Dataset
    order: Judge
    report: Judge

    @staticmethod
    def of(case: Case, order_samples: int, report_samples: int | None, forms: Sequence[str] = ()) -> Study:
        """Capture, fold (with equivalent ``forms``), and run the original once."""
        program, _, _ = fold(capture(str(case.path)), forms=forms)
        splits = load_splits(case.load(), program, batch_size=case.batch_size)
        metric = get_metric(case.metric, program)
        divergence = get_metric(metric.divergence, program)
        some = evenly(splits.selection, order_samples)
        report = evenly(splits.report, report_samples or splits.report.samples)
        judges = (Judge(program, data, metric, divergence) for data in (some, report))
        return Study(case, program, short(splits.calibration), *judges)

    def latency(self, program: Program, seconds: float = 2.0) -> dict[str, Any]:
        """CPU time over the original's."""
        workload = parse_workload(self.case.workload, self.program, self.calibration)
        with (
            tempfile.TemporaryDirectory() as folder,
            Stopwatch(get_backend(TARGET), TARGET, workload, self.program.model, Path(folder)) as stopwatch,
        ):
            (found,) = stopwatch.compare([program.model], seconds=seconds)
        return {"latency": found.ratio, "latency_spread": [found.low, found.high]}


def evenly(data: Dataset, count: int) -> Dataset:
    return data.rows(np.linspace(0, data.samples - 1, min(count, data.samples)).astype(np.int64))
