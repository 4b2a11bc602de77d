"""Rules inside the search: its best plan is no worse than any rule's, and a strategy keeps to its rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from drop_nets import classifier, decoder, samples
from tiny import shorten_timing
from toy import random_costs

import lamina
from lamina.analysis.statistics import Statistics
from lamina.backends.backend import Target
from lamina.errors import BudgetError, PassError, VerificationError
from lamina.ir.branches import cache_ports
from lamina.passes.drop_branch import DropBranch, apply_drops
from lamina.planner.drop_evidence import DropEvidence, droppable
from lamina.planner.drop_rules import Rule
from lamina.planner.evaluator import Score
from lamina.planner.referee import Referee
from lamina.planner.rule_seeds import RuleSeeds
from lamina.planner.search import Goal, Search
from lamina.planner.space import Genome, Space, build_space
from lamina.planner.strategy import drop_sources, strategy_of


class Judge:
    """Stands in for the evaluator: some pairs of branches hurt far more, or less, than their sum."""

    def __init__(self, space: Space, seed: int) -> None:
        random = np.random.default_rng(seed)
        count = len(space.choices)
        self.space, self.batches = space, [None] * 4
        self.single = random.uniform(0.1, 1.0, count)
        self.pairs = np.triu(random.uniform(-0.3, 0.6, (count, count)), 1)

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        taken = np.asarray([g > 0 for g in genome], float)
        total = float(self.single @ taken + taken @ self.pairs @ taken)
        return Score(1 - total, total, 0.0, 100)


def space_of(seed: int) -> Space:
    program = classifier(4, seed)
    return build_space(program, [DropBranch()], Statistics(0), Target.parse("ort:cpu?threads=1"))


def listed(name: str, order: Sequence[str]) -> Rule:
    return Rule(name, "", lambda evidence: (tuple(order[: k + 1]) for k in range(len(order))))


def rules_for(space: Space, judge: Judge, seed: int) -> list[Rule]:
    """Random orders, and the greedy one on the true damage."""
    names = [c.site.name for c in space.choices]
    random = np.random.default_rng(seed)
    rules = [listed(f"random {i}", list(random.permutation(names))) for i in range(3)]

    def greedy(evidence: DropEvidence):
        genes, chosen = [0] * len(names), []
        while len(chosen) < len(names):
            harm = {
                n: judge.score([1 if g or m == n else 0 for g, m in zip(genes, names, strict=True)]).damage
                for n in names
                if n not in chosen
            }
            chosen.append(min(harm, key=harm.__getitem__))
            genes[names.index(chosen[-1])] = 1
            yield tuple(chosen)

    return [*rules, Rule("greedy", "", greedy, "divergence")]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "goal", [Goal("latency", {}, 1.5), Goal("damage", {"latency": 0.8}), Goal("latency", {"size": 0.9}, 2.0)]
)
def test_the_search_is_no_worse_than_any_of_its_rules(seed, goal):
    space = space_of(seed)
    costs, _ = random_costs(space, seed)
    judge = Judge(space, seed)
    damage = [[float(d)] for d in judge.single]
    evidence = DropEvidence(droppable(space.program))
    goal = Goal(goal.minimize, {a: b * costs.base[a] for a, b in goal.bounds.items()}, goal.allowed_damage)

    def best(rules: Sequence[Rule], only: bool):
        seeds = RuleSeeds(drop_sources(rules, evidence, space), space, share=1.0)
        search = Search(costs, damage, judge, goal, seconds=20, seeds=seeds, only_seeds=only)  # type: ignore[arg-type]
        search.run()
        return search.best(), seeds

    rules = rules_for(space, judge, seed)
    mix, seeds = best(rules, False)
    assert mix is not None
    for rule in rules:
        alone, _ = best([rule], True)
        if alone is not None:
            assert mix.objective(goal) <= alone.objective(goal) + 1e-12
    told = {row["rule"]: row for row in seeds.report()}
    assert set(told) == {r.name for r in rules}
    assert all(row["measured"] for row in told.values())


@pytest.mark.parametrize("seed", range(4))
def test_a_rule_alone_drops_as_many_as_the_bound_allows(seed):
    space = space_of(seed)
    costs, _ = random_costs(space, seed)
    judge = Judge(space, seed)
    judge.pairs[:] = 0  # then damage grows, and bisection must find the last set that fits
    names = [c.site.name for c in space.choices]
    seeds = RuleSeeds(drop_sources([listed("order", names)], DropEvidence(()), space), space)
    goal = Goal("flops", {}, 1.3)
    flops = {**costs.delta, "flops": [[-1.0] for _ in names]}
    costs.delta = flops
    search = Search(costs, [[1.0]] * len(names), judge, goal, seeds=seeds, only_seeds=True)  # type: ignore[arg-type]
    search.run()
    fits = np.cumsum(judge.single) <= 1.3
    found = search.best()
    assert found is not None
    assert sum(found.genome) == int(fits.sum())


def test_without_time_two_plans_of_every_rule_are_measured_and_may_win():
    space = space_of(0)
    costs, _ = random_costs(space, 0)
    judge = Judge(space, 0)
    names = [c.site.name for c in space.choices]
    best = min(range(len(names)), key=lambda i: judge.single[i])
    costs.delta = {**costs.delta, "latency": [[-0.01] for _ in names]}
    judge.pairs = np.triu(
        np.full_like(judge.pairs, 10.0), 1
    )  # any two branches are a disaster, which sums of damages do not show
    rules = [listed(f"from {i}", [*names[i:], *names[:i]]) for i in range(len(names))]
    goal = Goal("damage", {"latency": costs.predict(space.nothing)["latency"] * 0.999})
    seeds = RuleSeeds(drop_sources(rules, DropEvidence(()), space), space)
    search = Search(costs, [[1.0]] * len(names), judge, goal, seconds=1e-9, seeds=seeds)  # type: ignore[arg-type]
    search.run()
    told = {row["rule"]: row for row in seeds.report()}
    assert all(row["measured"] == 2 for row in told.values())
    found = search.best()
    assert found is not None
    assert found.score.damage <= judge.single[best] + 1e-12


def test_a_rule_that_cannot_work_costs_its_plans_only():
    space = space_of(0)
    costs, damage = random_costs(space, 0)

    def broken(evidence: DropEvidence):
        raise PassError("no such thing")

    names = [c.site.name for c in space.choices]
    rules = [Rule("broken", "", broken), listed("fine", names)]
    seeds = RuleSeeds(drop_sources(rules, DropEvidence(()), space), space)
    judge = Judge(space, 0)
    Search(costs, damage, judge, Goal("latency", {}, 1.0), seconds=5, seeds=seeds).run()  # type: ignore[arg-type]
    first, second = seeds.report()
    assert first == {"rule": "broken", "measured": 0, "best": None, "ended": "no such thing"}
    assert second["measured"]


def test_names_of_strategies():
    assert strategy_of(None) == strategy_of("search")
    assert strategy_of("search").search
    assert strategy_of("search").name == "search"
    named = strategy_of("balanced-skip, merge-conv-chain, joint-branch-drop")
    assert not named.search
    assert [r.name for r in named.rules] == ["balanced-skip", "joint-branch-drop"]
    assert [r.name for r in named.programs] == ["merge-conv-chain"]
    assert strategy_of(named.name) == named
    with pytest.raises(BudgetError, match="there is no strategy 'nonsense'"):
        strategy_of(["nonsense"])
    with pytest.raises(BudgetError, match="needs the transform 'drop'"):
        lamina.optimize("absent.onnx", "drop<=1%", strategy="balanced-skip", transforms=["quantize"])
    with pytest.raises(BudgetError, match="needs the transform 'merge-conv-chain'"):
        lamina.optimize("absent.onnx", "drop<=1%", strategy="conv-merge-two-stage-dp", transforms=["drop"])


# -- whole optimizations ------------------------------------------------------------------------------


@pytest.fixture
def brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    shorten_timing(monkeypatch)


def optimized(program, **options) -> lamina.Result:
    given = {"target": "ort:cpu?threads=1", "minimize": "flops", "seconds": 4, "batch_size": 16} | options
    return lamina.optimize(program.model, "drop<=90%", data=samples(program, 48), **given)


def test_a_strategy_keeps_to_the_plans_of_its_rule(brief):
    program = classifier(4)
    result = optimized(program, strategy="balanced-skip", metric="kl")
    assert {m.site.transform for m in result.plan.moves} <= {"drop"}
    allowed = [{"l.2"}, {"l.1", "l.2"}]
    dropped = {m.site.name.rpartition(".")[0] for m in result.plan.moves}
    assert dropped in [set(), *allowed]
    (told,) = result.evidence["rules"]
    assert told["rule"] == "balanced-skip"
    assert told["measured"] >= 1


def test_every_rule_of_the_search_is_told(brief):
    result = optimized(classifier(2), metric="cross-entropy", transforms=["drop"], seconds=8)
    told = {row["rule"]: row for row in result.evidence["rules"]}
    assert {"greedy-perplexity", "greedy-output-divergence", "contiguous-block-drop"} <= set(told)
    assert told["joint-branch-drop"]["measured"]


def test_caches_of_dropped_attentions_leave_the_finished_model(brief):
    program = decoder()
    result = optimized(program, strategy="attention-first", transforms=["drop"])
    gone = {m.site.name.split(".")[1] for m in result.plan.moves if m.site.kind == "attention"}
    assert gone
    ports = [p.name for p in (*program.inputs, *program.outputs)]
    kept = [p for p in ports if p[:4] not in ("past", "pres") or p.split(".")[1] not in gone]
    assert [p.name for p in (*result.program.inputs, *result.program.outputs)] == kept
    again = lamina.apply(program.model, result.plan)
    assert [p.name for p in again.inputs] == [p.name for p in result.program.inputs]


def test_only_whole_caches_of_a_branch_may_leave():
    program = decoder(2)
    referee = Referee(program)
    dropped = apply_drops(program, ["l.1.attn"])
    with pytest.raises(VerificationError, match="the inputs changed"):
        referee.check(dropped, "drop", exact=False)  # nobody said that these are caches
    referee.caches = cache_ports(program)
    referee.check(dropped, "drop", exact=False)
    with pytest.raises(VerificationError, match="the inputs changed"):
        referee.check(dropped, "folding", exact=True)
    half = dropped.clone()
    half.graph.outputs[:] = [v for v in half.graph.outputs if v.name != "present.0.key"]
    with pytest.raises(VerificationError, match="the outputs changed"):
        referee.check(half, "drop", exact=False)
