"""From a genome to a finished program and the plan that reproduces it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lamina.analysis.needs import Looks, Need
from lamina.analysis.statistics import Statistics, collect
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes import get_transform
from lamina.passes.fold import apply_named
from lamina.passes.low_rank_path import apply_paths
from lamina.passes.pass_ import Site
from lamina.passes.quantize.cache_edits import expose_caches, quantize_caches
from lamina.passes.repair import apply_repairs
from lamina.planner.apply import apply_drops, apply_rest, removes
from lamina.planner.plan import Move, Plan


@dataclass(frozen=True)
class Realized:
    """A finished program with its plan."""

    program: Program
    plan: Plan


def realize(
    folded: Program,
    plan: Plan,
    moves: Sequence[Move],
    calibration: Dataset | None,
    statistics: Statistics,
    target: Target,
) -> Realized:
    """Apply moves; ranges are collected anew where drops changed what the remaining operators see.

    Args:
        folded: The program the moves belong to.
        plan: Fingerprint and folds; its moves are replaced.
        moves: What to apply.
        calibration: Samples for new ranges; None keeps those of ``statistics``.
        statistics: What the folded program's calibration collected.
        target: Where the result runs.
    """
    dropped = apply_drops(folded, moves)
    rest = [m for m in moves if not removes(m)]
    if len(rest) < len(moves) and calibration is not None:
        rest = _recalibrate(dropped, rest, calibration, target)
    final = tuple(m for m in moves if removes(m)) + tuple(rest)
    return Realized(apply_rest(dropped, final), replace(plan, moves=final))


def reproduce(captured: Program, plan: Plan) -> Program:
    """Apply a whole plan to a captured program.

    Folds, caches, drops, the other moves, repairs, paths, finishing, the caches' interface.
    """
    program = quantize_caches(apply_named(captured, plan.folds), plan.caches)
    program = apply_rest(apply_drops(program, plan.moves), plan.moves)
    program = apply_paths(apply_repairs(program, plan.repairs), plan.paths)
    return expose_caches(apply_named(program, plan.finishing), plan.caches)


# Smoothing chosen on 256 vectors made stories260k worse, on 1,024 no worse (docs/precision.md).
LOOKS = Looks(kept=1024)
# What a transform needs -> the statistic of the calibration run that is.
_COLLECTED: Mapping[str, Need] = {"inputs": Need.INPUTS, "vectors": Need.VECTORS}


def statistics_of(transforms: Iterable[str]) -> tuple[Need, ...]:
    """What a calibration run collects for these transforms besides ranges."""
    wanted = {need for name in transforms for need in get_transform(name).needs}
    return tuple(need for text, need in _COLLECTED.items() if text in wanted)


def _recalibrate(program: Program, moves: Sequence[Move], calibration: Dataset, target: Target) -> list[Move]:
    needing = [m for m in moves if "ranges" in get_transform(m.site.transform).needs]
    if not needing:
        return list(moves)
    names = sorted({m.site.transform for m in needing})
    sites = {
        (name, site.name): site
        for name in names
        for site in get_transform(name).sites(program)
        if isinstance(site, Site)
    }
    found = [
        sites[m.site.transform, m.site.name] for m in needing if (m.site.transform, m.site.name) in sites
    ]
    wanted = sorted({v for site in found for v in (*site.inputs, *site.outputs)})
    statistics = collect(program, calibration, ranges=wanted, needs=statistics_of(names), looks=LOOKS)
    renewed = []
    for move in moves:
        site = sites.get((move.site.transform, move.site.name))
        if site is None:
            if move not in needing:
                renewed.append(move)
            continue
        options = get_transform(site.transform).options(site, program, statistics, target)
        option = next((o for o in options if o.name == move.option.name), None)
        if option is not None:
            renewed.append(replace(move, site=site, option=option))
    return renewed
