"""Merging a chain of convolutions is exact where its activations are linear on the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import needs_reference, zoo_dir
from residual_nets import Net, run
from tiny import shorten_timing

import lamina
from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.errors import PassError
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.verify import check, verify_structure
from lamina.passes.conv_chains import conv_chains
from lamina.passes.drop_branch import DropBranch
from lamina.passes.merge_conv_chain import MergeConvChain, partitions
from lamina.passes.pass_ import Option, Refusal, Site
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.planner.space import build_space
from lamina.planner.supergraph import build_supergraph

ALL = MergeConvChain(longest=4, growth=1e9)


def conv(net: Net, x, inputs: int, outputs: int, kernel: Sequence[int], *, bias: bool = True, **attributes):
    """Positive weights: on positive inputs a Relu behind it changes nothing."""
    group = attributes.get("group", 1)
    shape = (outputs, inputs // group, *kernel)
    weight = net.array(np.abs(net.random.standard_normal(shape)).astype(np.float32), "weight")
    offset = [net.array(np.abs(net.random.standard_normal(outputs)).astype(np.float32), "bias")]
    return net.op("Conv", x, weight, *(offset if bias else []), **attributes)


def batch_norm(net: Net, x, width: int):
    rows = [np.abs(net.random.standard_normal(width)).astype(np.float32) + 0.1 for _ in range(4)]
    rows[2] = -rows[2]  # a negative mean keeps what comes out positive
    return net.op("BatchNormalization", x, *(net.array(r) for r in rows))


def sites(program: Program, transform: MergeConvChain = ALL) -> list[Site]:
    return [s for s in transform.sites(program) if isinstance(s, Site)]


def refusals(program: Program, transform: MergeConvChain) -> list[str]:
    return [s.reason for s in transform.sites(program) if isinstance(s, Refusal)]


def options(program: Program, transform: MergeConvChain = ALL) -> list[tuple[Site, Option]]:
    return [(s, o) for s in sites(program, transform) for o in transform.options(s, program, None, None)]


def positive(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def assert_equal(program: Program, site: Site, option: Option, x: np.ndarray) -> Program:
    merged = apply_moves(program, [Move(site, option)])
    verify_structure(merged, "merge")
    check(merged)
    got, want = run(merged, {"x": x})[0], run(program, {"x": x})[0]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    return merged


@st.composite
def chains(draw):
    """Two to four convolutions; whatever pads comes first, or stands behind a pointwise one without bias."""
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    net = Net(draw(st.integers(0, 2**31)))
    least = 16 if rank == 3 else 32  # the kernel of the whole chain may reach over 30 positions
    x = net.input("x", ["batch", 12, *(draw(st.integers(least, least + 4)) for _ in range(rank))])
    value, width = x, 12
    count = draw(st.integers(2, 4 if rank < 3 else 2))
    for index in range(count):
        group = draw(st.sampled_from([1, 2, 3, width]))
        out = draw(st.sampled_from([6, 12])) if group < 12 else 12
        if width == 6 and group in (12, 6):
            out = 6
        kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
        pads = [draw(st.integers(0, 2)) if index == 0 else 0 for _ in range(2 * rank)]
        strides = [draw(st.integers(1, 2)) if index < 2 else 1 for _ in range(rank)]
        dilations = [draw(st.integers(1, 2)) if index < 2 else 1 for _ in range(rank)]
        attributes = {"pads": pads, "strides": strides, "dilations": dilations, "group": group}
        value = conv(net, value, width, out, kernel, bias=draw(st.booleans()), **attributes)
        width = out
        if draw(st.booleans()):
            value = batch_norm(net, value, width)
        if index < count - 1 and draw(st.booleans()):
            value = net.op("Relu", value)
        if index < count - 1 and draw(st.integers(0, 3)) == 0:
            value = batch_norm(net, value, width)
    return net.program(value)


@settings(deadline=None, max_examples=60)
@given(chains(), st.data())
def test_exact_where_activations_are_linear(program, data):
    found = options(program)
    assert found
    site, option = data.draw(st.sampled_from(found))
    assert not option.parameters["edges"]
    x = positive([2, *program.inputs[0].shape[1:]])
    merged = assert_equal(program, site, option, x)
    kinds = [n.op_type for n in merged.graph]
    assert kinds.count("Conv") < [n.op_type for n in program.graph].count("Conv")


def bottleneck(*, bias: bool, seed: int = 0) -> Program:
    """MobileNetV2's block: expand, depthwise with padding and stride, project."""
    net = Net(seed)
    x = net.input("x", ["batch", 8, 10, 10])
    value = net.op("Relu", conv(net, x, 8, 48, (1, 1), bias=bias))
    value = conv(net, value, 48, 48, (3, 3), pads=[1, 1, 1, 1], strides=[2, 2], group=48)
    value = net.op("Clip", value, net.array(np.float32(0)), net.array(np.float32(1e9)))
    return net.program(conv(net, value, 48, 8, (1, 1)))


