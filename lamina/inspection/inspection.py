"""Analysis as a product of its own: everything known about a model's parts, in one JSON-able result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lamina.analysis.analyze import AnalysisResult, probes_of
from lamina.analysis.analyze import analyze as analyze_parts
from lamina.analysis.matrices import MatrixResult, matrices
from lamina.analysis.needs import FORWARD, Need, union
from lamina.analysis.operators import evenly
from lamina.analysis.single_site import Damage
from lamina.analysis.statistics import Statistics, collect
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset, load_data
from lamina.errors import LaminaError
from lamina.inspection.gradients import rate_gradients
from lamina.inspection.places import place_offers, plain_offer
from lamina.inspection.wanted import OUTPUT_KL, Wanted, check_wanted, wanted_metrics
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.measured import measured
from lamina.passes.single_bits import bit_damages
from lamina.passes.single_drops import drop_damages
from lamina.planner.offers import OffersResult, offers
from lamina.progress import Progress
from lamina.quality import get_metric
from lamina.workload import parse_workload

SAMPLES = 64
BITS = (8, 4)
# Task metrics in the order they are tried on samples that come without a word on what they are for.
_TASKS = ("spearman", "top1", "perplexity")


class Inspection(AnalysisResult):
    """What :func:`analyze` found; JSON but for infinite numbers.

    Attributes:
        model: Where it came from.
        target: Where times were taken, or None.
        samples: ``all`` that statistics were collected over, and the ``looked`` at by what is slow.
        matrices: Name -> table (:func:`lamina.analysis.matrices.matrices`); measured damage by operator and
            width is ``output-kl``.
        pairs: ``a | b`` -> what dropping both costs beyond the sum.
        damages: Divergence that was measured, and by site and option its mean and 95 % quantile.
        gradients: Loss, samples and standard errors of gradient metrics; empty where not asked for.
        offers: Every choice of the planner: transform, site, kind, nodes, options, and the part it is in.
        folds: Exact passes applied before choices were looked for.
        metric: A task metric that the samples carry what is needed for (labels, scores, tokens), or None.
        seconds: Stage -> time it took.
    """

    model: str
    target: str | None
    samples: dict[str, int]
    matrices: dict[str, MatrixResult]
    pairs: dict[str, float]
    damages: dict[str, Any]
    gradients: dict[str, Any]
    offers: list[dict[str, Any]]
    folds: list[str]
    metric: str | None
    seconds: dict[str, float]


def analyze(
    model: Any,
    data: Any = None,
    *,
    target: str | Target | None = None,
    workload: Any = None,
    metrics: Sequence[str] | None = None,
    gradients: bool = False,
    damages: bool = False,
    bits: Sequence[int] = BITS,
    samples: int = SAMPLES,
    options: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Say what each block, branch and operator costs, how redundant and how sensitive it is.

    Args:
        model: Whatever :func:`lamina.ir.capture.capture` takes; left unchanged.
        data: Samples, as :func:`lamina.optimize` takes them; None: costs only.
        target: ONNX Runtime on a CPU times operators; None or another: no times.
        workload: Shapes that costs are for: the weightiest case; None: one sample of the data.
        metrics: Names out of ``docs/metrics.md``; None: all that one run over the data gives.
        gradients: Add ``hawq-trace`` and ``fisher-diagonal`` (needs torch).
        damages: Add ``output-kl``: drop each branch and round each operator to ``bits``, one at a time.
        bits: Widths of those damages and of ``hawq-trace``.
        samples: At most so many samples for gradients and for changed programs, evenly over all.
        options: Whether to ask transforms what they would offer.
        progress: Receives progress.

    Raises:
        PassError: A metric is unknown.
        DataError: The data does not fit, or there is none and a metric needs it.
        MissingTorch: Gradients are asked for and torch is not installed.
        UnsupportedOperator: Gradients are asked for and an operator has no torch form; an input or output is
            not a tensor.
        BackendError: ONNX Runtime refuses the program.
    """
    progress = progress or Progress()
    wanted = wanted_metrics(metrics, gradients, damages)
    check_wanted(wanted, data, metrics, bits, samples)
    aim = None if target is None else Target.parse(target)
    if aim is not None:
        get_backend(aim)  # an unknown one is told before the model loads
    with progress.stage("capture"):
        program = capture(model)
        program.require_tensors()
        dataset = None if data is None else load_data(data, program)
        cases = None if workload is None else parse_workload(workload, program, dataset)
    few = None if dataset is None else dataset.rows(evenly(samples, dataset.samples))
    statistics = _statistics(program, dataset, wanted, progress)
    statistics, harm = _measured(program, few, statistics, wanted, bits, progress)
    with progress.stage("costs"):
        found = analyze_parts(
            program, dataset, target=aim, workload=cases, statistics=statistics, metrics=wanted.registry
        )
    _rate_bits(found, harm.get("bits", {}))
    offered = OffersResult((), (), ())
    if options:
        with progress.stage("options"):
            offered = offers(program, dataset, aim or Target(), progress=_tell(progress, "options"))
    places = place_offers(found, offered.offers)
    tables = matrices(program, statistics)
    if harm.get("bits"):
        tables[OUTPUT_KL] = _bits_table(harm["bits"], bits)
    grown = rate_gradients(program, few, found, wanted, bits, progress)
    found["refusals"] |= {r.where: r.reason for r in offered.refusals}
    return Inspection(
        **found,
        model=program.source,
        target=None if aim is None else str(aim),
        samples=_counts(dataset, few if wanted.slow else None),
        matrices=tables,
        pairs=dict(statistics.pairs),
        damages=harm,
        gradients=grown,
        offers=[plain_offer(o, place) for o, place in zip(offered.offers, places, strict=True)],
        folds=list(offered.folds),
        metric=None if dataset is None else _task_metric(program, dataset),
        seconds=dict(progress.seconds),
    )


