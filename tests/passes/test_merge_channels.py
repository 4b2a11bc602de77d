"""Merging hidden channels: exact for duplicates, narrower weights, one interface."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_nets import WIDTH, Net, finished, image, run, tokens
from tiny import shorten_timing, tiny_data, tiny_model

import lamina
from lamina.analysis.channels import channel_distances, collect_channels
from lamina.analysis.coupling import coupled_groups
from lamina.analysis.statistics import Statistics, collect
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.verify import check
from lamina.passes import get_transform
from lamina.passes.compensate import compensate
from lamina.passes.drop_branch import DropBranch
from lamina.passes.neurons.channel_map import ChannelMap
from lamina.passes.neurons.hidden_sites import hidden_sites
from lamina.passes.neurons.iterative_feature_merging import (
    IterativeFeatureMerging,
    feature_complexity,
    merge_features,
    merged_features,
)
from lamina.passes.neurons.merge_channels import merge_channels
from lamina.passes.neurons.merge_neurons_ot import MergeNeuronsOt, remaining, resize_neurons
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize import Quantize
from lamina.passes.shrink import shrink
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan
from lamina.planner.space import build_space
from lamina.planner.supergraph import build_supergraph

TARGET = Target.parse("ort:cpu?threads=1")
HIDDEN = 16
Act = Callable[[Net, ir.Value], ir.Value]
ACTIVATIONS: dict[str, Act] = {
    **{
        name: lambda net, x, name=name: net.op(name, x)
        for name in ("Relu", "Tanh", "Sigmoid", "Elu", "HardSwish", "Softplus", "Erf", "LeakyRelu", "Abs")
    },
    "gelu": lambda net, x: net.gelu(x),
    "silu": lambda net, x: net.op("Mul", x, net.op("Sigmoid", x)),
    "clip": lambda net, x: net.op("Clip", x, net.array(np.float32(0)), net.array(np.float32(1))),
}


def twins(array: np.ndarray, axis: int) -> np.ndarray:
    """The second half of an axis made equal to the first, in another order."""
    half = array.shape[axis] // 2
    first = np.take(array, range(half), axis)
    return np.concatenate([first, np.flip(first, axis)], axis)


def mlp(kind: str, act: Act, *, twin: bool, seed: int = 0) -> Program:
    """lin(s + body(s)) with one hidden width of 16; ``twin``: channel i is also channel 15 - i."""
    net = Net(seed)

    def made(*shape: int, axis: int = -1) -> ir.Value:
        array = net.random.standard_normal(shape).astype(np.float32)
        return net.array(twins(array, axis) if twin else array, "made")

    if kind == "conv":
        x = net.op("Conv", image(net), net.weight(4, 4, 1, 1))
        y = net.op("Conv", x, made(HIDDEN, 4, 3, 3, axis=0), made(HIDDEN), pads=[1] * 4)
        y = net.op("Conv", act(net, y), net.weight(4, HIDDEN, 3, 3), net.weight(4), pads=[1] * 4)
        return finished(net, net.op("Conv", net.op("Add", x, y), net.weight(4, 4, 1, 1)))
    x = net.linear(tokens(net), name="before")
    y = act(net, net.op("Add", net.op("MatMul", x, made(WIDTH, HIDDEN)), made(HIDDEN)))
    if kind == "gated":
        y = net.op("Mul", y, net.op("MatMul", x, made(WIDTH, HIDDEN)))
    y = net.linear(y, WIDTH, "down", width=HIDDEN)
    return finished(net, net.linear(net.op("Add", x, y), name="after"))


def data(program: Program, rows: int = 32, seed: int = 3) -> Dataset:
    shape = (rows, 4, 6, 6) if len(program.inputs[0].shape) == 4 else (rows, 5, WIDTH)
    return Dataset({"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}, {}, 8)


def difference(program: Program, changed: Program) -> float:
    """Largest difference over the largest output, on data nothing was fitted on."""
    feeds = data(program, seed=7).inputs
    (before,), (after,) = run(program, feeds), run(changed, feeds)
    return float(np.abs(before - after).max() / np.abs(before).max())


def stored(program: Program) -> int:
    """Bytes of all weights."""
    tensors = (v.const_value for v in program.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None)


def statistics_of(program: Program) -> Statistics:
    found = MergeNeuronsOt().collect(program, data(program), Statistics(0))
    assert isinstance(found, Statistics)
    return found


def option(program: Program, transform: MergeNeuronsOt | IterativeFeatureMerging) -> tuple[Site, Option]:
    (site,) = [s for s in transform.sites(program) if isinstance(s, Site)]
    (found,) = transform.options(site, program, statistics_of(program), TARGET)
    return site, found


HALF = (MergeNeuronsOt(keeps=(0.5,)), IterativeFeatureMerging(keeps=(0.5,)))


# -- exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", HALF, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["plain", "gated", "conv"])
@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_merging_duplicates_is_exact(transform, kind: str, act: str):
    program = mlp(kind, ACTIVATIONS[act], twin=True)
    site, half = option(program, transform)
    merged = apply_moves(program, [Move(site, half)])
    assert difference(program, merged) < 1e-5
    assert hidden_sites(merged)[0][0].groups[0].units == HIDDEN // 2


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, HIDDEN - 2), st.sampled_from(["plain", "conv"]))
def test_one_duplicate_among_many_goes_first(seed: int, place: int, kind: str):
    program = mlp(kind, ACTIVATIONS["Tanh"], twin=False, seed=seed)
    (site,), _ = hidden_sites(program)
    weights = program.graph.initializers
    for (node, at), array in site.arrays(program).items():
        operand = next(o for o in site.groups[0].operands if (o.node, o.place) == (node, at))
        if operand.side == "made":
            same = np.moveaxis(array.copy(), operand.axis, 0)
            same[place + 1] = same[place]
            name = next(n for n in program.graph if n.name == site.nodes[node]).inputs[at].name
            weights[name].const_value = ir.Tensor(np.ascontiguousarray(np.moveaxis(same, 0, operand.axis)))
    keep = (HIDDEN - 1) / HIDDEN
    one = MergeNeuronsOt(align=1)
    assert difference(program, resize_neurons(program, data(program), keep, how=one)) < 1e-5
    labels = merged_features(site.groups[0].vectors(site.arrays(program), "made"), width=HIDDEN - 1)
    merged = merge_channels(program, {site.name: [ChannelMap.grouped(labels)]})
    assert difference(program, merged) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "gated", "conv"])
def test_the_whole_width_is_the_identity(kind: str):
    program = mlp(kind, ACTIVATIONS["gelu"], twin=False)
    feeds = data(program).inputs
    for same in (resize_neurons(program, data(program), 1.0), merge_features(program, keep=1.0)):
        np.testing.assert_array_equal(run(program, feeds)[0], run(same, feeds)[0])


def test_a_map_that_keeps_some_is_what_shrink_does():
    program = mlp("gated", ACTIVATIONS["silu"], twin=False)
    (site,), _ = hidden_sites(program)
    gone = [0, 3, 9]
    labels = np.full(HIDDEN, -1)
    labels[[i for i in range(HIDDEN) if i not in gone]] = np.arange(HIDDEN - 3)
    merged = merge_channels(program, {site.name: [ChannelMap.grouped(labels)]})
    cut = shrink(program, coupled_groups(program), {site.groups[0].name: gone})
    feeds = data(program).inputs
    np.testing.assert_allclose(run(merged, feeds)[0], run(cut, feeds)[0], rtol=1e-5, atol=1e-6)
    assert difference(program, merged) > 1e-3


# -- shape and interface ----------------------------------------------------------------------------


@pytest.mark.parametrize("transform", HALF, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["plain", "gated", "conv"])
def test_weights_get_smaller_and_the_interface_stays(transform, kind: str):
    program = mlp(kind, ACTIVATIONS["gelu"], twin=False)
    site, half = option(program, transform)
    merged = apply_moves(program, [Move(site, half)])
    check(merged)
    assert (merged.inputs, merged.outputs) == (program.inputs, program.outputs)
    assert stored(merged) < stored(program)
    before, after = ({n.name for n in p.graph} for p in (program, merged))
    assert after == before
    (old,), (new,) = hidden_sites(program)[0], hidden_sites(merged)[0]
    assert new.wiring == old.wiring
    assert [a.size for a in new.arrays(merged).values()] == [
        a.size // 2 for a in old.arrays(program).values()
    ]
    assert half.parameters["flops_share"] == 0.5
    assert difference(program, merged) > 1e-4


def test_several_widths_of_one_site_shrink_together():
    net = Net()
    x = net.linear(tokens(net), name="before")
    y = net.op("Relu", net.linear(x, 12, "a"))
    y = net.linear(net.op("Relu", net.linear(y, 16, "b", width=12)), WIDTH, "c", width=16)
    program = finished(net, net.linear(net.op("Add", x, y), name="after"))
    merged = merge_features(program, keep=0.5)
    (site,), _ = hidden_sites(merged)
    assert [g.units for g in site.groups] == [8, 8]  # multiples of 4, ties to even
    assert merged.graph.initializers[site.weights[2]].shape == [8, 8]
    check(merged)


def test_unknown_sites_and_wrong_maps_are_named():
    program = mlp("plain", ACTIVATIONS["Relu"], twin=False)
    with pytest.raises(PassError, match="no hidden channels of 'nowhere' can be merged"):
        merge_features(program, keep=0.5, sites=["nowhere"])
    (site,), _ = hidden_sites(program)
    with pytest.raises(PassError, match="has 16 channels, its map 8"):
        merge_channels(program, {site.name: [ChannelMap.grouped(np.arange(8))]})


@pytest.mark.parametrize("wrong", [{"keeps": ()}, {"keeps": (1.5,)}, {"align": 0}])
def test_wrong_options(wrong):
    with pytest.raises(PassError):
        IterativeFeatureMerging(**wrong)
    with pytest.raises(PassError):
        MergeNeuronsOt(**wrong)


def test_wrong_numbers_of_the_functions():
    program = mlp("plain", ACTIVATIONS["Relu"], twin=False)
    with pytest.raises(PassError, match="nothing says when merging ends"):
        merge_features(program)
    with pytest.raises(PassError, match="no share of a width"):
        resize_neurons(program, data(program), 1.5)
    for wrong in ({"entropy": 0.0}, {"balance": -1.0}, {"most": 0}):
        with pytest.raises(PassError):
            MergeNeuronsOt(**wrong)
    with pytest.raises(PassError):
        IterativeFeatureMerging(eps=-1.0)


# -- what is merged ---------------------------------------------------------------------------------


def slow_features(vectors: np.ndarray, width: int) -> list[set[int]]:
    """Closest pair first, by looking at all of them."""
    groups = [{i} for i in range(len(vectors))]
    while len(groups) > width:
        means = [vectors[sorted(g)].mean(axis=0) for g in groups]
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = min(pairs, key=lambda p: float(np.linalg.norm(means[p[0]] - means[p[1]])))
        groups[j] |= groups.pop(i)
    return groups


@pytest.mark.parametrize("width", [1, 3, 8, 11])
def test_features_merge_the_closest_pair_first(width: int):
    vectors = np.random.default_rng(width).standard_normal((12, 5))
    labels = merged_features(vectors, width=width)
    found = {frozenset(np.flatnonzero(labels == k).tolist()) for k in range(labels.max() + 1)}
    assert found == {frozenset(g) for g in slow_features(vectors, width)}
    assert labels[0] == 0


def test_eps_ends_merging_and_measures_complexity():
    program = mlp("plain", ACTIVATIONS["Relu"], twin=True)
    (found,) = feature_complexity(program, 1e-6).values()
    assert found == 0.5
    assert difference(program, merge_features(program, eps=1e-6)) < 1e-5
    site, _ = option(program, HALF[1])
    strict = IterativeFeatureMerging(keeps=(0.75, 0.5, 0.25), eps=1e-6)
    names = [o.name for o in strict.options(site, program, Statistics(0), TARGET)]
    assert names == ["keep-75", "keep-50"]
    distinct = mlp("plain", ACTIVATIONS["Relu"], twin=False)
    assert list(feature_complexity(distinct, 1e-6).values()) == [1.0]


def test_elimination_takes_the_best_replaced_each_time():
    random = np.random.default_rng(1)
    points, weights = random.standard_normal((15, 3)), random.uniform(0.1, 2, 15)
    distances = ((points[:, None] - points) ** 2).sum(axis=-1)
    alive = list(range(15))
    while len(alive) > 6:
        cost = [weights[i] * min(distances[i, j] for j in alive if j != i) for i in alive]
        alive.pop(int(np.argmin(cost)))
    assert remaining(distances, weights, 6).tolist() == alive


def test_moments_give_distances_of_activations():
    program = mlp("plain", ACTIVATIONS["Tanh"], twin=True)
    (site,), _ = hidden_sites(program)
    group = site.groups[0]
    moments = collect_channels(program, data(program), {group.value: group.axis})[group.value]
    distances = channel_distances(moments)
    assert moments.count == 32 * 5
    assert np.allclose(distances[np.arange(HIDDEN), np.arange(HIDDEN)[::-1]], 0, atol=1e-9)
    tapped = program.clone()
    value = next(v for n in tapped.graph for v in n.outputs if v.name == group.value)
    tapped.graph.outputs.append(value)
    h = run(tapped, data(program).inputs)[1].reshape(-1, HIDDEN).astype(np.float64)
    np.testing.assert_allclose(distances[0, 1], ((h[:, 0] - h[:, 1]) ** 2).mean(), rtol=1e-4)


def test_a_truncated_plan_keeps_every_merged_channel_alive():
    plan = np.array([[0.4, 0.3, 0.2], [0.5, 0.1, 0.3], [0.6, 0.2, 0.1]])
    found = ChannelMap.of(plan, 1, np.array([0, 1, 2]))
    assert found.targets[:, 0].tolist() == [0, 1, 2]
    assert (found.plan.sum(axis=0) > 0).all()


def test_maps_survive_json():
    found = ChannelMap.of(np.random.default_rng(0).uniform(size=(6, 4)), 2)
    again = ChannelMap.read(json.loads(json.dumps(found.parameters())))
    np.testing.assert_array_equal(found.plan, again.plan)


# -- with the planner -------------------------------------------------------------------------------


def two_blocks() -> Program:
    net = Net()
    x = net.linear(tokens(net), name="before")
    for name in ("one", "two"):
        x = net.op("Add", x, net.mlp(net.norm(x, f"{name}.norm"), name))
    return finished(net, net.linear(x, name="after"))


def test_without_moments_transport_offers_nothing():
    program = two_blocks()
    for site in MergeNeuronsOt().sites(program):
        if isinstance(site, Site):
            assert MergeNeuronsOt().options(site, program, Statistics(0), TARGET) == ()
    few = data(program).rows(slice(0, 1))
    assert MergeNeuronsOt().collect(program, few, Statistics(0)).channels == {}


def test_the_supergraph_computes_what_the_plan_does():
    program = two_blocks()
    transforms = [DropBranch(), *(get_transform(t.name) for t in HALF), Quantize(forms=("stored-w8",))]
    space = build_space(program, transforms, statistics_of(program), TARGET)
    merges = [i for i, c in enumerate(space.choices) if c.transform.name in {t.name for t in HALF}]
    inner = [i for i, c in enumerate(space.choices) if c.transform.name == "quantize"]
    assert len(merges) == 4
    assert all(space.choices[i].parent is not None for i in merges)
    assert all(c.site.kind == "mlp" for i, c in enumerate(space.choices) if i in merges)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    feeds = {"x": data(program).inputs["x"][:2]}
    random = np.random.default_rng(0)
    singles = [
        tuple(k if j == i else 0 for j in range(len(space.choices)))
        for i in merges
        for k in range(1, len(space.choices[i].options) + 1)
    ]
    mixed = [
        space.canonical([int(random.integers(0, len(c.options) + 1)) for c in space.choices])
        for _ in range(12)
    ]
    for genome in [*singles, *mixed]:
        finished = apply_moves(program, space.moves(genome))
        (got,) = supergraph.run(genome, feeds).values()
        np.testing.assert_allclose(got, run(finished, feeds)[0], rtol=1e-4, atol=1e-5)
    everything = space.canonical([1] * len(space.choices))
    assert sum(everything[i] for i in inner) < len(inner)


def test_in_one_search_a_merged_operator_is_not_quantized_as_well():
    program = two_blocks()
    space = build_space(program, [HALF[1], Quantize(forms=("stored-w8",))], Statistics(0), TARGET)
    merges = [i for i, c in enumerate(space.choices) if c.transform.name == HALF[1].name]
    genome = space.canonical([1] * len(space.choices))
    held = [space.choices[i].parent in merges for i in range(len(genome))]
    assert sum(held) == 4
    assert all(gene == (0 if inside else 1) for gene, inside in zip(genome, held, strict=True))


@pytest.mark.parametrize("form", ["stored-w8", "w8a8-dynamic", "w8a8-static"])
def test_a_plan_may_quantize_what_it_merged(form: str):
    program = two_blocks()
    quantize = Quantize(forms=(form,))
    merge = [
        Move(s, HALF[1].options(s, program, Statistics(0), TARGET)[0])
        for s in HALF[1].sites(program)
        if isinstance(s, Site)
    ]
    sites = [s for s in quantize.sites(program) if isinstance(s, Site)]
    seen = collect(program, data(program), ranges=sorted({v for s in sites for v in (*s.inputs, *s.outputs)}))
    low = [Move(s, o) for s in sites for o in quantize.options(s, program, seen, None)]
    assert len(low) == 6
    merged = apply_moves(program, merge)
    both = apply_moves(program, [*merge, *low])
    first = next(v for v in both.graph.initializers.values() if v.dtype == ir.DataType.INT8)
    assert {v.shape[-1] for v in both.graph.initializers.values() if v.dtype == ir.DataType.INT8} == {8}
    assert first.shape is not None
    feeds = data(program).inputs
    want, got = run(merged, feeds)[0], run(both, feeds)[0]
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_a_plan_with_merges_survives_json():
    program = two_blocks()
    moves = []
    for transform, site_number in zip(HALF, (0, 1), strict=True):
        site = [s for s in transform.sites(program) if isinstance(s, Site)][site_number]
        moves.append(Move(site, transform.options(site, program, statistics_of(program), TARGET)[0]))
    plan = Plan(program.fingerprint, moves=tuple(moves))
    again = Plan.from_json(plan.to_json())
    feeds = data(program).inputs
    first, second = apply_moves(program, plan.moves), apply_moves(program, again.moves)
    np.testing.assert_array_equal(run(first, feeds)[0], run(second, feeds)[0])
    assert {m.site.transform for m in again.moves} == {t.name for t in HALF}


def test_compensation_refits_what_reads_merged_channels():
    program = mlp("plain", ACTIVATIONS["gelu"], twin=False)
    merged = resize_neurons(program, data(program, 128), 0.5)
    made = compensate(program, merged, data(program, 128), threads=1)
    assert any("down" in v.name for r in made.repairs for v in _inputs(program, r.node))
    assert difference(program, made.program) < 0.7 * difference(program, merged)


def _inputs(program: Program, node: str) -> list[ir.Value]:
    return [v for n in program.graph if n.name == node for v in n.inputs if v is not None]


@pytest.mark.parametrize("name", [t.name for t in HALF])
def test_a_whole_optimization_merges_and_reproduces(name: str, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    shorten_timing(monkeypatch)
    model = tiny_model()
    result = lamina.optimize(
        model, "size<=0.8x", data=tiny_data(), transforms=[name], target=str(TARGET), seconds=4, batch_size=16
    )
    assert {m.site.transform for m in result.plan.moves} == {name}
    measured, original = result.evidence["measured"], result.evidence["original"]
    assert measured["size"] <= 0.8 * original["size_bytes"]
    assert result.evidence["predicted"]["size"] == pytest.approx(measured["size"], rel=0.05)
    again = lamina.apply(model, result.plan)
    feeds = {"x": tiny_data()["x"][:4]}
    np.testing.assert_array_equal(run(again, feeds)[0], run(result.program, feeds)[0])
