"""What a search starts from: plans of drop rules and allocators, or only of those a user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.budget import FOOTPRINT
from lamina.data import Dataset
from lamina.errors import BudgetError, PassError
from lamina.ir.program import Program
from lamina.planner.bits.allocators import ALLOCATORS, allocator_names
from lamina.planner.bits.evidence import QUANTIZE
from lamina.planner.bits.ladder import Allocator
from lamina.planner.bits.measure import bit_evidence
from lamina.planner.bits.seeds import BitSeeds
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
from lamina.planner.search import Search
from lamina.planner.space import Genome
from lamina.quality import get_metric
from lamina.quality.divergence import Divergence

SEARCH = "search"
# Share of the search's time that the steps of one greedy rule are meant to fit in.
_GREEDY = 0.2
# Batches of selection samples such a step looks at.
_BATCHES = 8
# Samples that allocators measure genomes on.
_SAMPLES = 64


@dataclass(frozen=True)
class Strategy:
    """Where plans come from.

    Attributes:
        rules: Drop rules.
        allocators: Allocators of bits.
        search: Whether the planner's own search goes on from their plans.
    """

    rules: tuple[Rule, ...]
    allocators: tuple[Allocator, ...]
    search: bool

    @property
    def name(self) -> str:
        """``search``, or the names with commas between."""
        names = [rule.name for rule in self.rules] + [allocator.name for allocator in self.allocators]
        return SEARCH if self.search else ",".join(names)

    def check(self, transforms: Sequence[str]) -> None:
        """Raise where a named rule could propose nothing.

        Raises:
            BudgetError: Its transform is not used.
        """
        for parts, kind, transform in (
            (self.rules, "drop rules", "drop"),
            (self.allocators, "allocators", QUANTIZE),
        ):
            if parts and not self.search and transform not in transforms:
                raise BudgetError(
                    f"a strategy of {kind} needs the transform '{transform}'",
                    advice="add it to transforms, or leave them out",
                )


def strategy_names() -> tuple[str, ...]:
    """Everything that a strategy can name."""
    return (SEARCH, *rule_names(), *allocator_names())


def strategy_of(strategy: str | Sequence[str] | None) -> Strategy:
    """The rules and allocators of a strategy, and whether their plans are all that is looked at.

    Args:
        strategy: ``search`` or None: every drop rule, then the planner's own search, which solves for bits
            itself. Else one or several names of rules and allocators, as a sequence or with commas between:
            only their plans.

    Raises:
        BudgetError: A name is nobody's.
    """
    names = strategy.split(",") if isinstance(strategy, str) else list(strategy or ())
    names = [n.strip() for n in names if n.strip()] or [SEARCH]
    if names == [SEARCH]:
        return Strategy(RULES, (), True)
    for name in names:
        if name not in strategy_names()[1:]:
            raise BudgetError(
                f"there is no strategy '{name}'", advice=f"choose from {', '.join(strategy_names())}"
            )
    allocators = tuple(a for a in ALLOCATORS if a.name in names)
    rules = tuple(get_rule(n) for n in dict.fromkeys(names) if n in rule_names())
    return Strategy(rules, allocators, False)


@dataclass(frozen=True)
class Seeds:
    """Everything that proposes plans to a search; call it with one."""

    parts: tuple[DropSeeds | BitSeeds, ...]

    def __call__(self, search: Search) -> None:
        """Measure what the parts propose."""
        for part in self.parts:
            part(search)

    def report(self) -> list[dict[str, Any]]:
        """What became of every rule and allocator."""
        return [row for part in self.parts for row in part.report()]


def seeds(
    request: Request, prepared: Prepared, evaluator: Evaluator, damage: Sequence[Sequence[float]]
) -> Seeds:
    """The plans of the request's strategy, measured on the planner's supergraph.

    Args:
        request: What was asked for.
        prepared: Space and prices.
        evaluator: Runs candidates.
        damage: Divergence of every option alone.
    """
    strategy = strategy_of(request.strategy)
    drops = drop_seeds(request, prepared, evaluator, damage, strategy) if strategy.rules else None
    bits = bit_seeds(request, prepared, evaluator, damage, strategy) if strategy.allocators else None
    return Seeds(tuple(part for part in (drops, bits) if part is not None))


def bit_seeds(
    request: Request,
    prepared: Prepared,
    evaluator: Evaluator,
    damage: Sequence[Sequence[float]],
    strategy: Strategy,
) -> BitSeeds:
    """The plans of a strategy's allocators."""
    selection, step = evaluator.selection, evaluator.selection.fixed_batch or 1
    probe = selection.rows(slice(0, min(max(_SAMPLES // step, 1) * step, selection.samples)))
    divergence = _divergence(request, prepared.folded.program)
    rows = calibration_rows(request)
    evidence = bit_evidence(prepared.costs, damage, rows, evaluator, probe, divergence)
    return BitSeeds(strategy.allocators, evidence, share=1.0)


def drop_seeds(
    request: Request,
    prepared: Prepared,
    evaluator: Evaluator,
    damage: Sequence[Sequence[float]],
    strategy: Strategy,
) -> DropSeeds | None:
    """The plans of a strategy's drop rules; None without drops."""
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
    made = DropSeeds(strategy.rules, evidence, costs.space, share=SHARE if strategy.search else 1.0)
    made.evidence = _measured(request, prepared, evaluator, made)
    return made


def _axis(request: Request) -> str:
    """The cost that savings are counted in."""
    wanted = [request.minimize, *(b.axis for b in request.budget.costs)]
    axis = next((a for a in wanted if a != "damage"), "latency")
    return {"memory": "size", FOOTPRINT: "latency"}.get(axis, axis)


def _delta(prepared: Prepared, axis: str, index: int) -> float:
    costs = prepared.costs
    return costs.latency_delta(index, 1) if axis == "latency" else float(costs.delta[axis][index][0])


def _measured(request: Request, prepared: Prepared, evaluator: Evaluator, seeds: DropSeeds) -> DropEvidence:
    """The evidence with measures on the supergraph; sets it cannot express are infinitely harmful."""
    program = prepared.folded.program
    probe = _probe(request, evaluator, len(seeds.evidence.branches))
    judge = _divergence(request, program)
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


def _divergence(request: Request, program: Program) -> Divergence:
    found = get_metric(request.metric.divergence, program)
    if not isinstance(found, Divergence):
        raise PassError(f"metric '{request.metric.name}' names no divergence")
    return found


def _probe(request: Request, evaluator: Evaluator, branches: int) -> Dataset:
    """As many selection samples as let a greedy rule drop a quarter of the branches in its share of time."""
    selection = evaluator.selection
    per_batch = evaluator.run_seconds / max(evaluator.runs, 1)
    steps = max(branches * branches / 4, 1)
    batches = int(np.clip(_GREEDY * request.seconds / max(per_batch * steps, 1e-9), 1, _BATCHES))
    step = selection.fixed_batch or max(1, selection.batch_size // selection.group)
    return selection.rows(slice(0, min(batches * step, selection.samples)))
