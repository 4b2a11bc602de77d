"""Plans that share: run, priced, solved for and reproduced with drops and quantized weights around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from drop_nets import decoder, samples
from stacked_model import WIDTH, stacked
from tiny import shorten_timing

import lamina
from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.budget import Budget
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes import default_transforms, transform_names
from lamina.passes.drop_branch import DropBranch
from lamina.passes.pass_ import Site, Transform
from lamina.passes.quantize import Quantize
from lamina.passes.sharing.share import Share, apply_shares
from lamina.planner.apply import apply_moves
from lamina.planner.costs import Costs
from lamina.planner.knapsack import solve
from lamina.planner.plan import Move, Plan
from lamina.planner.prepare import useful_transforms
from lamina.planner.pricing import shared_costs
from lamina.planner.space import Genome, Space, build_space
from lamina.planner.supergraph import build_supergraph

TARGET = Target.parse("ort:cpu?threads=1")
STORED = Quantize(forms=("stored-w8", "stored-w4", "float16"))  # whose arithmetic stays float32


@pytest.fixture(scope="module", autouse=True)
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "lamina-cache"))
        shorten_timing(patch)
        yield


def _space(program: Program, *transforms: Transform) -> Space:
    return build_space(program, transforms or (DropBranch(), Share(), STORED), Statistics(0), TARGET)


def _genome(space: Space, **wanted: str) -> Genome:
    """The genome that takes options by ``transform__site = option``, dots as underscores."""
    genes = []
    for choice in space.choices:
        key = f"{choice.transform.name}__{choice.site.name}".replace(".", "_")
        names = [o.name for o in choice.options]
        genes.append(names.index(wanted.pop(key)) + 1 if key in wanted else 0)
    assert not wanted, f"not offered: {wanted}"
    return tuple(genes)


def _feeds(program: Program) -> dict[str, np.ndarray]:
    if len(program.inputs) > 1:
        return samples(program, 2)
    width = program.inputs[0].shape[-1]
    return {"x": np.random.default_rng(4).normal(size=(2, 4, int(width or 1))).astype(np.float32)}


def _run(program: Program, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    ports = {p.name for p in program.inputs}
    made = (
        get_backend(TARGET).compile(program.model, TARGET).run({k: v for k, v in feeds.items() if k in ports})
    )
    return [made[p.name] for p in program.outputs]


def _moved(program: Program, *moves: tuple[Transform, str, str]) -> Program:
    """Moves given as transform, site and option applied."""
    found = []
    for transform, where, name in moves:
        site = next(s for s in transform.sites(program) if isinstance(s, Site) and s.name == where)
        options = transform.options(site, program, Statistics(0), TARGET)
        found.append(Move(site, next(o for o in options if o.name == name)))
    return apply_moves(program, found)


def _written(program: Program, numbers: dict[str, str]) -> Program:
    """A program with the numbers of some weights written over those of others."""
    clone = program.clone()
    for own, other in numbers.items():
        array = program.graph.initializers[other].const_value.numpy()
        clone.graph.initializers[own].const_value = ir.Tensor(array, name=own)
    return clone


@pytest.mark.parametrize("build", [lambda: stacked(3), decoder])
def test_every_candidate_of_the_supergraph_equals_the_applied_program(build: Any) -> None:
    program = build()
    space = _space(program)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    feeds = _feeds(program)
    random = np.random.default_rng(0)
    seen = 0
    for _ in range(12):
        genes = [int(random.integers(0, len(c.options) + 1)) for c in space.choices]
        genome = space.canonical([g if c.transform.name != "drop" or random.random() < 0.3 else 0
                                  for g, c in zip(genes, space.choices, strict=True)])  # fmt: skip
        seen += any(g and c.transform.name == "share" for g, c in zip(genome, space.choices, strict=True))
        applied = apply_moves(program, space.moves(genome))
        made = supergraph.run(genome, feeds)
        for port, expected in zip(applied.outputs, _run(applied, feeds), strict=True):
            np.testing.assert_allclose(made[port.name], expected, rtol=1e-4, atol=1e-5)
    assert seen > 6


def test_what_is_nested_in_a_branch_that_shares_has_no_effect() -> None:
    space = _space(stacked(3))
    genome = tuple(int(c.transform.name != "drop") for c in space.choices)
    taken = {c.transform.name for c, g in zip(space.choices, space.canonical(genome), strict=True) if g}
    assert taken == {"share"}


@pytest.mark.parametrize("first", ["donor", "borrower"])
def test_a_dropped_donor_still_lends_its_weights(first: str) -> None:
    program = stacked(3)
    names = [s.name for s in DropBranch().sites(program) if isinstance(s, Site)]
    moves = [(DropBranch(), names[1], "drop"), (Share(), names[0], "reuse-next")]
    moved = _moved(program, *(moves if first == "donor" else moves[::-1]))
    expected = _moved(_written(program, {"wa0": "wa1", "wb0": "wb1"}), (DropBranch(), names[1], "drop"))
    feeds = _feeds(program)
    np.testing.assert_array_equal(_run(moved, feeds)[0], _run(expected, feeds)[0])
    assert set(moved.graph.initializers) == {"wa1", "wb1", "wa2", "wb2"}


def test_a_quantized_donor_lends_its_weights_as_given() -> None:
    program = stacked(3)
    names = [s.name for s in DropBranch().sites(program) if isinstance(s, Site)]
    moved = _moved(program, (Share(), names[0], "reuse-next"), (Quantize(), "up1", "w8"))
    expected = _moved(_written(program, {"wa0": "wa1", "wb0": "wb1"}), (Quantize(), "up1", "w8"))
    feeds = _feeds(program)
    np.testing.assert_allclose(_run(moved, feeds)[0], _run(expected, feeds)[0], rtol=1e-6, atol=1e-6)
    assert "wa1" in moved.graph.initializers


def test_operators_of_a_branch_that_shares_can_be_quantized_afterwards() -> None:
    program = stacked(3)
    names = [s.name for s in DropBranch().sites(program) if isinstance(s, Site)]
    both = ((Quantize(), "up0", "w8"), (Quantize(), "up1", "w8"))
    moved = _moved(program, (Share(), names[0], "reuse-next"), *both)
    expected = _moved(_written(program, {"wa0": "wa1", "wb0": "wb1"}), *both)
    feeds = _feeds(program)
    np.testing.assert_allclose(_run(moved, feeds)[0], _run(expected, feeds)[0], rtol=1e-6, atol=1e-6)
    assert "wa1" not in moved.graph.initializers
    # one set of codes for both
    assert serialized_size(moved.model) < serialized_size(expected.model) - WIDTH * WIDTH


def test_caches_stay_and_nothing_copies_them() -> None:
    program = decoder()
    first, second, *_ = (s for s in Share().sites(program) if isinstance(s, Site) and s.kind == "attention")
    shared = apply_shares(program, {second.name: first.name})
    assert [p.name for p in shared.inputs] == [p.name for p in program.inputs]
    assert [p.name for p in shared.outputs] == [p.name for p in program.outputs]
    assert {n.name for n in shared.graph} == {n.name for n in program.graph}
    expected = _run(
        _written(program, dict(zip(second.weights, first.weights, strict=True))), samples(program)
    )
    for made, known in zip(_run(shared, samples(program)), expected, strict=True):
        np.testing.assert_array_equal(made, known)


# -- prices -------------------------------------------------------------------------------------------


def _costs(space: Space) -> Costs:
    base = {"latency": 1.0, "size": float(serialized_size(space.program.model)), "flops": 1.0}
    return shared_costs(space, base, {n.name: 1.0 for n in space.program.graph})


def test_size_is_priced_with_what_is_really_stored() -> None:
    program = stacked(4, width=32)
    space = _space(program)
    costs = _costs(space)
    random = np.random.default_rng(1)
    genomes = [
        [int(random.integers(0, len(c.options) + 1)) * int(random.random() < 0.4) for c in space.choices]
        for _ in range(25)
    ]
    lent = 0
    for genome in map(space.canonical, genomes):
        real = serialized_size(apply_moves(program, space.moves(genome)).model) - costs.base["size"]
        predicted = costs.predict(genome)["size"] - costs.base["size"]
        assert abs(real - predicted) < 3000  # names, scales' shapes; a matrix is 4,096
        lent += costs.lent(genome) > 0
    assert lent > 5


def test_restricted_costs_keep_what_is_lent() -> None:
    space = _space(stacked(3))
    costs = _costs(space)
    kept = costs.restrict({"size"})
    for transform in ("drop", "share"):
        index = [i for i, c in enumerate(kept.space.choices) if c.transform.name == transform]
        assert any(i in index for n in kept.loans for i, _ in (*n.owners, *n.borrowers))
    before = {
        (c.site, o.name): (i, k) for i, c in enumerate(space.choices) for k, o in enumerate(c.options, 1)
    }
    random = np.random.default_rng(2)
    for _ in range(30):
        genome = kept.space.canonical(
            [int(random.integers(0, len(c.options) + 1)) for c in kept.space.choices]
        )
        full = list(space.nothing)
        for choice, gene in zip(kept.space.choices, genome, strict=True):
            if gene:
                i, k = before[choice.site, choice.options[gene - 1].name]
                full[i] = k
        assert kept.predict(genome)["size"] == costs.predict(tuple(full))["size"]


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_knows_what_is_lent(seed: int) -> None:
    space = _space(stacked(3), DropBranch(), Share((1 / 4,)))
    costs = _costs(space)
    assert costs.loans
    random = np.random.default_rng(seed)
    damage = [[float(v) for v in random.random(len(c.options))] for c in space.choices]
    everything = {
        space.canonical(g) for g in itertools.product(*[range(len(c.options) + 1) for c in space.choices])
    }

    def harm(genome: Genome) -> float:
        return sum(damage[i][g - 1] for i, g in enumerate(genome) if g)

    for share in (0.2, 0.5, 0.9):
        bound = share * costs.base["size"]
        fits = [g for g in everything if costs.predict(g)["size"] <= bound]
        found = solve(costs, damage, minimize="damage", bounds={"size": bound})
        if not fits:
            assert found is None
            continue
        assert found is not None
        assert costs.predict(found)["size"] <= bound
        assert harm(found) == pytest.approx(min(map(harm, fits)), rel=1e-3)
    least = solve(costs, damage, minimize="size", allowed_damage=1.0)
    assert least is not None
    best = min(costs.predict(g)["size"] for g in everything if harm(g) <= 1.0)
    assert costs.predict(least)["size"] == pytest.approx(best, rel=1e-3)


# -- whole runs ---------------------------------------------------------------------------------------


def _alike(depth: int) -> Program:
    """Residual MLPs of which every second one is nearly the one before: a rank-1 difference."""
    program = stacked(depth)
    random = np.random.default_rng(0)
    for layer in range(1, depth, 2):
        for part in "ab":
            value = program.graph.initializers[f"w{part}{layer}"]
            near = program.graph.initializers[f"w{part}{layer - 1}"].const_value.numpy()
            change = 0.02 * random.normal(size=(WIDTH, 1)) * random.normal(size=WIDTH)
            value.const_value = ir.Tensor((near + change).astype(np.float32), name=value.name)
    return program


def _optimize(budget: str, **options: Any) -> lamina.Result:
    x = np.random.default_rng(1).normal(size=(240, 6, WIDTH)).astype(np.float32)
    return lamina.optimize(
        _alike(6).model,
        budget,
        data={"x": x},
        target="ort:cpu?threads=1",
        workload="1x6",
        seconds=4,
        seed=0,
        **options,
    )


def test_a_plan_that_shares_is_found_and_reproduced() -> None:
    result = _optimize("size<=0.7x", transforms=["drop", "share"])
    names = {(m.site.transform, m.option.name.partition("-")[0]) for m in result.plan.moves}
    assert ("share", "remainder") in names
    assert result.evidence["size_ratio"] <= 0.7
    again = lamina.apply(_alike(6).model, Plan.from_json(result.plan.to_json()))
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == ir.to_proto(
        result.program.model
    ).SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("budget", "minimize", "looks"),
    [
        ("latency<=0.5x", "damage", False),
        ("drop<=1%", "latency", False),
        ("size<=0.5x", "damage", True),
        ("drop<=1%", "size", True),
    ],
)
def test_sharing_is_looked_at_only_where_size_counts(budget: str, minimize: str, looks: bool) -> None:
    class Asked:
        transforms = ("drop", "share", "quantize")

    asked: Any = Asked()
    asked.budget, asked.minimize = Budget.parse(budget), minimize
    assert ("share" in {t.name for t in useful_transforms(asked)}) is looks


def test_sharing_is_used_only_when_it_is_named() -> None:
    assert "share" in transform_names()
    assert "share" in set(transform_names()) - set(default_transforms())
