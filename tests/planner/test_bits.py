"""Allocators of bits: exact where they claim it, inside their bounds on any model, judged on whole plans."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from toy import plain_choice, random_costs, toy_program

from lamina.ir.program import Program
from lamina.passes.pass_ import Option
from lamina.passes.quantize import Quantize
from lamina.planner.bits.allocators import ALLOCATORS
from lamina.planner.bits.bisection import by_sensitivity
from lamina.planner.bits.evidence import NEVER, BitEvidence, mean_width, width_of, widths_of
from lamina.planner.bits.front import front
from lamina.planner.bits.ladder import Allocator, Ladder
from lamina.planner.bits.linearity import FLOOR
from lamina.planner.bits.measure import option_noise, read_entropy, weight_outliers
from lamina.planner.bits.partition import MOST_OPERATORS, blocks
from lamina.planner.bits.seeds import BitSeeds
from lamina.planner.evaluator import Score
from lamina.planner.finish import store_only
from lamina.planner.search import Goal, Search
from lamina.planner.space import Genome, Space, build_space

NAMES = [a.name for a in ALLOCATORS]
LEVELS = (8, 4, 2)


class Judge:
    """Stands in for the evaluator: damages add up, and pairs of neighbours interact."""

    def __init__(self, damage: list[list[float]], seed: int, pairs: float = 0.3) -> None:
        self.damage, self.batches = damage, [None] * 4
        self.pair = np.random.default_rng(seed).uniform(0, pairs, len(damage))

    def of(self, genome: Genome) -> float:
        single = [self.damage[i][g - 1] if g else 0.0 for i, g in enumerate(genome)]
        both = [p * np.sqrt(a * b) for p, (a, b) in zip(self.pair, itertools.pairwise(single), strict=False)]
        return float(sum(single) + sum(both))

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        return Score(1 - self.of(genome), self.of(genome), 0.0, 100)


def evidence_of(seed: int, count: int = 6, pairs: float = 0.3) -> tuple[BitEvidence, Judge]:
    """Operators of random sizes and damages, each in 8, 4 and 2 bits."""
    random = np.random.default_rng(seed)
    plain = [plain_choice(i, [("float", "float")] * len(LEVELS)) for i in range(count)]
    choices = []
    for i, choice in enumerate(plain):
        site = replace(choice.site, transform="quantize", weights=(f"w{i}",))
        choices.append(replace(choice, site=site, transform=Quantize()))
    space = Space(toy_program(), tuple(choices))
    costs, _ = random_costs(space, seed)
    elements = random.integers(50, 400, count)
    costs.delta = {
        "latency": [[float(v) for v in -random.uniform(0.01, 0.05, 3).cumsum()] for _ in range(count)],
        "size": [[float(n * level / 8 - 4 * n) for level in LEVELS] for n in elements],
        "flops": [[0.0] * 3 for _ in range(count)],
    }
    costs.base = {"latency": 1.0, "size": float(4 * elements.sum()), "flops": 1.0}
    noise = [[0.001 * s, 0.01 * s, 0.1 * s] for s in random.uniform(0.5, 2, count)]
    slopes = random.uniform(0.1, 2, count)
    damage = [[float(a * t) for t in row] for a, row in zip(slopes, noise, strict=True)]
    judge = Judge(damage, seed, pairs)
    evidence = BitEvidence(
        costs,
        damage,
        [list(LEVELS)] * count,
        lambda: noise,
        lambda: {i: float(slopes[i // 2 * 2]) for i in range(count)},
        lambda: {i: float(-slopes[i]) for i in range(count)},
        lambda: dict(enumerate(random.uniform(0, 5, count))),
        lambda genomes: [judge.of(g) for g in genomes],
    )
    return evidence, judge


def best_plan(evidence: BitEvidence, judge: Judge, goal: Goal, allocator: Allocator) -> Search:
    seeds = BitSeeds([allocator], evidence, share=1.0)
    search = Search(
        evidence.costs,
        evidence.damage,
        judge,  # type: ignore[arg-type]
        goal,
        seconds=30,
        seeds=seeds,
        only_seeds=True,
    )
    search.run()
    (told,) = seeds.report()
    assert told["rule"] == allocator.name
    assert told["measured"] > 0
    return search


def every_genome(evidence: BitEvidence, genes: range | tuple[int, ...] = range(4)) -> list[Genome]:
    return list(itertools.product(genes, repeat=len(evidence.space.choices)))


# -- the exact ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_front_holds_every_total_that_no_other_beats(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = random.integers(0, 9, (5, 3)).astype(float)
    harms = random.integers(0, 9, (5, 3)).astype(float)
    harms[2, 1] = np.inf
    totals = {
        (sum(costs[i, k] for i, k in enumerate(picks)), sum(harms[i, k] for i, k in enumerate(picks)))
        for picks in itertools.product(range(3), repeat=5)
    }
    best = {p for p in totals if np.isfinite(p[1]) and not any(_beats(q, p) for q in totals)}
    found = front(costs, harms)
    assert found.exact
    assert set(zip(found.cost.tolist(), found.damage.tolist(), strict=True)) == best
    for index in range(len(found)):
        picks = found.picks(index)
        assert sum(costs[i, k] for i, k in enumerate(picks)) == found.cost[index]
        assert sum(harms[i, k] for i, k in enumerate(picks)) == found.damage[index]


def _beats(q: tuple[float, float], p: tuple[float, float]) -> bool:
    return q != p and q[0] <= p[0] and q[1] <= p[1]


def test_a_front_without_room_keeps_true_costs_and_says_that_it_is_not_exact() -> None:
    random = np.random.default_rng(0)
    costs, harms = random.random((12, 3)), random.random((12, 3))
    found, exact = front(costs, harms, most=40), front(costs, harms)
    assert exact.exact
    assert not found.exact
    assert len(found) <= 40 < len(exact)
    for index in range(len(found)):
        picks = found.picks(index)
        assert sum(costs[i, k] for i, k in enumerate(picks)) == pytest.approx(found.cost[index])
        fits = exact.damage[exact.cost <= found.cost[index] + 1e-12]
        assert fits.min() <= found.damage[index] + 1e-12


@pytest.mark.parametrize("name", ["bits-ilp", "linearity-dp-bits"])
@pytest.mark.parametrize("seed", range(5))
def test_ilp_and_dp_find_the_least_sum_of_damages_under_a_size(name: str, seed: int) -> None:
    evidence, judge = evidence_of(seed, pairs=0.0)  # then the sum is the damage
    bound = 0.25 * evidence.costs.base["size"]
    search = best_plan(evidence, judge, Goal("damage", {"size": bound}), ALLOCATORS[NAMES.index(name)])
    genes = range(4) if name == "bits-ilp" else (0, 1, 2)  # two bits lie under the floor of linearity
    assert LEVELS[2] < FLOOR
    fits = [g for g in every_genome(evidence, genes) if evidence.costs.predict(g)["size"] <= bound]
    found = search.best()
    assert found is not None
    assert found.score.damage == pytest.approx(min(judge.of(g) for g in fits), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ilp_finds_the_least_latency_of_a_sum_of_damages_up_to_its_steps(seed: int) -> None:
    evidence, judge = evidence_of(seed, pairs=0.0)
    bound = 0.4 * max(judge.of(g) for g in every_genome(evidence))
    found = best_plan(evidence, judge, Goal("latency", {}, bound), ALLOCATORS[0]).best()
    assert found is not None
    latency = {g: evidence.costs.predict(g)["latency"] for g in every_genome(evidence)}
    best = min(latency[g] for g in latency if judge.of(g) <= bound)
    nearly = min(latency[g] for g in latency if judge.of(g) <= 0.8 * bound)
    assert best - 1e-9 <= found.predicted["latency"] <= nearly + 1e-9


# -- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_plans_keep_a_size_and_beat_most_others_that_do(allocator: Allocator, seed: int) -> None:
    evidence, judge = evidence_of(seed)
    bound = 0.2 * evidence.costs.base["size"]  # 6.4 bits in the mean
    found = best_plan(evidence, judge, Goal("damage", {"size": bound}), allocator).best()
    assert found is not None
    assert found.predicted["size"] <= bound
    fits = [judge.of(g) for g in every_genome(evidence) if evidence.costs.predict(g)["size"] <= bound]
    assert found.score.damage < np.median(fits)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=NAMES)
def test_plans_keep_a_damage_and_use_it(allocator: Allocator) -> None:
    evidence, judge = evidence_of(1)
    every = every_genome(evidence)
    bound = 0.2 * max(judge.of(g) for g in every)
    found = best_plan(evidence, judge, Goal("size", {}, bound), allocator).best()
    assert found is not None
    assert found.score.damage <= bound
    assert found.predicted["size"] < 0.25 * evidence.costs.base["size"]  # more than eight bits everywhere


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=NAMES)
def test_latency_and_size_bounds_hold_together(allocator: Allocator) -> None:
    evidence, judge = evidence_of(2)
    bounds = {"size": 0.26 * evidence.costs.base["size"], "latency": 0.8}
    found = best_plan(evidence, judge, Goal("damage", bounds), allocator).best()
    assert found is not None
    assert all(found.predicted[axis] <= bound for axis, bound in bounds.items())


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=NAMES)
def test_options_that_are_broken_or_another_transforms_are_never_taken(allocator: Allocator) -> None:
    evidence, judge = evidence_of(3)
    damage = [[NEVER if i == 1 or k == 2 else d for k, d in enumerate(r)] for i, r in enumerate(judge.damage)]
    evidence = replace(evidence, damage=damage)
    goal = Goal("size", {}, 1e6)
    search = best_plan(evidence, judge, goal, allocator)
    for genome in search.archive:
        assert genome[1] == 0
        assert max(genome) <= 2


def test_a_bound_nobody_can_meet_is_told() -> None:
    evidence, judge = evidence_of(0)
    for allocator in ALLOCATORS:
        seeds = BitSeeds([allocator], evidence, share=1.0)
        goal = Goal("damage", {"size": 1.0})
        search = Search(evidence.costs, evidence.damage, judge, goal, seeds=seeds, only_seeds=True)  # type: ignore[arg-type]
        search.run()
        sizes = [candidate.predicted["size"] for candidate in search.archive.values()]
        assert min(sizes) < 0.2 * evidence.costs.base["size"]  # the nearest there is, for the error
        assert seeds.report() == [
            {"rule": allocator.name, "measured": 0, "best": None, "ended": seeds.walks[0].ended}
        ]
        assert seeds.walks[0].ended == "it proposes nothing that fits the bounds"


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=NAMES)
def test_a_bound_that_is_corrected_after_the_time_is_up_still_gets_a_plan(allocator: Allocator) -> None:
    evidence, judge = evidence_of(1)
    seeds = BitSeeds([allocator], evidence, share=1.0)
    loose = Goal("damage", {"size": 0.6 * evidence.costs.base["size"]})
    search = Search(evidence.costs, evidence.damage, judge, loose, seeds=seeds, only_seeds=True, seconds=60)  # type: ignore[arg-type]
    search.run()
    (told,) = seeds.report()
    bound = told["best"]["predicted"]["size"] - 1.0  # its file was larger than predicted
    search.goal, search.start = Goal("damage", {"size": bound}), search.start - 600.0
    search.run()
    (told,) = seeds.report()
    assert told["best"] is not None
    assert told["best"]["predicted"]["size"] <= bound


def test_bisection_looks_at_a_logarithm_of_the_rungs() -> None:
    evidence, judge = evidence_of(0, count=64, pairs=0.0)
    seen: list[Genome] = []
    score = judge.score
    judge.score = lambda genome, batches=None: seen.append(genome) or score(genome)  # type: ignore[method-assign]
    ladder = Ladder(65, lambda n: tuple(3 if i < n else 0 for i in range(64)))

    def plans(evidence: BitEvidence, goal: Goal):
        yield ladder

    allocator = Allocator("one", "", plans)
    bound = judge.of(ladder[40]) * (1 + 1e-9)
    found = best_plan(evidence, judge, Goal("size", {}, bound), allocator).best()
    assert found is not None
    assert found.genome == ladder[40]
    assert len(set(seen)) <= 9


def test_where_faster_plans_measure_slower_the_best_stored_one_is_built() -> None:
    evidence, judge = evidence_of(4)
    names = ("w8a8-dynamic", "stored-w4", "stored-w8")
    space = evidence.space
    options = tuple(Option(name) for name in names)
    evidence.costs.space = replace(space, choices=tuple(replace(c, options=options) for c in space.choices))
    bound = 0.2 * evidence.costs.base["size"]
    sizes = [[s[0], s[1], s[0]] for s in evidence.costs.delta["size"]]
    evidence.costs.delta = {**evidence.costs.delta, "size": sizes}
    search = Search(evidence.costs, evidence.damage, judge, Goal("damage", {"size": bound}))  # type: ignore[arg-type]
    built: list[Genome] = []
    builder = SimpleNamespace(
        prepared=SimpleNamespace(costs=evidence.costs),
        done={},
        finish=lambda candidates, seconds: built.extend(c.genome for c in candidates) or candidates,
    )
    assert store_only(builder, search)  # type: ignore[arg-type]
    (genome,) = built
    assert 1 not in genome
    assert evidence.costs.predict(genome)["size"] <= bound
    fits = [g for g in every_genome(evidence, (0, 2, 3)) if evidence.costs.predict(g)["size"] <= bound]
    total = [search.surrogate(g) for g in fits]
    assert search.surrogate(genome) == pytest.approx(min(total), rel=1e-3)
    builder.done[genome] = None
    assert not store_only(builder, search)  # type: ignore[arg-type]


# -- what they go by ----------------------------------------------------------------------------------


def test_neighbours_that_harm_each_other_go_last() -> None:
    evidence, judge = evidence_of(0)
    evidence = replace(evidence, damage=[[1.0] * 3] * 6)
    judge.damage, judge.pair = [[1.0] * 3] * 6, np.array([0.0, 0.0, 0.0, 0.9, 0.0, 0.0])
    order = by_sensitivity(evidence, dict.fromkeys(range(6), 1))
    assert set(order[-2:]) == {3, 4}


def test_blocks_are_cut_where_entropy_is_least() -> None:
    entropy = dict(enumerate([5.0, 4.0, 1.0, 4.0, 4.0, 2.0, 4.0, 4.0]))
    assert blocks(range(8), entropy) == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert max(map(len, blocks(range(50), {}))) <= MOST_OPERATORS


def test_a_width_is_what_the_form_states_or_the_bytes_it_keeps() -> None:
    assert width_of(Option("a", {"weight_bits": 7}), 1.0) == 8
    assert width_of(Option("a", {"weight_bits": 3}), 1.0) == 3
    assert width_of(Option("a"), 0.5) == 16
    assert width_of(Option("a"), 0.14) == 4


MATMUL = """
<ir_version: 10, opset_import: ["" : 21]>
one (float[n, 64] x, float[64, 48] w) => (float[n, 48] y) {
    [product] y = MatMul (x, w)
}
"""


def quantized_space() -> Space:
    model = ir.from_onnx_text(MATMUL)
    value = model.graph.inputs.pop()
    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    value.const_value = ir.tensor(weight, name="w")
    model.graph.register_initializer(value)
    forms = ("stored-w8", "stored-w4", "float16", "w8a8-dynamic")
    return build_space(Program(model), [Quantize(forms=forms)], None, None)  # type: ignore[arg-type]


def test_noise_on_white_inputs_is_the_relative_error_of_the_weight() -> None:
    space = quantized_space()
    (choice,) = space.choices
    white = np.random.default_rng(1).normal(size=(4096, 64)).astype(np.float32)
    (found,) = option_noise(space, {"x": white}, {"x": white})
    (exact,) = option_noise(space, {"x": np.eye(64, dtype=np.float32)}, {"x": np.eye(64, dtype=np.float32)})
    named = dict(zip((o.name for o in choice.options), zip(found, exact, strict=True), strict=True))
    assert set(named) == {"stored-w8", "stored-w4", "float16", "w8a8-dynamic"}
    for name in ("stored-w8", "stored-w4", "float16"):  # with the identity the output is the weight
        assert named[name][0] == pytest.approx(named[name][1], rel=0.05)
    assert named["float16"][0] < named["stored-w8"][0] < named["stored-w4"][0]
    assert named["w8a8-dynamic"][0] > 1.2 * named["stored-w8"][0]  # activations are rounded too


def test_levels_of_a_real_operator_and_what_else_is_read_off_it() -> None:
    space = quantized_space()
    (choice,) = space.choices
    costs, damage = random_costs(space, 0)
    costs.delta["size"][:] = [[-0.74 * 12288, -0.84 * 12288, -0.5 * 12288, -0.74 * 12288]]
    widths = widths_of(costs)
    named = dict(zip((o.name for o in choice.options), widths[0], strict=True))
    assert named == {"w8a8-dynamic": 8, "stored-w8": 8, "stored-w4": 4, "float16": 16}
    evidence = BitEvidence(costs, damage, widths)
    assert evidence.levels() == (32, 16, 8, 4)
    assert mean_width(evidence, (0,)) == 32
    assert mean_width(evidence, (1 + [o.name for o in choice.options].index("stored-w4"),)) == 4
    assert weight_outliers(space)[0] == pytest.approx(0.317, abs=0.02)  # of a normal distribution
    uniform = np.linspace(0, 1, 2560, dtype=np.float32)
    assert read_entropy(space, {"x": uniform})[0] == pytest.approx(np.log(256), abs=1e-3)
