"""Plans over whole chains: windows of the space that hold them, genomes that are them, and whole searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from residual_nets import Net, run
from tiny import shorten_timing

import lamina
from lamina.analysis.statistics import Statistics
from lamina.backends.backend import Target
from lamina.ir.program import Program
from lamina.passes.conv_chains import ConvChain, conv_chains
from lamina.passes.merge_conv_chain import MergeConvChain, Tiling, partitions
from lamina.planner.apply import apply_moves
from lamina.planner.chain_dp import ChainPlan, Span, Way, front, joint
from lamina.planner.chain_plans import CHAIN_RULES, POINTS, ChainPlans, plan_chains
from lamina.planner.chain_tables import ChainTable, plan_moves, span_keys
from lamina.planner.space import Space, build_space
from lamina.planner.supergraph import build_supergraph


def network(chains: int = 2, length: int = 5, seed: int = 0) -> Program:
    """Residual blocks of ``length`` 3x3 convolutions with Relu between, then a classifier."""
    net = Net(seed)
    x = net.input("x", ["batch", 4, 8, 8])
    for _ in range(chains):
        value = x
        for number in range(length):
            weight = net.array(net.random.standard_normal((4, 4, 3, 3)).astype(np.float32) / 5, "weight")
            value = net.op("Conv", value, weight, pads=[1] * 4)
            value = net.op("Relu", value) if number < length - 1 else value
        x = net.op("Add", x, value)
    return net.program(net.op("Flatten", net.op("GlobalAveragePool", x)))


def tables_of(program: Program, seed: int) -> list[ChainTable]:
    """Every chain with made-up latencies and damages; merging always saves some."""
    random = np.random.default_rng(seed)
    tables = []
    for chain in conv_chains(program)[0]:
        table = ChainTable(chain)
        for (first, last), without in span_keys(chain, 3, 1e9):
            left = last - first + 1 - len(without)
            plain = first == last and not without
            table.latency[(first, last), without] = float(bool(left)) if plain else 0.4 * left + 0.1
            table.damage[(first, last), without] = 0.0 if plain else float(random.uniform(0.1, 1.0))
        tables.append(table)
    return tables


def space_with(program: Program, plans: ChainPlans) -> Space:
    transform = MergeConvChain(growth=1e9, planned=plans.tilings)
    return build_space(program, [transform], Statistics(0), Target.parse("ort:cpu?threads=1"))


@pytest.fixture(scope="module", params=range(4))
def planned(request: pytest.FixtureRequest) -> tuple[Program, list[ChainTable], ChainPlans]:
    program = network()
    tables = tables_of(program, request.param)
    return program, tables, plan_chains(tables, MergeConvChain(growth=1e9))


def test_plans_are_those_of_the_programs_over_all_chains_at_once(planned):
    program, tables, plans = planned
    space = space_with(program, plans)
    row: dict[Span, list[Way]] = {}
    start = 0
    for table in tables:
        for (first, last), ways in table.ways().items():
            span = first + start, last + start
            row[span] = [Way(w.latency, w.damage, (span,), tuple(i + start for i in w.without)) for w in ways]
        start += len(table.chain.convs)
    for rule in CHAIN_RULES:
        best = [p for p in front(start, rule.ways(start, row), points=POINTS) if changes(p)]
        genomes = [genome for _, genome in plans.genomes(rule.name, space)]
        assert len(genomes) == len(best) > 1
        for plan, genome in zip(best, genomes, strict=True):
            assert genome is not None
            assert genome == space.canonical(genome)
            finished = apply_moves(program, space.moves(genome))
            left = [m for w in plan.ways for m in w.merges if set(range(m[0], m[1] + 1)) - set(w.without)]
            assert sum(n.op_type == "Conv" for n in finished.graph) == len(left) < start


def changes(plan: ChainPlan) -> bool:
    return any(first < last for way in plan.ways for first, last in way.merges) or any(
        way.without for way in plan.ways
    )


def test_a_genome_computes_what_the_moves_of_the_plan_do():
    program = network(1)
    (table,) = tables_of(program, 1)
    count = len(table.chain.convs)
    plans = plan_chains([table], MergeConvChain(growth=1e9), CHAIN_RULES[1:])
    space = space_with(program, plans)
    x = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    compared = 0
    for tilings, (_, genome) in zip(
        plans.plans["merge-conv-chain"], plans.genomes("merge-conv-chain", space), strict=True
    ):
        spans = {s: w for t in tilings for s, w in _spans_of(t, table.chain).items()}
        alone = {(i, i): [Way(1.0, 0.0, ((i, i),))] for i in range(count)}
        ways = {s: [Way(0.0, 0.0, (s,), w)] for s, w in spans.items()}
        plan = joint(count, {**alone, **ways}, 100.0)
        assert plan is not None
        assert genome is not None
        expected = run(apply_moves(program, plan_moves(program, table.chain, plan)), {"x": x})[0]
        np.testing.assert_allclose(
            run(apply_moves(program, space.moves(genome)), {"x": x})[0], expected, rtol=1e-4, atol=1e-5
        )
        compared += 1
    assert compared


def _spans_of(tiling: Tiling, chain: ConvChain) -> dict[tuple[int, int], tuple[int, ...]]:
    start = chain.convs.index(tiling.convs[0])
    return {
        (a + start, b + start): tuple(i + start for i in tiling.without if a <= i <= b)
        for a, b in tiling.segments
        if a < b or a in tiling.without
    }


def test_windows_nest_and_keep_what_is_offered_anyway(planned):
    program, _, plans = planned
    plain = space_with(program, ChainPlans({}))
    space = space_with(program, plans)
    offered = {(c.site.name, o.name) for c in space.choices for o in c.options}
    assert {(c.site.name, o.name) for c in plain.choices for o in c.options} <= offered
    assert {(t.site, t.option) for t in plans.tilings} <= offered
    for choice in space.choices:
        for other in space.choices:
            shared = choice.span & other.span
            assert not shared or choice.span <= other.span or other.span <= choice.span


def test_the_supergraph_runs_every_plan(planned):
    program, _, plans = planned
    space = space_with(program, plans)
    supergraph = build_supergraph(space)
    from lamina.backends.onnxruntime import OnnxRuntime

    supergraph.executable = OnnxRuntime().compile(supergraph.model, Target.parse("ort:cpu?threads=1"))
    x = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    for _, genome in plans.genomes("merge-conv-chain", space):
        assert genome is not None
        (made,) = supergraph.run(genome, {"x": x}).values()
        finished = apply_moves(program, space.moves(genome))
        np.testing.assert_allclose(made, run(finished, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_an_option_that_left_the_space_takes_its_plans_along(planned):
    program, _, plans = planned
    space = space_with(program, plans)
    tiling = plans.plans["merge-conv-chain"][-1][0]
    without = space.without({(MergeConvChain.name, tiling.site, tiling.option)})
    genomes = [g for _, g in plans.genomes("merge-conv-chain", without)]
    lost = [tiling in plan for plan in plans.plans["merge-conv-chain"]]
    assert [g is None for g in genomes] == lost
    assert any(lost)


def test_a_chain_that_cannot_be_timed_stays_as_it_is():
    program = network()
    tables = tables_of(program, 0)
    del tables[0].latency[(1, 1), ()]
    plans = plan_chains(tables, MergeConvChain(growth=1e9))
    assert plans.tilings
    assert not {name for t in plans.tilings for name in t.convs} & set(tables[0].chain.convs)


def test_partitions_of_a_long_window_are_not_all_offered(planned):
    program, _, plans = planned
    longest = MergeConvChain().longest
    for choice in space_with(program, plans).choices:
        count = int(choice.site.kind.rpartition("-")[2])
        if count > longest:
            mine = {t.option for t in plans.tilings if t.site == choice.site.name}
            assert {o.name for o in choice.options} == mine
        else:
            assert len(choice.options) >= len(list(partitions(count))) - 1


@pytest.mark.parametrize("rule", [rule.name for rule in CHAIN_RULES])
def test_a_strategy_keeps_to_the_plans_of_its_program(rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    shorten_timing(monkeypatch)
    program = network(1)
    x = np.random.default_rng(0).standard_normal((48, 4, 8, 8)).astype(np.float32)
    result = lamina.optimize(
        program.model,
        "drop<=90%",
        data={"x": x},
        metric="relative-l2",
        target="ort:cpu?threads=1",
        minimize="flops",
        strategy=rule,
        seconds=4,
        batch_size=16,
    )
    assert {m.site.transform for m in result.plan.moves} <= {"merge-conv-chain"}
    (told,) = result.evidence["rules"]
    assert told["rule"] == rule
    assert told["measured"] or told["ended"]
    again = lamina.apply(program.model, result.plan)
    np.testing.assert_array_equal(run(again, {"x": x[:4]})[0], run(result.program, {"x": x[:4]})[0])


def test_a_model_without_chains_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    shorten_timing(monkeypatch)
    program = network(1, length=1)
    x = np.random.default_rng(0).standard_normal((48, 4, 8, 8)).astype(np.float32)
    options = {"target": "ort:cpu?threads=1", "seconds": 2, "batch_size": 16, "strategy": "merge-conv-chain"}
    result = lamina.optimize(program.model, "drop<=90%", data={"x": x}, **options)
    assert not result.plan.moves
    (told,) = result.evidence["rules"]
    assert told["ended"] == "no two convolutions follow each other with nothing but activations between"