def test_every_way_to_merge_an_inverted_bottleneck():
    program = bottleneck(bias=False)
    found = options(program)
    assert [o.name for _, o in found] == ["merge 0-2", "merge 0,1-2", "merge 0-1,2"]
    for site, option in found:
        assert not option.parameters["edges"]
        merged = assert_equal(program, site, option, positive([2, 8, 10, 10]))
        left = [n for n in merged.graph if n.op_type == "Conv"]
        assert len(left) == (1 if option.name == "merge 0-2" else 2)
        assert "Relu" in [n.op_type for n in merged.graph] or option.name != "merge 0,1-2"
    whole = apply_moves(program, [Move(*found[0])])
    assert [tuple(v.shape) for v in whole.graph.initializers.values()] == [(8, 8, 3, 3), (8,)]


def test_multiply_adds_are_told_and_bound_what_is_offered():
    program = bottleneck(bias=False)
    share = {o.name: o.parameters["flops_share"] for _, o in options(program)}
    before = 8 * 48 * 4 + 48 * 9 + 48 * 8
    assert share["merge 0-2"] == pytest.approx(8 * 8 * 9 / before)
    assert share["merge 0-1,2"] == pytest.approx((48 * 8 * 9 + 48 * 8) / before)
    few = MergeConvChain(growth=0.5)
    assert [o.name for _, o in options(program, few)] == ["merge 0-2"]
    assert "times the multiply-adds" in refusals(program, MergeConvChain(growth=0.01))[0]


def test_a_bias_before_padding_changes_borders_and_says_so():
    program = bottleneck(bias=True)
    edges = {o.name: o.parameters["edges"] for _, o in options(program)}
    assert edges == {"merge 0-2": True, "merge 0,1-2": False, "merge 0-1,2": True}
    exact = MergeConvChain(growth=1e9, edges=False)
    assert [o.name for _, o in options(program, exact)] == ["merge 0,1-2"]
    site, option = options(program)[0]
    x = positive([1, 8, 10, 10])
    got = run(apply_moves(program, [Move(site, option)]), {"x": x})[0]
    want = run(program, {"x": x})[0]
    np.testing.assert_allclose(got[..., 1:, 1:], want[..., 1:, 1:], rtol=1e-5)
    assert np.abs(got - want).max() > 1e-2


def test_two_padded_kernels_are_refused_where_borders_must_stay():
    net = Net()
    x = net.input("x", ["batch", 4, 8, 8])
    inner = net.op("Relu", conv(net, x, 4, 4, (3, 3), pads=[1] * 4))
    program = net.program(conv(net, inner, 4, 4, (3, 3), pads=[1] * 4))
    strict = MergeConvChain(growth=1e9, edges=False)
    assert refusals(program, strict) == [
        "the merged kernels differ at the borders, where the second convolution pads"
    ]
    ((site, option),) = options(program)
    x = positive([1, 4, 8, 8])
    got = run(apply_moves(program, [Move(site, option)]), {"x": x})[0]
    np.testing.assert_allclose(got[..., 1:-1, 1:-1], run(program, {"x": x})[0][..., 1:-1, 1:-1], rtol=1e-5)


