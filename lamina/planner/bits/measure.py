"""Gather what allocators go by: the supergraph, one instrumented run, operators run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from lamina.analysis.metrics import get_metric as site_metric
from lamina.analysis.needs import Need
from lamina.analysis.redundancy import histogram_entropy
from lamina.analysis.residual import BranchProbe
from lamina.analysis.statistics import collect
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import LaminaError
from lamina.ir.branches import find_branches
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Option
from lamina.planner.apply import emit_move, required_opset
from lamina.planner.bits.evidence import QUANTIZE, BitEvidence, allowed_damages, widths_of
from lamina.planner.costs import Costs
from lamina.planner.evaluator import Evaluator
from lamina.planner.plan import Move
from lamina.planner.price_bench import capture
from lamina.planner.price_models import Extractor, Unit
from lamina.planner.space import Choice, Genome, Space
from lamina.quality.divergence import Divergence

# Samples that single operators are run on, and elements of an activation its entropy is taken from.
_ROWS, _ELEMENTS = 8, 1 << 16


def bit_evidence(
    costs: Costs,
    damage: Sequence[Sequence[float]],
    calibration: Dataset,
    evaluator: Evaluator,
    probe: Dataset,
    divergence: Divergence,
) -> BitEvidence:
    """The evidence of one optimization; what costs runs is made when an allocator first asks, and kept.

    Args:
        costs: Space and prices.
        damage: Divergence of every option alone.
        calibration: Samples that statistics are taken from.
        evaluator: Runs genomes on the supergraph.
        probe: Samples that divergences are measured on.
        divergence: How outputs are compared.
    """
    space, known = costs.space, dict[Genome, float]()

    def apart(genomes: Sequence[Genome]) -> list[float]:
        new = [g for g in dict.fromkeys(genomes) if g not in known]
        known.update(zip(new, evaluator.single_divergences(probe, divergence, new), strict=True))
        return [known[g] for g in genomes]

    @cache
    def values() -> tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]:
        few = next(calibration.rows(slice(0, calibration.fixed_batch or _ROWS)).batches()).inputs
        read = {v for c in space.choices if c.transform.name == QUANTIZE for v in c.site.inputs}
        return few, capture(space.program, sorted(read), few)

    @cache
    def noise() -> list[list[float]]:
        return option_noise(space, *values())

    @cache
    def modification() -> dict[int, float]:
        return branch_modification(space, calibration)

    @cache
    def entropy() -> dict[int, float]:
        return read_entropy(space, values()[1])

    @cache
    def outliers() -> dict[int, float]:
        return weight_outliers(space)

    harm = allowed_damages(costs, damage)
    return BitEvidence(costs, harm, widths_of(costs), noise, modification, outliers, entropy, apart)


def option_noise(
    space: Space, feeds: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray]
) -> list[list[float]]:
    """``L2(y_b - y)^2 / L2(y)^2`` of every form's output, run by itself on what it reads; else NaN.

    Args:
        space: The choices.
        feeds: Inputs of the program.
        read: Value -> content under these inputs, of everything that forms of weights read.
    """
    extractor, observed = Extractor(space.program), observed_shapes(space.program, feeds)
    found = []
    for choice in space.choices:
        row = [float("nan")] * len(choice.options)
        if choice.transform.name == QUANTIZE and choice.site.weights:
            try:
                exact = _output(extractor.extract(choice.site, observed), read)
            except LaminaError:  # the runtime refuses the operator alone
                found.append(row)
                continue
            for k, option in enumerate(choice.options):
                try:
                    made = _output(_changed(extractor.extract(choice.site, observed), choice, option), read)
                except LaminaError:
                    continue
                row[k] = _relative(exact, made)
        found.append(row)
    return found


def _changed(unit: Unit, choice: Choice, option: Option) -> Unit:
    move = Move(choice.site, option)
    raise_opset(unit.model, required_opset([move]))
    emit_move(choice.transform, move, Rewriter(unit.model))
    return unit


def _output(unit: Unit, read: Mapping[str, np.ndarray]) -> np.ndarray:
    target = Target.parse("ort:cpu")
    executable = get_backend(target).compile(unit.model, target)
    outputs = executable.run({name: read[source] for name, source in unit.sources.items()})
    return np.asarray(next(iter(outputs.values())), np.float64)


def _relative(exact: np.ndarray, made: np.ndarray) -> float:
    size = float(np.square(exact).sum())
    return float(np.square(made - exact).sum()) / size if size > 0 else float("nan")


def branch_modification(space: Space, calibration: Dataset) -> dict[int, float]:
    """Choice -> LIM of the innermost residual branch that its nodes lie in."""
    branches = find_branches(space.program).branches
    if not branches:
        return {}
    probes = [BranchProbe.of(b) for b in branches]
    statistics = collect(space.program, calibration, branches=probes, needs=(Need.LENGTHS,))
    rated = site_metric("layer-input-modification").rate(space.program, statistics)
    found: dict[int, float] = {}
    for branch in sorted(branches, key=lambda b: -len(b.nodes)):  # inner ones have the last word
        value, members = rated.get(branch.name), set(branch.nodes)
        if value is None or not np.isfinite(value):
            continue
        for index, choice in enumerate(space.choices):
            if _weighs(choice) and members.intersection(choice.site.nodes):
                found[index] = float(value)
    return found


def weight_outliers(space: Space) -> dict[int, float]:
    """Choice -> ZD of its largest weight: share of elements beyond one standard deviation of the mean."""
    found = {}
    for index, choice in enumerate(space.choices):
        array = _largest(space.program, choice) if _weighs(choice) else None
        if array is not None and (spread := float(array.std())) > 0:
            found[index] = float((np.abs(array - array.mean()) > spread).mean())
    return found


def read_entropy(space: Space, read: Mapping[str, np.ndarray]) -> dict[int, float]:
    """Choice -> entropy in nats of a histogram of what it reads, 256 even bins over its range."""
    found = {}
    for index, choice in enumerate(space.choices):
        arrays = [read[name] for name in choice.site.inputs if name in read]
        floating = [a for a in arrays if np.issubdtype(a.dtype, np.floating) and a.size]
        if _weighs(choice) and floating:
            flat = floating[0].reshape(-1)
            flat = flat[:: max(1, flat.size // _ELEMENTS)].astype(np.float64)
            found[index] = histogram_entropy(flat, float(flat.min()), float(flat.max()))
    return found


def _weighs(choice: Choice) -> bool:
    return choice.transform.name == QUANTIZE and bool(choice.site.weights)


def _largest(program: Program, choice: Choice) -> np.ndarray | None:
    values = (program.graph.initializers.get(name) for name in choice.site.weights)
    tensors = [v.const_value for v in values if v is not None and v.const_value is not None]
    if not tensors:
        return None
    return max(tensors, key=lambda t: t.nbytes).numpy().astype(np.float64)