def _tell(progress: Progress, stage: str) -> Any:
    return lambda done, total: progress.update(stage, done, total)


def _statistics(program: Program, dataset: Dataset | None, wanted: Wanted, progress: Progress) -> Statistics:
    needs = union(wanted.registry) & FORWARD
    if dataset is None or not needs:
        return Statistics(0)
    with progress.stage("statistics"):
        probes = probes_of(find_branches(program))
        tell = _tell(progress, "statistics")
        return collect(program, dataset, branches=probes, needs=needs, progress=tell)


def _measured(
    program: Program,
    few: Dataset | None,
    statistics: Statistics,
    wanted: Wanted,
    bits: Sequence[int],
    progress: Progress,
) -> tuple[Statistics, dict[str, Any]]:
    """What changed programs show, and the damages as plain data."""
    if few is None or not (wanted.damages or wanted.changed):
        return statistics, {}
    metric = get_metric(None, program)
    harm: dict[str, Any] = {"metric": metric.name, "samples": few.samples}
    if wanted.changed:
        with progress.stage("changes"):
            # the same samples everywhere: lengths of examples stand beside their losses
            probes = probes_of(find_branches(program))
            own = collect(program, few, branches=probes, needs={Need.EXAMPLES})
            with_examples = replace(statistics, examples=own.examples, example_rows=own.example_rows)
            statistics = measured(program, few, with_examples, metric)
    if wanted.damages:
        with progress.stage("drops"):
            drops = drop_damages(program, few, metric, progress=_tell(progress, "drops"))
        statistics = replace(statistics, damages={name: d.mean for name, d in drops.items()})
        with progress.stage("bits"):
            rounded = bit_damages(program, few, metric, bits, progress=_tell(progress, "bits"))
        harm["drop"] = {name: _of(d) for name, d in drops.items()}
        harm["bits"] = {name: {str(b): _of(d) for b, d in row.items()} for name, row in rounded.items()}
    return statistics, harm


def _of(damage: Damage) -> dict[str, float]:
    return {"mean": damage.mean, "tail": damage.tail}


def _rate_bits(found: AnalysisResult, rounded: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for part in found["operators"]:
        for width, damage in rounded.get(part["name"], {}).items():
            part["metrics"][f"{OUTPUT_KL}-w{width}"] = damage["mean"]


def _bits_table(
    rounded: Mapping[str, Mapping[str, Mapping[str, float]]], bits: Sequence[int]
) -> MatrixResult:
    widths = [str(b) for b in bits]
    values: list[list[float | None]] = [[row[w]["mean"] for w in widths] for row in rounded.values()]
    return MatrixResult(rows=list(rounded), columns=widths, values=values)


def _task_metric(program: Program, dataset: Dataset) -> str | None:
    """The first task metric that could score the model on these samples."""
    for name in _TASKS:
        try:
            get_metric(name, program).check(dataset)
        except LaminaError:
            continue
        return name
    return None


def _counts(dataset: Dataset | None, few: Dataset | None) -> dict[str, int]:
    return {"all": 0 if dataset is None else dataset.samples, "looked": 0 if few is None else few.samples}