@pytest.mark.parametrize("way", ["read twice", "an output", "not an activation", "weight from outside"])
def test_what_is_no_chain(way):
    net = Net()
    x = net.input("x", ["batch", 4, 8, 8])
    first = net.op("Sigmoid" if way == "not an activation" else "Relu", conv(net, x, 4, 4, (1, 1)))
    weight = net.input("w", [4, 4, 1, 1]) if way == "weight from outside" else net.weight(4, 4, 1, 1)
    second = net.op("Conv", first, weight)
    outputs = [net.op("Add", second, first)] if way == "read twice" else [second]
    program = net.program(*outputs, *([first] if way == "an output" else []))
    assert sites(program) == []
    assert conv_chains(program)[0] == []
    assert refusals(program, ALL) == (["its weight is no constant"] if way == "weight from outside" else [])


def test_same_padding_with_and_without_a_stride():
    net = Net()
    x = net.input("x", ["batch", 4, 9, 9])
    first = net.op("Relu", conv(net, x, 4, 4, (2, 3), auto_pad="SAME_LOWER"))
    program = net.program(conv(net, first, 4, 4, (2, 2), auto_pad="VALID"))
    ((site, option),) = options(program)
    assert_equal(program, site, option, positive([1, 4, 9, 9]))
    net = Net()
    x = net.input("x", ["batch", 4, 9, 9])
    first = net.op("Relu", conv(net, x, 4, 4, (1, 1)))
    program = net.program(conv(net, first, 4, 4, (3, 3), auto_pad="SAME_UPPER", strides=[2, 2]))
    assert refusals(program, ALL) == ["auto_pad SAME_UPPER with a stride depends on the input's size"]


def test_a_shared_weight_stays_for_the_others():
    net = Net()
    x = net.input("x", ["batch", 4, 6, 6])
    shared = net.array(positive([4, 4, 1, 1]), "shared")
    a = net.op("Conv", net.op("Relu", net.op("Conv", x, shared)), shared)
    b = net.op("Conv", net.op("Sigmoid", x), shared)
    program = net.program(net.op("Add", a, b))
    ((site, option),) = options(program)
    merged = assert_equal(program, site, option, positive([1, 4, 6, 6]))
    assert "shared" in merged.graph.initializers


def test_long_runs_come_in_windows_and_partitions_are_all_there():
    net = Net()
    value = net.input("x", ["batch", 4, 6, 6])
    for _ in range(7):
        value = net.op("Relu", conv(net, value, 4, 4, (1, 1)))
    program = net.program(value)
    found = sites(program, MergeConvChain())
    assert [s.kind for s in found] == ["conv-chain-3", "conv-chain-3"]
    assert len({n for s in found for n in s.nodes}) == sum(len(s.nodes) for s in found)
    assert len(list(partitions(5))) == 16
    assert len(set(partitions(5))) == 16
    for segments in partitions(5):
        assert [i for a, b in segments for i in range(a, b + 1)] == list(range(5))


def test_options_that_make_no_sense():
    with pytest.raises(PassError, match="longest >= 2"):
        MergeConvChain(longest=1)
    program = bottleneck(bias=False)
    (site,) = sites(program)
    with pytest.raises(PassError, match="is not in this program"):
        ALL.options(site, Net().program(), None, None)


@needs_reference
@pytest.mark.skipif(not zoo_dir.is_dir(), reason="zoo absent: set LAMINA_REFERENCE")
@pytest.mark.parametrize("model", ["fastestdet", "ultraface_rfb320"])
def test_models_made_by_others(model):
    """Every window of a real detector merges into something that runs, of the same interface."""
    program = capture(str(zoo_dir / f"{model}.onnx"))
    port = program.inputs[0]
    x = positive([d if isinstance(d, int) else 1 for d in port.shape])
    transform = MergeConvChain(growth=4.0)
    found = {s.name: (s, o) for s, o in options(program, transform)}
    assert found
    moves = [Move(s, o) for s, o in found.values()]
    merged = apply_moves(program, moves)
    check(merged)
    for got, want in zip(run(merged, {port.name: x}), run(program, {port.name: x}), strict=True):
        assert got.shape == want.shape
    count = [sum(n.op_type == "Conv" for n in p.graph) for p in (program, merged)]
    assert count[1] < count[0]


