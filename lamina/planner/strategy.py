"""What a search starts from: the plans of every rule, or of the rules a user names and nothing else.

Rules are drop rules (:mod:`lamina.planner.drop_rules`) and the dynamic programs over chains of convolutions
(:mod:`lamina.planner.chain_plans`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.data import Dataset
from lamina.errors import BudgetError, PassError
from lamina.passes.merge_conv_chain import MergeConvChain
from lamina.planner.chain_plans import CHAIN_RULES, ChainRule
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
from lamina.planner.drop_sets import task_loss
from lamina.planner.evaluator import Evaluator
from lamina.planner.prepare import Prepared, calibration_rows
from lamina.planner.request import Request
from lamina.planner.rule_seeds import SHARE, RuleSeeds, Source, Step
from lamina.planner.space import Genome, Space
from lamina.quality import get_metric
from lamina.quality.divergence import Divergence

SEARCH = "search"
# Share of the search's time that the steps of one greedy rule are meant to fit in.
_GREEDY = 0.2
# Selection samples such a step looks at: at most so many batches, at least so many samples.
_BATCHES, _LEAST = 8, 8


@dataclass(frozen=True)
class Strategy:
    """Where plans come from.

    Attributes:
        rules: Drop rules.
        programs: Dynamic programs over chains of convolutions.
        search: Whether the planner's own search goes on from their plans.
    """

    rules: tuple[Rule, ...]
    programs: tuple[ChainRule, ...]
    search: bool

    @property
    def name(self) -> str:
        """``search``, or the names with commas between."""
        names = [rule.name for rule in self.rules] + [program.name for program in self.programs]
        return SEARCH if self.search else ",".join(names)

    def check(self, transforms: Collection[str]) -> None:
        """Raise where a named rule could propose nothing.

        Raises:
            BudgetError: Its transform is not used.
        """
        for parts, kind, transform in (
            (self.rules, "drop rules", "drop"),
            (self.programs, "programs over chains", MergeConvChain.name),
        ):
            if parts and not self.search and transform not in transforms:
                raise BudgetError(
                    f"a strategy of {kind} needs the transform '{transform}'",
                    advice="add it to transforms, or leave them out",
                )


def strategy_names() -> tuple[str, ...]:
    """Everything that a strategy can name."""
    return (SEARCH, *rule_names(), *(rule.name for rule in CHAIN_RULES))


def strategy_of(strategy: str | Sequence[str] | None) -> Strategy:
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
        return Strategy(RULES, CHAIN_RULES, True)
    for name in names:
        if name not in strategy_names()[1:]:
            raise BudgetError(
                f"there is no strategy '{name}'", advice=f"choose from {', '.join(strategy_names())}"
            )
    rules = tuple(get_rule(n) for n in dict.fromkeys(names) if n in rule_names())
    return Strategy(rules, tuple(rule for rule in CHAIN_RULES if rule.name in names), False)


def rule_seeds(
    request: Request, prepared: Prepared, evaluator: Evaluator, damage: Sequence[Sequence[float]]
) -> RuleSeeds:
    """The plans of the request's rules, measured on the planner's supergraph.

    Args:
        request: What was asked for.
        prepared: Space, prices, and plans over chains.
        evaluator: Runs candidates.
        damage: Divergence of every option alone.
    """
    strategy = strategy_of(request.strategy)
    space = prepared.costs.space
    sources: list[Source] = []
    if strategy.rules and any(c.transform.name == "drop" for c in space.choices):
        sources += drop_sources(strategy.rules, _evidence(request, prepared, evaluator, damage), space)
    if MergeConvChain.name in request.transforms:
        sources += [
            Source(rule.name, partial(prepared.chains.genomes, rule.name, space))
            for rule in strategy.programs
        ]
    return RuleSeeds(sources, space, share=SHARE if strategy.search else 1.0)


def drop_sources(rules: Sequence[Rule], evidence: DropEvidence, space: Space) -> list[Source]:
    """The plans of drop rules in a space."""

    def plans(rule: Rule) -> Iterator[Step]:
        return ((len(names), drop_genome(space, names)) for names in rule.sets(evidence))

    return [Source(rule.name, partial(plans, rule), rule.greedy) for rule in rules]


def drop_genome(space: Space, names: DropSet) -> Genome | None:
    """The genome that drops these branches and nothing else; None where one cannot be dropped alone."""
    place = {
        choice.site.name: (i, [o.name for o in choice.options].index("drop") + 1)
        for i, choice in enumerate(space.choices)
        if choice.transform.name == "drop"
    }
    genes = list(space.nothing)
    for name in names:
        if name not in place:
            return None
        index, gene = place[name]
        genes[index] = gene
    return space.canonical(genes)


def _evidence(
    request: Request, prepared: Prepared, evaluator: Evaluator, damage: Sequence[Sequence[float]]
) -> DropEvidence:
    """What drop rules go by, with measures on the supergraph."""
    space = prepared.costs.space
    drops = {c.site.name: i for i, c in enumerate(space.choices) if c.transform.name == "drop"}
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
    return _measured(request, prepared, evaluator, evidence)


def _axis(request: Request) -> str:
    """The cost that savings are counted in."""
    wanted = [request.minimize, *(b.axis for b in request.budget.costs)]
    axis = next((a for a in wanted if a != "damage"), "latency")
    return "size" if axis == "memory" else axis


def _delta(prepared: Prepared, axis: str, index: int) -> float:
    costs = prepared.costs
    return costs.latency_delta(index, 1) if axis == "latency" else float(costs.delta[axis][index][0])


def _measured(
    request: Request, prepared: Prepared, evaluator: Evaluator, evidence: DropEvidence
) -> DropEvidence:
    """The evidence with measures on the supergraph; sets it cannot express are infinitely harmful."""
    program, space = prepared.folded.program, prepared.costs.space
    probe = _probe(request, evaluator, len(evidence.branches))
    divergence = get_metric(request.metric.divergence, program)
    if not isinstance(divergence, Divergence):
        raise PassError(f"metric '{request.metric.name}' names no divergence")
    judge = divergence
    loss = task_loss(program, probe)

    def through(measure: Callable[[Sequence[Genome]], Sequence[float]]) -> Measure:
        def measured(sets: Sequence[DropSet]) -> list[float]:
            genomes = [drop_genome(space, s) for s in sets]
            known = [g for g in genomes if g is not None]
            values = iter(measure(known) if known else ())
            return [float("inf") if g is None else next(values) for g in genomes]

        return measured

    apart = through(lambda genomes: evaluator.single_divergences(probe, judge, genomes))
    lost = None if loss is None else through(lambda genomes: evaluator.single_scores(probe, loss, genomes))
    return replace(evidence, divergence=apart, loss=lost)


def _probe(request: Request, evaluator: Evaluator, branches: int) -> Dataset:
    """As many selection samples as let a greedy rule drop a quarter of the branches in its share of time.

    Few samples of every branch rank better than none of most: greedy rules must get somewhere.
    """
    selection = evaluator.selection
    step = selection.fixed_batch or max(1, selection.batch_size // selection.group)
    per_sample = evaluator.run_seconds / max(evaluator.runs, 1) / step
    steps = max(branches * branches / 4, 1)
    fit = _GREEDY * request.seconds / max(per_sample * steps, 1e-9)
    samples = int(np.clip(fit, _LEAST, _BATCHES * step))
    if selection.fixed_batch:
        samples = max(1, samples // step) * step
    return selection.rows(slice(0, min(samples, selection.samples)))
