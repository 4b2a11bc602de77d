"""Analysis as a product of its own: everything known about a model's parts, in one JSON-able result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamina.analysis.analyze import AnalysisResult, PartResult, probes_of
from lamina.analysis.analyze import analyze as analyze_parts
from lamina.analysis.gradients import GRADIENT_METRICS, GradientResult, gradient_metrics
from lamina.analysis.matrices import MatrixResult, matrices
from lamina.analysis.metrics import FORWARD_METRICS, METRICS, Metric
from lamina.analysis.needs import FORWARD, Need, union
from lamina.analysis.operators import evenly
from lamina.analysis.single_site import Damage
from lamina.analysis.statistics import Statistics, collect
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset, load_data
from lamina.errors import DataError, LaminaError, PassError
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.fx import require_torch
from lamina.ir.program import Program
from lamina.passes.measured import measured
from lamina.passes.single_bits import bit_damages
from lamina.passes.single_drops import drop_damages, drop_variants
from lamina.planner.offers import Offer, OffersResult, offers
from lamina.progress import Progress
from lamina.quality import get_metric
from lamina.workload import parse_workload

GRADIENT_TRACE = "gradient-trace"
OUTPUT_KL = "output-kl"
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


@dataclass(frozen=True)
class _Wanted:
    """The metrics asked for, by how they are made."""

    registry: tuple[Metric, ...]
    gradients: tuple[str, ...]
    damages: bool

    @property
    def changed(self) -> bool:
        """Whether some need more than damages of changed programs."""
        return bool(union(self.registry) & {Need.SKIPS, Need.PAIRS}) or any(
            {Need.EXAMPLES, Need.DAMAGES} <= m.needs for m in self.registry
        )

    @property
    def slow(self) -> bool:
        """Whether any takes more than one run over the data."""
        return bool(self.damages or self.changed or self.gradients)


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
    wanted = _wanted(metrics, gradients, damages)
    _check(wanted, data, metrics, bits, samples)
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
    places = _place(found, offered.offers)
    tables = matrices(program, statistics)
    if harm.get("bits"):
        tables[OUTPUT_KL] = _bits_table(harm["bits"], bits)
    grown = _gradients(program, few, found, wanted, bits, progress)
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
        offers=[_plain(o, place) for o, place in zip(offered.offers, places, strict=True)],
        folds=list(offered.folds),
        metric=None if dataset is None else _task_metric(program, dataset),
        seconds=dict(progress.seconds),
    )


def _wanted(names: Sequence[str] | None, gradients: bool, damages: bool) -> _Wanted:
    known = {metric.name: metric for metric in METRICS}
    slow = (*GRADIENT_METRICS, GRADIENT_TRACE)
    asked = [m.name for m in FORWARD_METRICS] if names is None else list(dict.fromkeys(names))
    for name in asked:
        if name not in known and name not in slow:
            near = difflib.get_close_matches(name, [*known, *slow], n=1)
            hint = f", did you mean {near[0]}" if near else ""
            advice = f"choose from {', '.join([*known, *slow])}"
            raise PassError(f"metric '{name}' is unknown{hint}", advice=advice)
    if damages and OUTPUT_KL not in asked:
        asked.append(OUTPUT_KL)
    if gradients:
        asked += [name for name in GRADIENT_METRICS if name not in asked]
    return _Wanted(
        tuple(known[n] for n in asked if n in known), tuple(n for n in slow if n in asked), OUTPUT_KL in asked
    )


def _check(wanted: _Wanted, data: Any, names: Any, bits: Sequence[int], samples: int) -> None:
    """Say before a large model loads what cannot work."""
    if data is None and (names is not None or wanted.slow):
        raise DataError(
            "metrics need samples", advice="give data: --data X.npz, arrays named like the inputs"
        )
    strange = [b for b in bits if not 2 <= b <= 16]
    if strange or not bits:
        what = f"{strange[0]} is no bit width" if strange else "there are no bit widths"
        raise DataError(what, advice="give widths from 2 to 16, like 8,4")
    if samples < 1:
        raise DataError(f"{samples} samples cannot be looked at", advice="give at least 1, better 64")
    if wanted.gradients:
        require_torch()


def _tell(progress: Progress, stage: str) -> Any:
    return lambda done, total: progress.update(stage, done, total)


def _statistics(program: Program, dataset: Dataset | None, wanted: _Wanted, progress: Progress) -> Statistics:
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
    wanted: _Wanted,
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


def _gradients(
    program: Program,
    few: Dataset | None,
    found: AnalysisResult,
    wanted: _Wanted,
    bits: Sequence[int],
    progress: Progress,
) -> dict[str, Any]:
    """Put gradient metrics into the parts; what was done to get them."""
    if few is None or not wanted.gradients:
        return {}
    told: dict[str, Any] = {"standard_errors": {}}
    names = [name for name in wanted.gradients if name in GRADIENT_METRICS]
    if names:
        with progress.stage("gradients"):
            tell = _tell(progress, "gradients")
            result = gradient_metrics(program, few, names, bits, samples=few.samples, progress=tell)
        facts = ("loss", "curvature", "samples", "draws", "seconds")
        told |= {name: getattr(result, name) for name in facts}
        told["standard_errors"] = _rate_gradients(found, result)
    if GRADIENT_TRACE in wanted.gradients:
        with progress.stage("traces"):
            _rate_traces(program, few, found, progress)
    return told


def _rate_gradients(found: AnalysisResult, result: GradientResult) -> dict[str, dict[str, float]]:
    """Of an operator with two weights: hawq-trace adds up, fisher-diagonal is the mean over all elements."""
    parts = {part["name"]: part for part in found["operators"]}
    errors: dict[str, dict[str, float]] = {}
    elements: dict[str, int] = {}
    for entry in result.operators:
        name = entry.operator.name
        before, known, error = elements.get(name, 0), parts[name]["metrics"], errors.setdefault(name, {})
        elements[name] = before + entry.parameters
        for width, estimate in entry.hawq.items():
            key = f"hawq-trace-w{width}"
            known[key] = known.get(key, 0.0) + estimate.mean
            error[key] = (error.get(key, 0.0) ** 2 + estimate.standard_error**2) ** 0.5
        if entry.fisher is not None:
            key, share = "fisher-diagonal", entry.parameters / elements[name]
            known[key] = known.get(key, 0.0) * (1 - share) + entry.fisher.mean * share
            parts_of = (error.get(key, 0.0) * (1 - share), entry.fisher.standard_error * share)
            error[key] = (parts_of[0] ** 2 + parts_of[1] ** 2) ** 0.5
    return errors


def _rate_traces(program: Program, few: Dataset, found: AnalysisResult, progress: Progress) -> None:
    """``gradient-trace`` of the program without each branch: how alike its gradients still are."""
    from lamina.analysis.gradient_trace import gradient_trace

    parts = {part["name"]: part for part in found["branches"]}
    variants = drop_variants(program)
    for number, (name, variant) in enumerate(variants.items(), start=1):
        trace = gradient_trace(program, variant, few, samples=few.samples)
        parts[name]["metrics"][GRADIENT_TRACE] = trace.score
        progress.update("traces", number, len(variants))


def _place(found: AnalysisResult, given: Sequence[Offer]) -> list[str | None]:
    """Write each offer's options to the parts it belongs to; the innermost part of each, or None.

    Folds may have renamed what they rewrote, so branches are known by the nodes they share, then by name.
    """
    branches = {part["name"]: part for part in found["branches"]}
    operators = {part["name"]: part for part in found["operators"]}
    homes = {node: part for part in found["branches"] for node in part["members"]}
    places = []
    for offer in given:
        part = _branch_of(offer, branches, homes) if offer.removes else None
        if not offer.removes:
            there = [operators[n] for n in offer.nodes if n in operators]
            part = next((p for p in there if p["parameters"]), there[0] if there else None)
        places.append(None if part is None else part["name"])
        outer = None if part is None or offer.removes else homes.get(part["name"])
        for held in (part, outer):
            if held is not None:
                held["options"] += [o for o in offer.options if o not in held["options"]]
    for block in found["blocks"]:
        inside = [o for name in block["members"] for o in branches[name]["options"]]
        block["options"] = list(dict.fromkeys(inside))
    return places


def _branch_of(
    offer: Offer, branches: Mapping[str, PartResult], homes: Mapping[str, PartResult]
) -> PartResult | None:
    shared: dict[str, int] = {}
    for node in offer.nodes:
        if node in homes:
            name = homes[node]["name"]
            shared[name] = shared.get(name, 0) + 1
    if shared:
        return branches[max(shared, key=lambda name: shared[name])]
    return branches.get(offer.site)


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


def _plain(offer: Offer, place: str | None) -> dict[str, Any]:
    return {
        "transform": offer.transform,
        "site": offer.site,
        "kind": offer.kind,
        "nodes": list(offer.nodes),
        "options": list(offer.options),
        "part": place,
    }
