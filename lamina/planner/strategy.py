"""What a search starts from: the plans of every drop rule, or of the rules a user names and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.data import Dataset
from lamina.errors import BudgetError, PassError
from lamina.planner.drop_evidence import (
    DropEvidence,
    DropSet,
    Measure,
    droppable,
    layers_of,
    rule_statistics,
    span_angles,
)
from lamina.planner.drop_rules import RULES, Rule, get_rule, rule_names
from lamina.planner.drop_seeds import SHARE, DropSeeds
from lamina.planner.drop_sets import task_loss
from lamina.planner.evaluator import Evaluator
from lamina.planner.prepare import Prepared, calibration_rows
from lamina.planner.request import Request
from lamina.planner.space import Genome
from lamina.quality import get_metric
from lamina.quality.divergence import Divergence

SEARCH = "search"
# Share of the search's time that the steps of one greedy rule are meant to fit in.
_GREEDY = 0.2
# Batches of selection samples such a step looks at.
_BATCHES = 8


def rules_of(strategy: str | Sequence[str] | None) -> tuple[tuple[Rule, ...], bool]:
    """The rules of a strategy, and whether their plans are all that is looked at.

    Args:
        strategy: ``search`` or None: every rule, then the planner's own search. Else one or several names of
            rules, as a sequence or with commas between: only their plans.

    Raises:
        BudgetError: A name is no rule's.
    """
    names = strategy.split(",") if isinstance(strategy, str) else list(strategy or ())
    names = [n.strip() for n in names if n.strip()] or [SEARCH]
    if names == [SEARCH]:
        return RULES, False
    for name in names:
        if name not in rule_names():
            raise BudgetError(
                f"there is no strategy '{name}'", advice=f"choose from {', '.join((SEARCH, *rule_names()))}"
            )
    return tuple(get_rule(name) for name in dict.fromkeys(names)), True


def drop_seeds(
    request: Request, prepared: Prepared, evaluator: Evaluator, damage: Sequence[Sequence[float]]
) -> DropSeeds | None:
    """The plans of the request's rules, measured on the planner's supergraph; None without drops.

    Args:
        request: What was asked for.
        prepared: Space and prices.
        evaluator: Runs candidates.
        damage: Divergence of every option alone.
    """
    rules, only = rules_of(request.strategy)
    space, costs = prepared.costs.space, prepared.costs
    drops = {c.site.name: i for i, c in enumerate(space.choices) if c.transform.name == "drop"}
    if not drops:
        return None
    program, data = prepared.folded.program, calibration_rows(request)
    axis = _axis(request)
    saving = {name: -_delta(prepared, axis, i) for name, i in drops.items()}
    branches = tuple(b for b in droppable(program, saving) if b.name in drops)
    layers = layers_of(program, branches)

    @cache
    def statistics() -> Statistics:
        return rule_statistics(program, data, layers)

    @cache
    def angles() -> Callable[[int, int], float]:
        return span_angles(program, statistics(), layers)

    def single() -> Mapping[str, float]:
        return {name: damage[i][0] for name, i in drops.items()}

    evidence = DropEvidence(branches, layers, statistics, lambda first, last: angles()(first, last), single)
    seeds = DropSeeds(rules, evidence, costs.space, share=1.0 if only else SHARE)
    seeds.evidence = _measured(request, prepared, evaluator, seeds)
    return seeds


def _axis(request: Request) -> str:
    """The cost that savings are counted in."""
    wanted = [request.minimize, *(b.axis for b in request.budget.costs)]
    axis = next((a for a in wanted if a != "damage"), "latency")
    return "size" if axis == "memory" else axis


def _delta(prepared: Prepared, axis: str, index: int) -> float:
    costs = prepared.costs
    return costs.latency_delta(index, 1) if axis == "latency" else float(costs.delta[axis][index][0])


def _measured(request: Request, prepared: Prepared, evaluator: Evaluator, seeds: DropSeeds) -> DropEvidence:
    """The evidence with measures on the supergraph; sets it cannot express are infinitely harmful."""
    program = prepared.folded.program
    probe = _probe(request, evaluator, len(seeds.evidence.branches))
    divergence = get_metric(request.metric.divergence, program)
    if not isinstance(divergence, Divergence):
        raise PassError(f"metric '{request.metric.name}' names no divergence")
    judge = divergence
    loss = task_loss(program, probe)

    def through(measure: Callable[[Sequence[Genome]], Sequence[float]]) -> Measure:
        def measured(sets: Sequence[DropSet]) -> list[float]:
            genomes = [seeds.genome(s) for s in sets]
            known = [g for g in genomes if g is not None]
            values = iter(measure(known) if known else ())
            return [float("inf") if g is None else next(values) for g in genomes]

        return measured

    apart = through(lambda genomes: evaluator.single_divergences(probe, judge, genomes))
    lost = None if loss is None else through(lambda genomes: evaluator.single_scores(probe, loss, genomes))
    return replace(seeds.evidence, divergence=apart, loss=lost)


def _probe(request: Request, evaluator: Evaluator, branches: int) -> Dataset:
    """As many selection samples as let a greedy rule drop a quarter of the branches in its share of time."""
    selection = evaluator.selection
    per_batch = evaluator.run_seconds / max(evaluator.runs, 1)
    steps = max(branches * branches / 4, 1)
    batches = int(np.clip(_GREEDY * request.seconds / max(per_batch * steps, 1e-9), 1, _BATCHES))
    step = selection.fixed_batch or max(1, selection.batch_size // selection.group)
    return selection.rows(slice(0, min(batches * step, selection.samples)))
