"""Everything the search needs: statistics, the space, prices, the supergraph, single-site damages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.analysis.cost import CostResult, cost
from lamina.analysis.statistics import Statistics, collect
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.budget import FOOTPRINT
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.io import serialized_size
from lamina.ir.shapes import observed_shapes
from lamina.passes import get_transform
from lamina.passes.pass_ import Site, Transform
from lamina.planner.bits.uniform import uniform_space
from lamina.planner.blame import Undone, blame_space, undone
from lamina.planner.chain_measure import with_chain_plans
from lamina.planner.chain_plans import ChainPlans, ChainRule
from lamina.planner.costs import Costs, fit_joints, fit_scales
from lamina.planner.evaluator import Evaluator
from lamina.planner.forms import Folded
from lamina.planner.plan import Plan
from lamina.planner.prices import Prices
from lamina.planner.pricing import build_costs, shared_costs
from lamina.planner.realize import LOOKS, Realized, realize, statistics_of
from lamina.planner.referee import Referee
from lamina.planner.request import Request
from lamina.planner.shortlist import single_damages
from lamina.planner.space import Genome, Space, build_space
from lamina.planner.supergraph import Supergraph, build_supergraph
from lamina.planner.timing import Stopwatch
from lamina.quality import get_metric
from lamina.quality.divergence import Divergence

# Samples that activation ranges are taken from.
MOST_CALIBRATION = 128
# Selection samples that are used however long they take.
LEAST_SELECTION = 200


@dataclass
class Prepared:
    """What one optimization knows before it searches.

    Attributes:
        folded: The program the sites belong to, and how it was made.
        plan: The plan with folds but no moves yet.
        statistics: From the calibration run.
        costs: Prices of the options that can help.
        original_cost: FLOPs, parameters and the like of the original.
        referee: Holds what is built against the original.
        whole: Genome -> latency ratio measured on the finished model.
        undone: What was left out because it broke: pass, place and reason.
        chains: Plans of the dynamic programs over chains of convolutions, where these were asked for.
    """

    folded: Folded
    plan: Plan
    statistics: Statistics
    costs: Costs
    original_cost: CostResult
    referee: Referee
    whole: dict[Genome, float] = field(default_factory=dict)
    undone: list[Undone] = field(default_factory=list)
    chains: ChainPlans = field(default_factory=lambda: ChainPlans({}))


def prepare(
    request: Request,
    folded: Folded,
    stopwatch: Stopwatch,
    referee: Referee,
    chain_rules: Sequence[ChainRule] = (),
) -> Prepared:
    """Run every analysis the search needs; options that cannot be applied are left out, and told.

    Args:
        request: What was asked for.
        folded: The program the sites belong to.
        stopwatch: Times whole models.
        referee: Holds what is built against the original.
        chain_rules: Dynamic programs whose plans become options of merge-conv-chain.
    """
    progress, program = request.progress, folded.program
    transforms = useful_transforms(request)
    told: list[Undone] = []
    with progress.stage("analyze"):
        transforms, chains = with_chain_plans(request, program, transforms, chain_rules, told)
        sites = [s for t in transforms for s in t.sites(program) if isinstance(s, Site)]
        wanted = sorted(
            {v for s in sites if not get_transform(s.transform).removes_site for v in (*s.inputs, *s.outputs)}
        )
        statistics = collect(
            program,
            calibration_rows(request),
            ranges=wanted,
            needs=statistics_of(t.name for t in transforms),
            looks=LOOKS,
            progress=lambda done, total: progress.update("analyze", done, total),
        )
        for transform in transforms:
            statistics = transform.collect(program, request.splits.calibration, statistics)
        seen = Statistics(0) if request.data_free else statistics
        space = build_space(program, transforms, seen, request.target)
        if request.bits is not None:
            space = uniform_space(space, request.bits)
    with progress.stage("price"):
        while True:
            try:
                prepared = _priced(request, folded, space, statistics, stopwatch, referee, told)
                return replace(prepared, chains=chains)
            except Exception as error:  # a bug in a transform costs its moves, not the run
                space = sound(space, referee, error, told)


def reprepare(request: Request, prepared: Prepared, stopwatch: Stopwatch, error: Exception) -> Prepared:
    """Price anew without the options that are to blame for ``error``; raises it where none is."""
    space = sound(prepared.costs.space, prepared.referee, error, prepared.undone)
    kept = prepared.folded, space, prepared.statistics
    again = _priced(request, *kept, stopwatch, prepared.referee, prepared.undone)
    return replace(again, chains=prepared.chains)


def sound(space: Space, referee: Referee, error: Exception, told: list[Undone]) -> Space:
    """The space without the options that are to blame for ``error``; raises it where none is."""
    culprits = blame_space(space, referee)
    if not culprits:
        raise error
    told.extend(undone(culprits))
    return space.without({(m.site.transform, m.site.name, m.option.name) for m, _ in culprits})


def _priced(
    request: Request,
    folded: Folded,
    space: Space,
    statistics: Statistics,
    stopwatch: Stopwatch,
    referee: Referee,
    told: list[Undone],
) -> Prepared:
    costs, original_cost = _price(request, folded, space, stopwatch)
    plan = Plan(request.program.fingerprint, folded.names, target=str(request.target), caches=folded.caches)
    prepared = Prepared(folded, plan, statistics, costs, original_cost, referee, undone=told)
    _measure_groups(request, prepared, stopwatch)
    return prepared


def useful_transforms(request: Request) -> list[Transform]:
    """The transforms of a request that move any of the costs it names.

    What moves none would only make statistics, prices and supergraph dearer.
    """
    every = [get_transform(name) for name in request.transforms]
    return [t for t in every if axes_of(request) & set(t.axes)]


def axes_of(request: Request) -> set[str]:
    """The costs that the request bounds or minimizes."""
    axes = {request.minimize, *(b.axis for b in request.budget.costs)}
    return axes | {"latency", "size"} if request.minimize == FOOTPRINT else axes


def calibration_rows(request: Request) -> Dataset:
    """The calibration samples that ranges are taken from: ranges settle long before more would help."""
    calibration = request.splits.calibration
    return calibration.rows(slice(0, min(calibration.samples, MOST_CALIBRATION)))


def sensitivity(request: Request, prepared: Prepared) -> tuple[Evaluator, list[list[float]]]:
    """Compile the supergraph for all cores (quality does not depend on them); judge every option alone."""
    supergraph = build_supergraph(prepared.costs.space)
    every_core = Target.parse("ort:cpu")
    supergraph.executable = get_backend(every_core).compile(supergraph.model, every_core)
    evaluator = Evaluator(supergraph, selection_rows(request, supergraph), request.metric)
    return evaluator, _single_damages(request, prepared, evaluator)


def selection_rows(request: Request, supergraph: Supergraph) -> Dataset:
    """The selection samples candidates are judged on: as many as the time allows, spread over all of them.

    A candidate's full score may cost a twentieth of the time, so that at least twenty can be judged.
    """
    selection = request.splits.selection
    first = next(iter(selection.batches()))
    nothing = supergraph.space.nothing
    supergraph.run(nothing, first.inputs)
    start = time.perf_counter()
    supergraph.run(nothing, first.inputs)
    seconds = (time.perf_counter() - start) / max(first.samples, 1)
    fit = int(0.05 * request.seconds / max(seconds, 1e-9))
    count = int(np.clip(fit, min(LEAST_SELECTION, selection.samples), selection.samples))
    if count == selection.samples:
        return selection
    return selection.rows(np.linspace(0, selection.samples - 1, count).astype(np.int64))


def _price(request: Request, folded: Folded, space: Space, stopwatch: Stopwatch) -> tuple[Costs, CostResult]:
    program, workload = folded.program, request.workload
    shapes = {case.name: observed_shapes(program, case.feeds) for case in workload}
    heaviest = max(workload, key=lambda c: sum(a.size for a in c.feeds.values()))
    program_cost = cost(program, heaviest.feeds)
    original_cost = cost(request.program, heaviest.feeds)
    base = {
        "latency": folded.relative.ratio,
        "size": float(serialized_size(program.model)),
        "flops": float(program_cost.flops),
    }
    flops = {o.name: float(o.flops) for o in program_cost.operators}
    if request.backend.capabilities(request.target)["operator_prices"]:
        prices = Prices(request.target, request.backend)
        costs = build_costs(space, prices, workload, shapes, base, stopwatch.baseline_s, flops)
    else:
        costs = shared_costs(space, base, flops)
    return costs.restrict(axes_of(request)), original_cost


def group_genomes(space: Space) -> list[Genome]:
    """Genomes that take one option everywhere, or at all sites of one kind: they calibrate the prices."""
    kinds: dict[str, dict[str, int]] = {}
    for choice in space.choices:
        for option in choice.options:
            counts = kinds.setdefault(option.name, {})
            counts[choice.site.kind] = counts.get(choice.site.kind, 0) + 1
    genomes: list[Genome] = []
    for name, counts in kinds.items():
        if name != "drop":
            genomes.append(space.uniform(name))
        if len(counts) > 1:
            genomes += [space.uniform(name, [kind]) for kind in counts]
        elif name == "drop":
            genomes.append(_every_other(space))
    return list(dict.fromkeys(g for g in genomes if any(g)))


def _every_other(space: Space) -> Genome:
    seen, genes = 0, []
    for choice in space.choices:
        seen += choice.removes
        genes.append(int(choice.removes and seen % 2 == 0))
    return space.canonical(genes)


def _measure_groups(request: Request, prepared: Prepared, stopwatch: Stopwatch) -> None:
    """Build whole models of uniform genomes, time them, and correct the prices by what they show."""
    costs = prepared.costs
    genomes = [g for g in group_genomes(costs.space) if _worth_building(request, costs, g)]
    models, sizes = [], {}
    for done, genome in enumerate(genomes):
        request.progress.update("price", done, len(genomes), "whole models")
        models.append(build(request, prepared, genome).program.model)
        if costs.joints(genome):
            sizes[genome] = serialized_size(models[-1])
    if not models:
        return
    seconds = min(12.0, 1.2 * (len(models) + 1))
    for genome, relative in zip(genomes, stopwatch.compare(models, seconds=seconds), strict=True):
        prepared.whole[genome] = relative.ratio
    fit_scales(costs, prepared.whole)
    fit_joints(costs, sizes)


def _worth_building(request: Request, costs: Costs, genome: Genome) -> bool:
    """Options that only ever cost time need no whole model to prove it, unless size is what counts."""
    names = {costs.space.choices[i].options[g - 1].name for i, g in enumerate(genome) if g}
    return "drop" in names or costs.predict(genome)["latency"] < costs.base["latency"]


def build(request: Request, prepared: Prepared, genome: Genome, *, recalibrate: bool = False) -> Realized:
    """The finished program of a genome and its plan."""
    moves = prepared.costs.space.moves(genome)
    calibration = calibration_rows(request) if recalibrate else None
    return realize(
        prepared.folded.program, prepared.plan, moves, calibration, prepared.statistics, request.target
    )


def _single_damages(request: Request, prepared: Prepared, evaluator: Evaluator) -> list[list[float]]:
    divergence = get_metric(request.metric.divergence, prepared.folded.program)
    if not isinstance(divergence, Divergence):
        raise PassError(f"metric '{request.metric.name}' names no divergence")

    def told(done: int, total: int) -> None:
        request.progress.update("sensitivity", done, total)

    return single_damages(evaluator, divergence, calibration_rows(request), request.seconds, told)
