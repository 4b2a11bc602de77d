"""Chains measured on the target: the plans of the dynamic programs are the best of the table, and apply."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from residual_nets import Net, run

from lamina.backends.backend import Case, Target
from lamina.backends.onnxruntime import OnnxRuntime
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.conv_chains import conv_chains
from lamina.passes.merge_conv_chain import partitions
from lamina.planner.apply import apply_moves
from lamina.planner.chain_dp import front, joint, two_stage
from lamina.planner.chain_tables import ChainTable, chain_move, chain_tables, plan_moves
from lamina.planner.prices import Prices
from lamina.quality import evaluate, get_metric


def network(seed: int = 0) -> Program:
    """A stem, an inverted bottleneck without a shortcut, and a 3x3 that keeps its size and channels."""
    net = Net(seed)

    def layer(x, inputs: int, outputs: int, kernel: int, act: bool = True, **attributes):
        shape = (outputs, inputs // attributes.get("group", 1), kernel, kernel)
        scale = np.float32(1.4 / np.sqrt(np.prod(shape[1:])))
        weight = net.array(net.random.standard_normal(shape).astype(np.float32) * scale, "weight")
        value = net.op("Conv", x, weight, pads=[kernel // 2] * 4, **attributes)
        return net.op("Relu", value) if act else value

    x = net.input("x", ["batch", 8, 12, 12])
    x = layer(layer(x, 8, 48, 1), 48, 48, 3, group=48)
    x = layer(x, 48, 8, 1, act=False)
    x = layer(x, 8, 8, 3)
    return net.program(net.op("Flatten", net.op("GlobalAveragePool", layer(x, 8, 12, 1, act=False))))


@dataclass(frozen=True)
class Measured:
    program: Program
    data: Dataset
    table: ChainTable


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    program = network()
    x = np.random.default_rng(0).standard_normal((16, 8, 12, 12)).astype(np.float32)
    data = Dataset({"x": x}, {}, batch_size=16)
    (chain,), refused = conv_chains(program)
    assert len(chain.convs) == 5
    assert not refused
    prices = Prices(Target("ort", "cpu", 1), OnnxRuntime(), tmp_path_factory.mktemp("prices"))
    workload = (Case("one", {"x": x[:1]}, 0.25), Case("four", {"x": x[:4]}, 0.75))
    metric = get_metric("relative-l2", program)
    (table,) = chain_tables(program, [chain], prices, workload, data, metric, growth=1e9, threads=1)
    return Measured(program, data, table)


def test_every_span_has_a_latency_and_a_damage(measured):
    latency, damage = measured.table.merges()
    assert {s for s in latency} == {(i, j) for i in range(5) for j in range(i, min(i + 4, 5))}
    assert all(seconds > 0 for seconds in latency.values())
    assert all(damage[i, i] == 0 for i in range(5))
    dropped = {k for k in measured.table.latency if k[1]}
    assert ((3, 3), (3,)) in dropped  # the 3x3 with 8 channels in and out
    assert ((1, 1), (1,)) in dropped  # the depthwise
    assert not {i for _, without in dropped for i in without} & {0, 2, 4}
    assert measured.table.latency[(3, 3), (3,)] == 0


def test_damages_are_those_of_the_merged_programs(measured):
    program, table = measured.program, measured.table
    metric = get_metric("relative-l2", program)

    def scored(other: Program) -> float:
        def outputs(p: Program):
            return lambda feeds: {p.outputs[0].name: run(p, feeds)[0]}

        return metric.score(evaluate(outputs(other), measured.data, metric, outputs(program)))

    for key in (((0, 1), ()), ((0, 2), ()), ((2, 4), (3,)), ((3, 3), (3,))):
        merged = apply_moves(program, [chain_move(program, table.chain, *key)])
        assert table.damage[key] == pytest.approx(scored(merged), rel=1e-3, abs=1e-6)
    linear = table.damage[(2, 3), ()]  # no activation between, and a 1x1 without bias before the padding
    assert linear < 1e-5


@pytest.mark.parametrize("share", [1.2, 0.8, 0.6, 0.45, 0.3])
def test_plans_are_the_best_of_the_table_and_apply(measured, share):
    program, table = measured.program, measured.table
    latency, damage = table.merges()
    tick = min(s for s in latency.values() if s > 0) / 1000
    whole = {s: float(np.ceil(v / tick - 1e-9)) for s, v in latency.items()}
    budget = share * sum(whole[i, i] for i in range(5))
    plan = two_stage(5, whole, damage, budget, resolution=1.0)
    best = np.inf
    for segments in partitions(5):
        fastest = sum(
            min(sum(whole.get((i + a, i + b), np.inf) for a, b in inner) for inner in partitions(j - i + 1))
            for i, j in segments
        )
        harm = sum(damage.get(s, np.inf) if s[0] < s[1] else 0.0 for s in segments)
        best = min(best, harm) if fastest <= budget else best
    assert (plan is None) == (not np.isfinite(best))
    if plan is None:
        return
    assert plan.damage == pytest.approx(best)
    finished = apply_moves(program, plan_moves(program, table.chain, plan))
    merges = [m for way in plan.ways for m in way.merges]
    assert sum(n.op_type == "Conv" for n in finished.graph) == len(merges)
    assert run(finished, measured.data.inputs)[0].shape == (16, 12)


def test_joint_plans_may_drop_convolutions_and_are_no_worse(measured):
    program, table = measured.program, measured.table
    ways = table.ways()
    latency, _ = table.merges()
    untouched = sum(latency[i, i] for i in range(5))
    for share in (0.9, 0.7, 0.5, 0.35):
        plan = joint(5, ways, share * untouched)
        only_merged = {s: [w for w in listed if not w.without] for s, listed in ways.items()}
        merged = joint(5, only_merged, share * untouched)
        assert plan is not None
        assert merged is None or plan.damage <= merged.damage + 1e-12
        best = min(
            sum(w.damage for w in chosen)
            for segments in partitions(5)
            for chosen in itertools.product(*(ways.get(s, []) for s in segments))
            if sum(w.latency for w in chosen) <= share * untouched * (1 - 6 / 4096)
        )
        assert plan.damage <= best + 1e-12
        assert plan.latency <= share * untouched
        finished = apply_moves(program, plan_moves(program, table.chain, plan))
        left = [m for w in plan.ways for m in w.merges if len(w.without) <= m[1] - m[0]]
        assert sum(n.op_type == "Conv" for n in finished.graph) == len(left)
        assert run(finished, measured.data.inputs)[0].shape == (16, 12)


def test_the_front_begins_with_the_chain_as_it_is(measured):
    plans = front(5, measured.table.ways())
    assert plans[0].damage <= 1e-5
    assert [p.damage for p in plans] == sorted(p.damage for p in plans)
