"""Groups by hand: which indices go together, and what holds the others; each is proven by execution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from coupling_tools import checks, prove, run, some_units, weight_elements
from residual_nets import Net

from lamina.analysis.coupling import ChannelGroup, CouplingResult, Layout, Member, coupled_groups
from lamina.analysis.coupling_layout import segments
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.shrink import mask_channels, shrink

RNG = np.random.default_rng(3)
CHANNEL = (0, 1, 1, 1)
Table = dict[tuple[str, int], tuple[str, tuple[int, int, int, int] | None]]


def feeds_of(program: Program) -> dict[str, np.ndarray]:
    made = {}
    for port in program.inputs:
        shape = [d if isinstance(d, int) else 2 for d in port.shape]
        if port.numpy_dtype.kind == "f":
            made[port.name] = RNG.normal(size=shape).astype(np.float32)
        else:
            made[port.name] = RNG.integers(0, 5, size=shape).astype(port.numpy_dtype)
    return made


def weights(group: ChannelGroup) -> Table:
    """(weight, axis) -> role and (offset, step, block, stride)."""
    return {(m.name, m.axis): (m.role, _numbers(m.layout)) for m in group.weights}


def _numbers(layout: Layout | None) -> tuple[int, int, int, int] | None:
    return None if layout is None else (layout.offset, layout.step, layout.block, layout.stride)


def proven(net: Net, *outputs: ir.Value) -> CouplingResult:
    """The groups of a net, after each of them was cut and compared."""
    return all_proven(net.program(*outputs))


def all_proven(program: Program) -> CouplingResult:
    """The groups of a program, after some, the first and the last unit of each were cut and compared."""
    feeds = feeds_of(program)
    found = coupled_groups(program, feeds)
    for group in found.groups:
        for units in (some_units(group, RNG), [0], [group.units - 1]):
            gap = prove(program, found, {group.name: units}, feeds, check=checks(program))
            assert (gap is None) == bool(group.inexact)
            assert gap is None or gap < 1e-5
    return found


def conv(net: Net, x: ir.Value, out: int, width: int, name: str, kernel: int = 1, group: int = 1) -> ir.Value:
    w = net.weight(out, width // group, kernel, kernel, name=f"{name}.w")
    return net.op("Conv", x, w, net.weight(out, name=f"{name}.b"), pads=[kernel // 2] * 4, group=group)


def image(net: Net, channels: int = 3, size: int = 4) -> ir.Value:
    return net.input("x", ["n", channels, size, size])


def reasons(found: CouplingResult) -> dict[tuple[str, int], str]:
    return {(f.name, f.axis): f.reason for f in found.frozen}


# -- residual chains, convolutions ---------------------------------------------------------------------


def test_a_residual_chain_is_one_group_and_each_inner_width_another() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "stem")
    for block in "ab":
        inner = net.op("Relu", conv(net, h, 5, 6, f"{block}1", 3))
        h = net.op("Add", h, conv(net, inner, 6, 5, f"{block}2", 3))
    found = proven(net, conv(net, h, 2, 6, "head"))
    assert [(g.name, g.units) for g in found.groups] == [("stem.w", 6), ("a1.w", 5), ("b1.w", 5)]
    assert weights(found.groups[0]) == {
        ("stem.w", 0): ("out", CHANNEL),
        ("stem.b", 0): ("bias", CHANNEL),
        ("a1.w", 1): ("in", CHANNEL),
        ("a2.w", 0): ("out", CHANNEL),
        ("a2.b", 0): ("bias", CHANNEL),
        ("b1.w", 1): ("in", CHANNEL),
        ("b2.w", 0): ("out", CHANNEL),
        ("b2.b", 0): ("bias", CHANNEL),
        ("head.w", 1): ("in", CHANNEL),
    }
    assert weights(found.groups[1]) == {
        ("a1.w", 0): ("out", CHANNEL),
        ("a1.b", 0): ("bias", CHANNEL),
        ("a2.w", 1): ("in", CHANNEL),
    }
    assert reasons(found) == {
        ("stem.w", 1): "an input of the model ('x')",
        ("head.w", 0): "an output of the model ('conv_5')",
        ("head.b", 0): "an output of the model ('conv_5')",
    }


def test_a_depthwise_convolution_goes_with_the_channels_it_filters() -> None:
    net = Net()
    h = conv(net, image(net), 8, 3, "up")
    h = net.op(
        "Clip", conv(net, h, 8, 8, "deep", 3, group=8), net.array(np.float32(0)), net.array(np.float32(6))
    )
    program = net.program(conv(net, h, 2, 8, "down"))
    found = all_proven(program)
    assert [g.units for g in found.groups] == [8]
    assert weights(found.groups[0])["deep.w", 0] == ("out", CHANNEL)
    assert ("deep.w", 1) not in weights(found.groups[0])
    small = shrink(program, found, {"up.w": [1, 4]})
    assert next(n for n in small.graph if n.name == "node_conv_1").attributes["group"].as_int() == 6


def test_a_grouped_convolution_loses_groups_or_one_channel_of_each() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "up")
    h = conv(net, h, 9, 6, "mix", 1, group=3)
    found = proven(net, conv(net, h, 2, 9, "down"))
    tables = [(g.units, weights(g)) for g in found.groups]
    groups = {
        ("up.w", 0): ("out", (0, 2, 2, 1)),
        ("up.b", 0): ("bias", (0, 2, 2, 1)),
        ("mix.w", 0): ("out", (0, 3, 3, 1)),
        ("mix.b", 0): ("bias", (0, 3, 3, 1)),
        ("down.w", 1): ("in", (0, 3, 3, 1)),
    }
    inside = {
        ("up.w", 0): ("out", (0, 1, 3, 2)),
        ("up.b", 0): ("bias", (0, 1, 3, 2)),
        ("mix.w", 1): ("in", CHANNEL),
    }
    made = {
        ("mix.w", 0): ("out", (0, 1, 3, 3)),
        ("mix.b", 0): ("bias", (0, 1, 3, 3)),
        ("down.w", 1): ("in", (0, 1, 3, 3)),
    }
    assert tables[:2] == [(3, groups), (2, inside)]
    assert (3, made) in tables


def test_two_ways_of_cutting_one_axis_do_not_mix() -> None:
    net = Net()
    h = conv(net, conv(net, image(net), 6, 3, "up"), 9, 6, "mix", 1, group=3)
    program = net.program(conv(net, h, 2, 9, "down"))
    found = coupled_groups(program, feeds_of(program))
    with pytest.raises(PassError, match=r"groups 'up\.w' and 'up\.w/2' divide axis 1 of 'conv' differently"):
        shrink(program, found, {"up.w": [0], "up.w/2": [0]})


def test_a_transposed_convolution_has_its_axes_the_other_way_round() -> None:
    net = Net()
    h = conv(net, image(net), 4, 3, "up")
    h = net.op(
        "ConvTranspose", h, net.weight(4, 6, 2, 2, name="t.w"), net.weight(6, name="t.b"), strides=[2, 2]
    )
    found = proven(net, conv(net, h, 2, 6, "down"))
    assert weights(found.groups[0])["t.w", 0] == ("in", CHANNEL)
    assert weights(found.groups[1])["t.w", 1] == ("out", CHANNEL)
    assert weights(found.groups[1])["t.b", 0] == ("bias", CHANNEL)


def test_a_grouped_transposed_convolution() -> None:
    net = Net()
    h = conv(net, image(net), 4, 3, "up")
    h = net.op("ConvTranspose", h, net.weight(4, 3, 2, 2, name="t.w"), group=2, strides=[2, 2])
    found = proven(net, conv(net, h, 2, 6, "down"))
    assert (2, (0, 2, 2, 1)) in [(g.units, weights(g)["up.w", 0][1]) for g in found.of("up.w", 0)]
    assert weights(found.of("t.w", 1)[0])["down.w", 1] == ("in", (0, 1, 2, 3))


def test_batch_normalization_goes_with_its_channels() -> None:
    net = Net()
    h = net.conv(image(net, 4), 6, 4)
    found = proven(net, conv(net, h, 2, 6, "down"))
    table = weights(found.groups[0])
    assert [role for role, _ in table.values()] == ["out", "scale", "scale", "scale", "scale", "in"]


@pytest.mark.parametrize(("opset", "size"), [(18, 3), (21, 12)])
def test_group_normalization_loses_groups_or_one_channel_of_each(opset: int, size: int) -> None:
    net = Net(opset=opset)
    h = conv(net, image(net), 12, 3, "up")
    h = net.op("GroupNormalization", h, net.weight(size, name="s"), net.weight(size, name="t"), num_groups=3)
    found = proven(net, conv(net, h, 2, 12, "down"))
    layouts = {_numbers(m.layout) for g in found.groups for m in g.weights if m.name == "up.w"}
    assert layouts == {(0, 4, 4, 1), (0, 1, 3, 4)}
    assert all("GroupNormalization" in g.inexact[0] for g in found.groups)


# -- joins and cuts ------------------------------------------------------------------------------------


def test_concat_puts_each_part_at_its_offset() -> None:
    net = Net()
    x = image(net)
    joined = net.op("Concat", conv(net, x, 4, 3, "a"), conv(net, x, 6, 3, "b"), x, axis=1)
    found = proven(net, conv(net, joined, 2, 13, "down"))
    assert [weights(g)["down.w", 1] for g in found.groups] == [("in", (0, 1, 1, 1)), ("in", (4, 1, 1, 1))]


def test_groups_that_share_an_axis_are_cut_in_one_go() -> None:
    net = Net()
    x = image(net)
    joined = net.op("Concat", conv(net, x, 4, 3, "a"), conv(net, x, 6, 3, "b"), axis=1)
    program = net.program(conv(net, joined, 2, 10, "down"))
    feeds = feeds_of(program)
    found = coupled_groups(program, feeds)
    gap = prove(program, found, {"a.w": [0, 2], "b.w": [5]}, feeds)
    assert gap is not None
    assert gap < 1e-5


def test_split_parts_that_meet_again_are_tied() -> None:
    net = Net()
    h = conv(net, image(net), 8, 3, "up")
    left, right = net.op("Split", h, net.ints(4, 4), outputs=2, axis=1)
    gated = net.op("Mul", left, net.op("Sigmoid", right))
    found = proven(net, conv(net, gated, 2, 4, "down"))
    assert weights(found.groups[0]) == {
        ("up.w", 0): ("out", (0, 1, 2, 4)),
        ("up.b", 0): ("bias", (0, 1, 2, 4)),
        ("down.w", 1): ("in", CHANNEL),
    }


def test_parts_that_do_not_meet_are_groups_of_their_own() -> None:
    net = Net()
    h = conv(net, image(net), 8, 3, "up")
    left = net.op("Slice", h, net.ints(0), net.ints(3), net.ints(1))
    right = net.op("Slice", h, net.ints(3), net.ints(99), net.ints(1))
    y, z = conv(net, left, 2, 3, "l"), conv(net, right, 2, 5, "r")
    found = proven(net, y, z)
    assert [(g.units, weights(g)["up.w", 0]) for g in found.groups] == [
        (3, ("out", (0, 1, 1, 1))),
        (5, ("out", (3, 1, 1, 1))),
    ]


def test_a_strided_and_a_reversed_slice_are_followed() -> None:
    net = Net()
    h = conv(net, image(net), 8, 3, "up")
    even = net.op("Slice", h, net.ints(0), net.ints(8), net.ints(1), net.ints(2))
    back = net.op("Slice", even, net.ints(-1), net.ints(-99), net.ints(1), net.ints(-1))
    odd = net.op("Slice", h, net.ints(1), net.ints(8), net.ints(1), net.ints(2))
    found = proven(net, conv(net, net.op("Add", back, odd), 2, 4, "down"))
    (group,) = found.groups
    member = next(m for m in group.members if m.name == "up.w")
    assert member.indices.tolist() == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert member.layout is None


def test_gather_with_constant_indices_is_a_map() -> None:
    net = Net()
    h = conv(net, image(net), 4, 3, "up")
    twice = net.op("Gather", h, net.array(np.array([2, 0, 2, 3])), axis=1)
    found = proven(net, conv(net, twice, 2, 4, "down"))
    table = {tuple(m.indices[0]): g.units for g in found.groups for m in g.weights if m.name == "down.w"}
    assert table == {(1,): 2, (0, 2): 1}
    # nobody takes channel 1: it goes alone
    assert any([m.name for m in g.weights] == ["up.w", "up.b"] for g in found.groups)


def test_padded_channels_shrink_with_the_stream_they_join() -> None:
    net = Net()
    h = conv(net, image(net), 4, 3, "stem")
    body = conv(net, h, 8, 4, "body")
    short = net.op("Pad", h, net.ints(0, 2, 0, 0, 0, 2, 0, 0))
    found = proven(net, conv(net, net.op("Add", short, body), 2, 8, "down"))
    assert [(g.name, g.units, weights(g)["down.w", 1][1]) for g in found.groups] == [
        ("stem.w", 4, (2, 1, 1, 1)),
        ("body.w", 4, None),
    ]
    assert found.groups[1].members[0].indices.reshape(-1).tolist() == [0, 1, 6, 7]


# -- reshapes ------------------------------------------------------------------------------------------


def test_flatten_before_a_product_makes_blocks_of_pixels() -> None:
    net = Net()
    h = net.op("Flatten", conv(net, image(net), 5, 3, "up"))
    found = proven(
        net, net.op("Gemm", h, net.weight(3, 80, name="fc.w"), net.weight(3, name="fc.b"), transB=1)
    )
    (group,) = found.groups
    assert weights(group) == {
        ("up.w", 0): ("out", CHANNEL),
        ("up.b", 0): ("bias", CHANNEL),
        ("fc.w", 1): ("in", (0, 16, 16, 1)),
    }
    assert group.parameters({"up.w": 15, "up.b": 5, "fc.w": 240}) == pytest.approx(3 + 1 + 48)


def test_a_channel_shuffle_is_a_strided_map() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "up")
    h = net.op("Reshape", h, net.ints(0, 2, 3, 4, 4))
    h = net.op("Reshape", net.op("Transpose", h, perm=[0, 2, 1, 3, 4]), net.ints(0, -1, 4, 4))
    found = proven(net, conv(net, h, 2, 6, "down"))
    by_units = {g.units: weights(g) for g in found.groups}
    # channel j of both halves (j, j + 3) becomes neighbours (2 j, 2 j + 1)
    assert by_units[3]["up.w", 0] == ("out", (0, 1, 2, 3))
    assert by_units[3]["down.w", 1] == ("in", (0, 2, 2, 1))
    # a half becomes every second channel
    assert by_units[2]["up.w", 0] == ("out", (0, 3, 3, 1))
    assert by_units[2]["down.w", 1] == ("in", (0, 1, 3, 2))


def test_a_reshape_without_common_factors_stays() -> None:
    net = Net()
    h = net.op("Reshape", conv(net, image(net, 3, 1), 6, 3, "up"), net.ints(-1, 4))
    found = proven(net, net.op("MatMul", h, net.weight(4, 2)))
    assert not found.of("up.w", 0)
    assert "sizes before and after have no common factors" in reasons(found)["up.w", 0]


def test_depth_to_space_keeps_the_pixels_of_a_channel_together() -> None:
    for mode, layout in (("DCR", (0, 1, 4, 3)), ("CRD", (0, 4, 4, 1))):
        net = Net()
        h = net.op("DepthToSpace", conv(net, image(net), 12, 3, "up"), blocksize=2, mode=mode)
        found = proven(net, conv(net, h, 2, 3, "down"))
        assert [weights(g)["up.w", 0][1] for g in found.groups] == [layout]


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ((2, 12, 5), (2, 3, 4, 5), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((1, 6), (6,), [([0], []), ([1], [0])]),
        ((4, 1, 1), (4,), [([0], [0]), ([1, 2], [])]),
        ((6, 4), (8, 3), [([0, 1], [0, 1])]),
        ((), (1,), [([], [0])]),
    ],
)
def test_shapes_are_cut_where_leading_products_agree(
    before: Sequence[int], after: Sequence[int], wanted: list[tuple[list[int], list[int]]]
) -> None:
    assert segments(before, after) == wanted


# -- attention, embeddings, recurrent cells ------------------------------------------------------------


def tokens(net: Net, width: int = 8) -> ir.Value:
    return net.input("x", ["n", 5, width])


def test_attention_loses_whole_heads_or_a_channel_of_every_head() -> None:
    net = Net()
    x = tokens(net)
    found = proven(net, net.op("Add", x, net.attention(x)))
    heads, inside, values = found.groups
    assert heads.units == 2
    assert weights(heads) == {
        **{
            (f"attn.{n}.{p}", a): (r, (0, 4, 4, 1))
            for n in "qkv"
            for p, a, r in (("weight", 1, "out"), ("bias", 0, "bias"))
        },
        ("attn.o.weight", 0): ("in", (0, 4, 4, 1)),
    }
    # queries and keys meet in one product, values and the output projection in another
    assert {n for n, _ in weights(inside)} == {"attn.q.weight", "attn.q.bias", "attn.k.weight", "attn.k.bias"}
    assert {n for n, _ in weights(values)} == {"attn.v.weight", "attn.v.bias", "attn.o.weight"}
    assert {layout for _, layout in weights(inside).values()} == {(0, 1, 2, 4)}
    assert not heads.inexact


def test_shapes_that_are_computed_follow() -> None:
    net = Net()
    x = net.input("x", ["n", "t", 8])
    size = net.op("Shape", x, start=0, end=2)
    q, k, v = (net.linear(x, name=n) for n in "qkv")
    target = net.op("Concat", size, net.ints(2, 4), axis=0)
    q, k, v = (net.op("Transpose", net.op("Reshape", y, target), perm=[0, 2, 1, 3]) for y in (q, k, v))
    depth = net.op("Cast", net.op("Shape", q, start=3), to=int(ir.DataType.FLOAT))
    scores = net.op(
        "Div", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), net.op("Sqrt", depth)
    )
    mixed = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    flat = net.op("Reshape", mixed, net.op("Concat", size, net.ints(-1), axis=0))
    program = net.program(net.linear(flat, name="o"))
    found = coupled_groups(program, {"x": np.zeros((2, 3, 8), dtype=np.float32)})
    assert [g.units for g in found.groups] == [2, 4, 4]
    for group in found.groups:
        for shape in ((2, 3, 8), (1, 7, 8), (5, 1, 8)):
            feeds = {"x": RNG.normal(size=shape).astype(np.float32)}
            gap = prove(program, found, {group.name: [0]}, feeds)
            assert gap is not None
            assert gap < 1e-5


def grouped_queries(net: Net) -> ir.Value:
    """Four query heads over two key heads of width 3, keys and values repeated by Expand."""
    x = tokens(net)
    q = net.op("MatMul", x, net.weight(8, 12, name="q"))
    q = net.op("Transpose", net.op("Reshape", q, net.ints(0, 0, 4, 3)), perm=[0, 2, 1, 3])
    parts = []
    for name in ("k", "v"):
        y = net.op("MatMul", x, net.weight(8, 6, name=name))
        y = net.op("Transpose", net.op("Reshape", y, net.ints(0, 0, 2, 3)), perm=[0, 2, 1, 3])
        y = net.op("Expand", net.op("Unsqueeze", y, net.ints(2)), net.ints(1, 2, 2, 5, 3))
        parts.append(net.op("Reshape", y, net.ints(0, 4, 5, 3)))
    scores = net.op("MatMul", q, net.op("Transpose", parts[0], perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[1])
    flat = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, 12))
    return net.op("MatMul", flat, net.weight(12, 8, name="o"))


def test_grouped_queries_go_with_their_key_head_or_one_from_each() -> None:
    net = Net()
    found = proven(net, grouped_queries(net))
    by_kind = [(g.units, weights(g)) for g in found.groups]
    whole = {
        ("q", 1): ("out", (0, 6, 6, 1)),
        ("k", 1): ("out", (0, 3, 3, 1)),
        ("v", 1): ("out", (0, 3, 3, 1)),
        ("o", 0): ("in", (0, 6, 6, 1)),
    }
    assert by_kind[0] == (2, whole)
    queries = next(
        g
        for units, g in zip([u for u, _ in by_kind], found.groups, strict=True)
        if units == 2 and g.name != "q"
    )
    assert {n for n, _ in weights(queries)} == {"q", "o"}
    assert queries.members[0].indices.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


@pytest.mark.parametrize("packed", [False, True])
def test_the_attention_operator_loses_whole_heads(packed: bool) -> None:
    net = Net(opset=23)
    x = tokens(net)
    parts = []
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        y = net.op("MatMul", x, net.weight(8, heads * 3, name=name))
        if not packed:
            y = net.op("Transpose", net.op("Reshape", y, net.ints(0, 0, heads, 3)), perm=[0, 2, 1, 3])
        parts.append(y)
    heads = {"q_num_heads": 4, "kv_num_heads": 2} if packed else {}
    y = net.op("Attention", *parts, **heads)
    if not packed:
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(0, 0, 12))
    found = proven(net, net.op("MatMul", y, net.weight(12, 8, name="o")))
    layouts = [{n: layout for (n, _), (_, layout) in weights(g).items()} for g in found.groups]
    assert {"q": (0, 6, 6, 1), "k": (0, 3, 3, 1), "v": (0, 3, 3, 1), "o": (0, 6, 6, 1)} in layouts
    assert all(g.units == 2 for g in found.groups)


def test_a_tied_embedding_is_cut_once_for_both_uses() -> None:
    net = Net()
    ids = net.input("ids", ["n", 5], ir.DataType.INT64)
    table = net.weight(11, 8, name="table")
    h = net.op("Gather", table, ids)
    h = net.op("Add", h, net.mlp(h))
    found = proven(net, net.op("MatMul", h, net.op("Transpose", table, perm=[1, 0])))
    stream = found.of("table", 1)[0]
    assert stream.units == 8
    assert weights(stream)["table", 1] == ("table", CHANNEL)
    assert {("mlp.fc1.weight", 0), ("mlp.fc2.weight", 1), ("mlp.fc2.bias", 0)} < set(weights(stream))
    assert "looked up by computed indices" in reasons(found)["table", 0]


def test_a_normalized_stream_is_cut_but_not_the_same_as_zeroed() -> None:
    net = Net()
    h = net.linear(tokens(net), name="in")
    h = net.op("Add", h, net.mlp(net.norm(h, "ln")))
    found = proven(net, net.linear(h, name="out"))
    stream = found.of("in.weight", 1)[0]
    assert weights(stream)["ln.weight", 0] == ("scale", CHANNEL)
    (why,) = stream.inexact
    assert why.startswith("the mean or spread over channels changes when fewer are left (LayerNormalization")
    assert not found.of("mlp.fc1.weight", 1)[0].inexact


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_recurrent_cell_loses_a_channel_in_every_gate(kind: str, gates: int, direction: str) -> None:
    net = Net()
    ways = 1 + (direction == "bidirectional")
    x = net.input("x", [5, "n", 4])
    h = net.op("MatMul", x, net.weight(4, 6, name="up"))
    w, r = net.weight(ways, gates * 3, 6, name="W"), net.weight(ways, gates * 3, 3, name="R")
    y = net.op(kind, h, w, r, net.weight(ways, 2 * gates * 3, name="B"), hidden_size=3, direction=direction)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
    found = proven(net, net.op("MatMul", y, net.weight(3 * ways, 2, name="down")))
    hidden = weights(found.of("R", 2)[0])
    assert hidden["W", 1] == hidden["R", 1] == ("out", (0, 1, gates, 3 if gates > 1 else 1))
    assert hidden["B", 1] == ("out", (0, 1, 2 * gates, 3))
    assert hidden["down", 0] == ("in", (0, 1, ways, 3 if ways > 1 else 1))
    assert weights(found.of("W", 2)[0])["up", 1] == ("out", CHANNEL)


def test_an_einsum_ties_by_letter() -> None:
    net = Net()
    h = net.op("MatMul", tokens(net), net.weight(8, 6, name="up"))
    found = proven(net, net.op("Einsum", h, net.weight(3, 6, name="e"), equation="btc,oc->bto"))
    assert weights(found.groups[0]) == {("up", 1): ("out", CHANNEL), ("e", 1): ("in", CHANNEL)}


def test_squeeze_and_excitation_is_part_of_its_stream() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "up")
    gate = net.op("Relu", conv(net, net.op("GlobalAveragePool", h), 2, 6, "se1"))
    h = net.op("Mul", h, net.op("Sigmoid", conv(net, gate, 6, 2, "se2")))
    found = proven(net, conv(net, h, 2, 6, "down"))
    assert set(weights(found.groups[0])) == {
        *(("up.w", 0), ("up.b", 0), ("se1.w", 1), ("se2.w", 0), ("se2.b", 0), ("down.w", 1)),
    }


# -- what stays ----------------------------------------------------------------------------------------


def test_an_operator_without_a_rule_holds_what_it_touches_and_says_so() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "up")
    net.op("NonZero", h)
    found = coupled_groups(program := net.program(conv(net, h, 2, 6, "down")), feeds_of(program))
    assert found.groups == ()
    assert reasons(found)["up.w", 0] == "the operator has no rule (NonZero 'node_nonzero')"


def test_a_subgraph_holds_what_it_captures() -> None:
    net = Net()
    h = conv(net, image(net), 6, 3, "up")
    inner = ir.node("Relu", [h], name="inner")
    inner.outputs[0].name, inner.outputs[0].type = "inner_out", ir.TensorType(ir.DataType.FLOAT)
    other = ir.node("Neg", [h], name="other")
    other.outputs[0].name, other.outputs[0].type = "other_out", ir.TensorType(ir.DataType.FLOAT)
    branches = [ir.Graph([], [n.outputs[0]], nodes=[n], name=n.name) for n in (inner, other)]
    flag = net.input("flag", [], ir.DataType.BOOL)
    y = net.op("If", flag, then_branch=branches[0], else_branch=branches[1])
    program = net.program(conv(net, y, 2, 6, "down"))
    feeds = {"x": np.zeros((2, 3, 4, 4), dtype=np.float32), "flag": np.array(True)}
    found = coupled_groups(program, feeds)
    assert found.groups == ()
    assert "subgraphs are not looked into" in reasons(found)["up.w", 0]


def test_the_last_channel_stays() -> None:
    net = Net()
    program = net.program(conv(net, conv(net, image(net), 3, 3, "up"), 2, 3, "down"))
    found = coupled_groups(program, feeds_of(program))
    with pytest.raises(PassError, match=r"nothing would be left on axis 0 of 'up\.w'"):
        shrink(program, found, {"up.w": [0, 1, 2]})
    with pytest.raises(PassError, match="has 3 units"):
        shrink(program, found, {"up.w": [3]})
    with pytest.raises(PassError, match="no channel group is called 'none'"):
        mask_channels(program, found, {"none": [0]})


def test_shrinking_leaves_the_program_alone_and_masking_changes_it() -> None:
    net = Net()
    program = net.program(conv(net, net.op("Sigmoid", conv(net, image(net), 5, 3, "up")), 2, 5, "down"))
    feeds = feeds_of(program)
    found = coupled_groups(program, feeds)
    before, size = run(program, feeds), weight_elements(program)
    small = shrink(program, found, {"up.w": [1, 3]})
    assert weight_elements(small) == size - 2 * (3 + 1 + 2)
    assert weight_elements(program) == size
    masked = run(mask_channels(program, found, {"up.w": [1, 3]}), feeds)
    for name, array in run(program, feeds).items():
        assert np.array_equal(array, before[name])
        assert np.abs(masked[name] - array).max() > 1e-3
    assert shrink(program, found, {}).fingerprint == program.fingerprint


def test_a_layout_is_given_only_where_it_holds() -> None:
    def layout(*rows: list[int]) -> Layout | None:
        return Member("w", 0, "out", 12, np.array(rows)).layout

    assert layout([3], [5], [7]) == Layout(3, 2, 1, 1)
    assert layout([0, 4], [1, 5]) == Layout(0, 1, 2, 4)
    assert layout([2, 3]) == Layout(2, 2, 2, 1)
    assert layout([0, 1], [2, 4]) is None
    assert layout([0], [1], [3]) is None