def test_half_precision_keeps_its_type():
    net = Net()
    x = net.input("x", ["batch", 4, 6, 6], ir.DataType.FLOAT16)
    weights = [net.array(positive([4, 4, 1, 1], seed).astype(np.float16)) for seed in (0, 1)]
    value = net.op("Conv", net.op("Relu", net.op("Conv", x, weights[0])), weights[1])
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    program = net.program(value)
    ((site, option),) = options(program)
    merged = apply_moves(program, [Move(site, option)])
    assert {v.dtype for v in merged.graph.initializers.values()} == {ir.DataType.FLOAT16}


# -- in the planner -----------------------------------------------------------------------------------


def small_convnet(seed: int = 0) -> Program:
    """A stem, an inverted bottleneck inside a residual branch, and a head; Relu6 with random signs."""
    net = Net(seed)

    def layer(x, inputs: int, outputs: int, kernel: int, act: bool = True, **attributes):
        shape = (outputs, inputs // attributes.get("group", 1), kernel, kernel)
        scale = np.float32(1 / np.sqrt(np.prod(shape[1:])))
        weight = net.array(net.random.standard_normal(shape).astype(np.float32) * scale, "weight")
        bias = net.array(net.random.standard_normal(outputs).astype(np.float32) * np.float32(0.1), "bias")
        value = net.op("Conv", x, weight, bias, pads=[kernel // 2] * 4, **attributes)
        limits = (net.array(np.float32(0)), net.array(np.float32(6)))
        return net.op("Clip", value, *limits) if act else value

    x = net.input("x", ["batch", 3, 16, 16])
    x = layer(layer(x, 3, 8, 3, strides=[2, 2]), 8, 8, 1, act=False)
    for _ in range(2):
        inner = layer(layer(x, 8, 48, 1), 48, 48, 3, group=48)
        x = net.op("Add", x, layer(inner, 48, 8, 1, act=False))
    logits = net.op("Flatten", net.op("GlobalAveragePool", layer(layer(x, 8, 16, 1), 16, 4, 1, act=False)))
    logits.name = "logits"
    return net.program(logits)


def test_the_supergraph_computes_what_the_plan_does():
    program = small_convnet()
    target = Target.parse("ort:cpu?threads=1")
    space = build_space(program, [DropBranch(), MergeConvChain()], Statistics(0), target)
    merges = [i for i, c in enumerate(space.choices) if c.transform.name == "merge-conv-chain"]
    drops = [i for i, c in enumerate(space.choices) if c.transform.name == "drop"]
    assert len(merges) == 4
    assert [space.choices[i].parent is not None for i in merges].count(True) == 2
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(target).compile(supergraph.model, target)
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
    random = np.random.default_rng(0)
    singles = [
        tuple(k if j == i else 0 for j in range(len(space.choices)))
        for i in merges
        for k in range(1, len(space.choices[i].options) + 1)
    ]
    mixed = [
        space.canonical([int(random.integers(0, len(c.options) + 1)) for c in space.choices])
        for _ in range(8)
    ]
    assert drops
    assert len(singles) >= 4
    for genome in [*singles, *mixed]:
        finished = apply_moves(program, space.moves(genome))
        got = supergraph.run(genome, {"x": x})["logits"]
        np.testing.assert_allclose(got, run(finished, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_a_whole_optimization_merges_and_reproduces(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    shorten_timing(monkeypatch)
    program = small_convnet()
    x = np.random.default_rng(2).standard_normal((64, 3, 16, 16)).astype(np.float32)
    result = lamina.optimize(
        program.model,
        "flops<=0.8x",
        data={"x": x},
        transforms=["merge-conv-chain"],
        target="ort:cpu?threads=1",
        seconds=4,
        batch_size=16,
    )
    assert {m.site.transform for m in result.plan.moves} == {"merge-conv-chain"}
    assert result.evidence["measured"]["flops"] <= 0.8 * result.evidence["original"]["flops"]
    assert result.evidence["predicted"]["flops"] == pytest.approx(
        result.evidence["measured"]["flops"], rel=0.05
    )
    again = lamina.apply(program.model, result.plan)
    np.testing.assert_array_equal(run(again, {"x": x[:4]})[0], run(result.program, {"x": x[:4]})[0])
