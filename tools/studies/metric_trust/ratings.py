"""What every metric says of every site, and what that cost, on all of the calibration data and on halves."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lamina.analysis.gradient_operators import quantization_error, weighted_operators
from lamina.analysis.gradient_trace import gradient_trace
from lamina.analysis.gradients import gradient_metrics
from lamina.analysis.instrument import InstrumentedSession, feeds_of
from lamina.analysis.metrics import FORWARD_METRICS, Metric
from lamina.analysis.needs import Need
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import skip_effect
from lamina.analysis.statistics import Statistics, collect
from lamina.analysis.weight_error import output_error_at
from lamina.data import Dataset
from lamina.errors import LaminaError
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from tools.studies.metric_trust.subjects import Subject
from tools.studies.metric_trust.truth import BITS, WIDTHS, Measured, Variants, measure

ALL, HALVES = "all", ("first half", "second half")
# Calibration samples of the measurements that stand in for the truth, and of a metric that takes gradients.
FEW = (1, 4, 16, 64)
GRADIENT_SAMPLES = 32
SKIP_SAMPLES = 16
# gradient-trace differentiates a whole changed model a site: so many sites at most, on so many samples.
TRACED = ("drop", "w4")
TRACED_SITES, TRACED_SAMPLES = 12, 8
BASELINES = ("baseline: earlier is worse", "baseline: more parameters are worse")
Harms = Mapping[str, float]


@dataclass
class Rating:
    """One metric's prediction.

    Attributes:
        metric: Its name.
        truths: Kinds of change it is held against.
        values: ``all`` and the two halves of its data -> site -> predicted harm (higher: worse to change).
        seconds: CPU, one thread, on all of its data.
        samples: How many that are; 0 where it reads none.
    """

    metric: str
    truths: Sequence[str]
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {part: {k: float(v) for k, v in found.items()} for part, found in self.values.items()}
        return {**vars(self), "truths": list(self.truths), "values": values}


def parts_of(data: Dataset) -> dict[str, Dataset]:
    """All of the data and its two halves, which have no sample in common."""
    middle = data.samples // 2
    return {
        ALL: data,
        HALVES[0]: data.rows(slice(0, middle)),
        HALVES[1]: data.rows(slice(middle, 2 * middle)),
    }


def plain_run_seconds(subject: Subject) -> float:
    """CPU seconds of one run over the calibration data on one thread: the smaller of two."""
    names = [p.name for p in subject.program.outputs]
    session = InstrumentedSession(subject.program, names, threads=1)
    times = []
    for _ in range(2):
        start = time.process_time()
        for batch in subject.calibration.batches():
            session.run(names, feeds_of(subject.program, batch))
        times.append(time.process_time() - start)
    return min(times)


def forward(subject: Subject) -> Iterator[Rating]:
    """Metrics of one instrumented run; one run for those that need the same, so that their cost is theirs.

    Branch metrics are held against drops as they are, and against bits with every operator rated as the
    innermost branch it is in; operator metrics are held against bits.
    """
    program = subject.program
    branches = find_branches(program).branches
    probes = [BranchProbe.of(b) for b in branches]
    together: dict[frozenset[Need], list[tuple[Metric, Sequence[str]]]] = defaultdict(list)
    for metric, truths in _forward_metrics():
        if metric.about == "operator" or probes:
            together[metric.needs].append((metric, truths))
    owner: dict[str, str] = {}
    for branch in sorted(branches, key=lambda b: -len(b.nodes)):
        owner.update(dict.fromkeys(branch.nodes, branch.name))
    for needs, metrics in together.items():
        for rating in _rated(subject, probes, needs, metrics):
            yield rating
            if rating.truths == ["drop"]:
                yield _inside(rating, owner, program)


def _forward_metrics() -> Iterator[tuple[Metric, Sequence[str]]]:
    """The registry's, and the output error at the width that is judged."""
    for metric in FORWARD_METRICS:
        yield metric, BITS if metric.about == "operator" else ["drop"]
    inputs = frozenset({Need.INPUTS})
    for bits in WIDTHS:
        truths = [t for t in BITS if t.startswith(f"w{bits}")]
        yield Metric(OWN_OUTPUT, "operator", "sensitive", "", inputs, output_error_at(bits)), truths


OWN_OUTPUT = "quantization-error, width judged"
OWN_WEIGHT = "relative weight error, width judged"


def _rated(
    subject: Subject,
    probes: Sequence[BranchProbe],
    needs: frozenset[Need],
    metrics: Sequence[tuple[Metric, Sequence[str]]],
) -> list[Rating]:
    program, found = subject.program, [Rating(metric.name, list(truths)) for metric, truths in metrics]
    for part, data in parts_of(subject.calibration).items():
        start = time.process_time()
        statistics: Statistics = collect(program, data, branches=probes, needs=needs, threads=1)
        shared = time.process_time() - start
        for (metric, _), rating in zip(metrics, found, strict=True):
            start = time.process_time()
            values = metric.rate(program, statistics)
            if part == ALL:
                rating.seconds, rating.samples = shared + time.process_time() - start, data.samples
            rating.values[part] = {n: -metric.redundancy(v) for n, v in values.items()}
    return found


def _inside(rating: Rating, owner: Mapping[str, str], program: Program) -> Rating:
    """Every operator rated as the branch it is in."""
    operators = [o.name for o in weighted_operators(program)]
    values = {
        part: {o: found[owner[o]] for o in operators if owner.get(o) in found}
        for part, found in rating.values.items()
    }
    return Rating(rating.metric, BITS, values, rating.seconds, rating.samples)


