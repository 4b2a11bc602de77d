"""What every metric says of every site, what that cost, and on how many samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lamina.analysis.gradient_operators import weighted_operators
from lamina.analysis.gradient_trace import gradient_trace
from lamina.analysis.gradients import gradient_metrics
from lamina.analysis.instrument import InstrumentedSession, feeds_of
from lamina.analysis.metrics import FORWARD_METRICS, Metric
from lamina.analysis.needs import Need
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import skip_effect
from lamina.analysis.statistics import Statistics, collect
from lamina.analysis.weight_error import output_error_at, quantization_error, round_to_nearest
from lamina.data import Dataset
from lamina.errors import LaminaError
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from tools.studies.metric_trust.subjects import Subject
from tools.studies.metric_trust.truth import WIDTHS, Variants, measure

BITS = (*(f"w{b}" for b in WIDTHS), "w4 blocks", "w8a8")
SIZES = (4, 8, 16, 32, 64, 128)
# Samples of a small measured run that stands in for the full one.
FEW = (8, 32)
# Kinds of change that gradient-trace rates: each site costs a backward run of a whole changed model.
TRACED = ("drop", "w4")
_TRACE_SAMPLES = 8
_GRADIENT_SAMPLES = (8, 16, 32, 64)
Harms = Mapping[str, float]


@dataclass
class Rating:
    """One metric's prediction.

    Attributes:
        metric: Its name.
        truths: Kinds of change it is held against.
        values: Samples -> site -> predicted harm (higher: worse to change).
        seconds: One thread, on the largest sample.
        samples: The largest sample; 0 where it reads no data.
    """

    metric: str
    truths: Sequence[str]
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {str(n): {k: float(v) for k, v in found.items()} for n, found in self.values.items()}
        return {**vars(self), "truths": list(self.truths), "values": values}


def plain_run_seconds(subject: Subject) -> float:
    """One thread, one run over the calibration data."""
    names = [p.name for p in subject.program.outputs]
    session = InstrumentedSession(subject.program, names, threads=1)
    start = time.perf_counter()
    for batch in subject.calibration.batches():
        session.run(names, feeds_of(subject.program, batch))
    return time.perf_counter() - start


def forward(subject: Subject) -> Iterator[Rating]:
    """Metrics of one instrumented run, each collected alone so that its seconds are its own.

    Branch metrics are held against drops as they are, and against bits with every operator rated as the
    innermost branch it is in; operator metrics are held against bits.
    """
    program, data = subject.program, subject.calibration
    branches = find_branches(program).branches
    probes = [BranchProbe.of(b) for b in branches]
    owner: dict[str, str] = {}
    for branch in sorted(branches, key=lambda b: -len(b.nodes)):
        owner.update(dict.fromkeys(branch.nodes, branch.name))
    operators = [o.name for o in weighted_operators(program)]
    for metric, truths in _forward_metrics():
        if metric.about != "operator" and not probes:
            continue
        rating = Rating(metric.name, truths if metric.about == "operator" else ("drop",))
        for size in _sizes(data):
            start = time.perf_counter()
            statistics = _collected(program, data.rows(slice(0, size)), probes, metric.needs)
            values = metric.rate(program, statistics)
            rating.seconds, rating.samples = time.perf_counter() - start, size
            rating.values[size] = {n: -metric.redundancy(v) for n, v in values.items()}
        yield rating
        if metric.about == "operator":
            continue
        inside = {
            size: {o: found[owner[o]] for o in operators if owner.get(o) in found}
            for size, found in rating.values.items()
        }
        if any(inside.values()):
            yield Rating(metric.name, BITS, inside, rating.seconds, rating.samples)


def _forward_metrics() -> Iterator[tuple[Metric, Sequence[str]]]:
    """The registry's, and two that follow the width: output error, and weight error, which reads no data."""
    for metric in FORWARD_METRICS:
        yield metric, BITS
    source = "exact relative error of rounding to the width that is judged"
    for bits in WIDTHS:
        truths = [t for t in BITS if t.startswith(f"w{bits}")]
        rate = output_error_at(bits)
        yield Metric("quantization-error, own width", "operator", "sensitive", source, _INPUTS, rate), truths
        rate = _weight_error_at(bits)
        yield Metric("weight error, own width", "operator", "sensitive", source, _INPUTS, rate), truths


_INPUTS = frozenset({Need.INPUTS})


def _weight_error_at(bits: int) -> Callable[[Program, Statistics], Harms]:
    def rate(program: Program, statistics: Statistics) -> Harms:
        return {
            name: quantization_error(
                statistics.operators[name], program, seen, round_to_nearest(bits)
            ).weight
            for name, seen in statistics.inputs.items()
        }

    return rate


def _collected(
    program: Program, data: Dataset, probes: Sequence[BranchProbe], needs: frozenset[Need]
) -> Statistics:
    return collect(program, data, branches=probes, needs=needs, threads=1)


def gradients(subject: Subject) -> Iterator[Rating]:
    """hawq-trace at each width, and fisher-diagonal, each alone; an operator of two weights has their sum."""
    sizes = sorted({min(n, subject.calibration.samples) for n in _GRADIENT_SAMPLES})
    hawq = {bits: Rating("hawq-trace", [t for t in BITS if t.startswith(f"w{bits}")]) for bits in WIDTHS}
    fisher = Rating("fisher-diagonal", BITS)
    for name, ratings in (("hawq-trace", [*hawq.values()]), ("fisher-diagonal", [fisher])):
        for size in sizes:
            result = gradient_metrics(subject.program, subject.calibration, (name,), WIDTHS, samples=size)
            for rating in ratings:
                rating.seconds, rating.samples, rating.values[size] = result.seconds, size, {}
            for found in result.operators:
                site = found.operator.name
                for bits, rating in hawq.items() if name == "hawq-trace" else ():
                    values = rating.values[size]
                    values[site] = values.get(site, 0.0) + found.hawq[bits].mean
                if name == "fisher-diagonal" and found.fisher is not None:
                    fisher.values[size][site] = fisher.values[size].get(site, 0.0) + found.fisher.mean
    yield from hawq.values()
    yield fisher


def traced(subject: Subject, kind: str, variants: Variants) -> Rating:
    """gradient-trace of every variant: 1 - correlation of its gradients with the original's."""
    start = time.perf_counter()
    data = subject.calibration.rows(slice(0, _TRACE_SAMPLES))
    values = {
        name: 1.0 - gradient_trace(subject.program, variant, data, samples=_TRACE_SAMPLES).score
        for name, variant in variants.items()
    }
    seconds = time.perf_counter() - start
    return Rating("gradient-trace", [kind], {data.samples: values}, seconds, data.samples)


def measured(subject: Subject, kind: str, variants: Variants) -> Iterator[Rating]:
    """The competitor: damage itself, on few calibration samples; and for drops, skip-effect."""
    for count in FEW:
        data = subject.calibration.rows(slice(0, count))
        found = measure(subject.program, variants, data, None)
        values = {data.samples: found["divergence"]}
        yield Rating(f"output divergence, {count} samples", [kind], values, found["seconds"], data.samples)
    if kind != "drop":
        return
    probes = [BranchProbe.of(b) for b in find_branches(subject.program).branches]
    rating = Rating("skip-effect", ["drop"])
    for size in [n for n in _sizes(subject.calibration) if n <= 32]:
        start = time.perf_counter()
        data = subject.calibration.rows(slice(0, size))
        effects = skip_effect(subject.program, variants, data, probes, threads=1)
        rating.values[size] = {n: float(np.mean(list(e.values()))) for n, e in effects.items() if e}
        rating.seconds, rating.samples = time.perf_counter() - start, size
    yield rating


def baselines(subject: Subject, kind: str, sites: Sequence[str]) -> Iterator[Rating]:
    """What needs no data: earlier is worse, larger is worse, and chance."""
    branches = {b.name: b for b in find_branches(subject.program).branches}
    weights = subject.program.graph.initializers
    sizes: dict[str, float] = {}
    order = {node.name or "": i for i, node in enumerate(subject.program.graph)}
    if kind == "drop":
        sizes = {n: float(branches[n].parameters) for n in sites}
        order = {n: order[b.add] for n, b in branches.items()}
    else:
        for operator in weighted_operators(subject.program):
            tensor = weights[operator.weight].const_value
            assert tensor is not None
            sizes[operator.name] = sizes.get(operator.name, 0.0) + float(tensor.size)
    rng = np.random.default_rng(len(sites))
    yield Rating("baseline: earlier is worse", [kind], {0: {n: -float(order[n]) for n in sites}})
    yield Rating("baseline: more parameters are worse", [kind], {0: {n: sizes[n] for n in sites}})
    yield Rating("baseline: random", [kind], {0: dict(zip(sites, rng.random(len(sites)), strict=True))})


def attempt(make: Callable[[], Iterator[Rating] | Rating], told: dict[str, str], name: str) -> list[Rating]:
    """The ratings, or none and the reason in ``told`` where lamina refuses."""
    try:
        found = make()
        return [found] if isinstance(found, Rating) else list(found)
    except LaminaError as error:
        told[name] = str(error).splitlines()[0]
        return []


def _sizes(data: Dataset) -> list[int]:
    return sorted({min(n, data.samples) for n in SIZES})