def of_weights(subject: Subject) -> Iterator[Rating]:
    """``L2(Q(W) - W)^2 / L2(W)^2`` at each width: reads no data."""
    weights = subject.program.graph.initializers
    for bits in WIDTHS:
        start = time.process_time()
        errors: dict[str, list[float]] = {}
        for operator in weighted_operators(subject.program):
            tensor = weights[operator.weight].const_value
            assert tensor is not None
            array = tensor.numpy()
            sums = errors.setdefault(operator.name, [0.0, 0.0])
            sums[0] += quantization_error(array, operator.channel_axis, bits)
            sums[1] += float(np.square(array.astype(np.float64)).sum())
        values = {ALL: {n: error / max(size, 1e-300) for n, (error, size) in errors.items()}}
        truths = [t for t in BITS if t.startswith(f"w{bits}")]
        yield Rating(OWN_WEIGHT, truths, values, time.process_time() - start)


def gradients(subject: Subject) -> Iterator[Rating]:
    """hawq-trace at each width, and fisher-diagonal, each alone; an operator of two weights has their sum."""
    hawq = {b: Rating("hawq-trace", [t for t in BITS if t.startswith(f"w{b}")]) for b in WIDTHS}
    fisher = Rating("fisher-diagonal", BITS)
    for part, data in parts_of(subject.calibration.rows(slice(0, GRADIENT_SAMPLES))).items():
        for name, ratings in (("hawq-trace", [*hawq.values()]), ("fisher-diagonal", [fisher])):
            start = time.process_time()
            result = gradient_metrics(subject.program, data, (name,), WIDTHS, samples=data.samples)
            seconds = time.process_time() - start
            for rating in ratings:
                rating.values[part] = defaultdict(float)
                if part == ALL:
                    rating.seconds, rating.samples = seconds, data.samples
            for found in result.operators:
                for bits, estimate in found.hawq.items():
                    hawq[bits].values[part][found.operator.name] += estimate.mean
                if found.fisher is not None:
                    fisher.values[part][found.operator.name] += found.fisher.mean
    yield from hawq.values()
    yield fisher


def traced(subject: Subject, kind: str, variants: Variants) -> Rating:
    """gradient-trace of some variants, evenly spread: 1 - correlation of gradients with the original's."""
    names = list(variants)
    if len(names) > TRACED_SITES:
        names = [names[i] for i in np.linspace(0, len(names) - 1, TRACED_SITES).astype(int)]
    rating = Rating("gradient-trace", [kind])
    for part, data in parts_of(subject.calibration.rows(slice(0, TRACED_SAMPLES))).items():
        start = time.process_time()
        rating.values[part] = {
            name: 1.0 - gradient_trace(subject.program, variants[name], data, samples=data.samples).score
            for name in names
        }
        if part == ALL:
            # what all sites would have cost
            rating.seconds = (time.process_time() - start) * len(variants) / max(len(names), 1)
            rating.samples = data.samples
    return rating


def measured(subject: Subject, kind: str, variants: Variants) -> Iterator[Rating]:
    """The competitor: damage itself, on few calibration samples; and for drops, skip-effect."""
    data = subject.calibration.rows(slice(0, subject.few_drops if kind == "drop" else subject.few))
    found = measure(subject.program, variants, data)
    for count in FEW:
        if count <= found.samples:
            yield _few(found, kind, count)
    if kind != "drop":
        return
    probes = [BranchProbe.of(b) for b in find_branches(subject.program).branches]
    rating = Rating("skip-effect", ["drop"])
    for part, half in parts_of(data.rows(slice(0, SKIP_SAMPLES))).items():
        start = time.process_time()
        effects = skip_effect(subject.program, variants, half, probes, threads=1)
        if part == ALL:
            rating.seconds, rating.samples = time.process_time() - start, half.samples
        rating.values[part] = {n: float(np.mean(list(e.values()))) for n, e in effects.items() if e}
    yield rating


def few_name(count: int) -> str:
    """What the damage measured on ``count`` calibration samples is called."""
    return f"output-kl, {count} sample{'s' * (count > 1)}"


def _few(found: Measured, kind: str, count: int) -> Rating:
    middle = count // 2
    values = {ALL: found.on(slice(0, count))}
    if middle:
        values |= {HALVES[0]: found.on(slice(0, middle)), HALVES[1]: found.on(slice(middle, count))}
    setup = min(found.setup_s, found.seconds)
    seconds = setup + (found.seconds - setup) * count / found.samples
    return Rating(few_name(count), [kind], values, seconds, count)


def baselines(subject: Subject, kind: str, sites: Iterable[str]) -> Iterator[Rating]:
    """What needs no data: earlier is worse, larger is worse."""
    names = list(sites)
    branches = {b.name: b for b in find_branches(subject.program).branches}
    weights = subject.program.graph.initializers
    sizes: dict[str, float] = {}
    order = {node.name or "": i for i, node in enumerate(subject.program.graph)}
    if kind == "drop":
        sizes = {n: float(branches[n].parameters) for n in names}
        order = {n: order[b.add] for n, b in branches.items()}
    else:
        for operator in weighted_operators(subject.program):
            tensor = weights[operator.weight].const_value
            assert tensor is not None
            sizes[operator.name] = sizes.get(operator.name, 0.0) + float(tensor.size)
    for label, values in zip(BASELINES, ({n: -float(order[n]) for n in names}, sizes), strict=True):
        yield Rating(label, [kind], {ALL: {n: values[n] for n in names}})


def attempt(make: Callable[[], Iterable[Rating] | Rating], told: dict[str, str], name: str) -> list[Rating]:
    """The ratings, or none and the reason in ``told`` where lamina refuses."""
    try:
        found = make()
        return [found] if isinstance(found, Rating) else list(found)
    except LaminaError as error:
        told[name] = str(error).splitlines()[0]
        return []
