"""flatten-blocks: two blocks become one wide block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import HEADS, WIDTH, Net, image, run, text_of, tokens

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.errors import PassError
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.ir.verify import verify_structure
from lamina.passes import get_transform, transform_names
from lamina.passes.drop_branch import DropBranch, apply_drops
from lamina.passes.fold import fold
from lamina.passes.joining.flatten_blocks import FlattenBlocks, flatten_blocks
from lamina.passes.pass_ import Option, Refusal, Site
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from lamina.planner.plan import Move, Plan
from lamina.planner.space import build_space
from lamina.planner.supergraph import build_supergraph

TARGET = Target.parse("ort:cpu?threads=1")
Bodies = Callable[[Net, ir.Value, str], ir.Value]


def gated(net: Net, x: ir.Value, name: str) -> ir.Value:
    up = net.op("MatMul", x, net.weight(WIDTH, 12, name=f"{name}.up"))
    gate = net.op("MatMul", x, net.weight(WIDTH, 12, name=f"{name}.gate"))
    hidden = net.op("Mul", net.op("Mul", up, net.op("Sigmoid", up)), gate)
    return net.op("MatMul", hidden, net.weight(12, WIDTH, name=f"{name}.down"))


def one_head(net: Net, x: ir.Value, name: str) -> ir.Value:
    q, k, v = (net.linear(x, name=f"{name}.{n}") for n in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    weights = net.op("Softmax", net.op("Mul", scores, net.array(np.float32(0.3))), axis=-1)
    return net.linear(net.op("MatMul", weights, v), name=f"{name}.o")


def packed(net: Net, x: ir.Value, name: str) -> ir.Value:
    """Queries, keys and values of one projection."""
    qkv = net.linear(x, 3 * WIDTH, f"{name}.qkv")
    q, k, v = (net.heads(part) for part in net.op("Split", qkv, net.ints(*[WIDTH] * 3), outputs=3, axis=-1))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    merged = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH))
    return net.linear(merged, name=f"{name}.o")


def grouped(net: Net, x: ir.Value, name: str) -> ir.Value:
    """Keys and values of one head, repeated for two; the shape of what is repeated is computed."""
    q = net.heads(net.linear(x, name=f"{name}.q"))
    size = WIDTH // HEADS

    def repeated(side: str) -> ir.Value:
        small = net.linear(x, size, f"{name}.{side}")
        head = net.op("Transpose", net.op("Reshape", small, net.ints(0, 0, 1, size)), perm=[0, 2, 1, 3])
        more = net.op("Expand", net.op("Unsqueeze", head, net.ints(2)), net.ints(1, 1, HEADS, 1, 1))
        ends = net.op("Shape", head, start=0, end=1), net.op("Shape", head, start=2)
        made = net.op("Reshape", more, net.op("Concat", ends[0], net.ints(-1), ends[1], axis=0))
        made.shape = ir.Shape(["batch", HEADS, "seq", size])  # an exporter knows
        made.type = ir.TensorType(ir.DataType.FLOAT)
        return made

    k, v = repeated("k"), repeated("v")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    merged = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH))
    return net.linear(merged, name=f"{name}.o")


def operators(net: Net, x: ir.Value, name: str) -> ir.Value:
    """Attention and rotary positions as operators of opset 23, with fewer heads of keys than of queries."""
    q, k = net.linear(x, name=f"{name}.q"), net.linear(x, WIDTH // 2, f"{name}.k")
    v = net.linear(x, WIDTH // 2, f"{name}.v")
    angle = (
        net.array(np.full((3, 5, 2), 0.5, np.float32), "cos"),
        net.array(np.full((3, 5, 2), 0.8, np.float32), "sin"),
    )
    q, k = (
        net.op("RotaryEmbedding", q, *angle, num_heads=2),
        net.op("RotaryEmbedding", k, *angle, num_heads=1),
    )
    mixed = net.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=1, is_causal=1)
    return net.linear(mixed, name=f"{name}.o")


def plain(net: Net, x: ir.Value, name: str) -> ir.Value:
    return net.mlp(x, name)


def _attention(net: Net, x: ir.Value, name: str, factor: ir.Value) -> ir.Value:
    q, k, v = (net.heads(net.linear(x, name=f"{name}.{n}")) for n in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = net.op("Softmax", net.op("Mul", scores, factor), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return net.linear(net.op("Reshape", mixed, net.ints(0, 0, WIDTH)), name=f"{name}.o")


def heads(net: Net, x: ir.Value, name: str) -> ir.Value:
    """Scores of each head multiplied by its own constant, which has to follow the head."""
    sharper = net.array(net.random.uniform(0.5, 3, (1, HEADS, 1, 1)).astype(np.float32), f"{name}.sharp")
    return _attention(net, x, name, sharper)


def rms(net: Net, x: ir.Value, name: str) -> ir.Value:
    """A normalization in plain operators."""
    mean = net.op("ReduceMean", net.op("Mul", x, x), net.ints(-1))
    root = net.op("Sqrt", net.op("Add", mean, net.array(np.float32(1e-5))))
    return net.op("Mul", net.op("Div", x, root), net.weight(WIDTH, name=f"{name}.gain"))


def layer(net: Net, x: ir.Value, name: str) -> ir.Value:
    return net.norm(x, name)


def _blocks(
    *bodies: Bodies, norm: Bodies = layer, post: bool = False, count: int = 2, opset: int = 18
) -> Program:
    net = Net(opset=opset)
    x = tokens(net)
    for i in range(count):
        for j, body in enumerate(bodies):
            inner = x if post else norm(net, x, f"b{i}.n{j}")
            x = net.op("Add", x, body(net, inner, f"b{i}.{body.__name__}{j}"))
            x = norm(net, x, f"b{i}.n{j}") if post else x
    return net.program(net.op("Identity", x))


def _feeds(program: Program) -> dict[str, np.ndarray]:
    shape = (3, 4, 6, 6) if len(program.inputs[0].shape) == 4 else (3, 5, WIDTH)
    return {"x": np.random.default_rng(7).normal(size=shape).astype(np.float32)}


def _mute(program: Program, *branches: str) -> Program:
    """A clone in which the last weight and bias of some branches are zero, and nothing else is changed."""
    clone = program.clone()
    makers = {v.name: n for n in clone.graph for v in n.outputs}
    for branch in find_branches(program).branches:
        if branch.name in branches:
            last = makers[branch.body]
            before = last.inputs[0].producer()
            for node in (last, before) if last.op_type == "Add" else (last,):
                for value in node.inputs[1:]:
                    value.const_value = ir.Tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
    return Program(clone.model)


def _names(program: Program) -> list[str]:
    return [b.name for b in find_branches(program).blocks]


def _differ(one: Program, other: Program) -> float:
    feeds = _feeds(one)
    (before,), (after,) = run(one, feeds), run(other, feeds)
    return float(np.abs(before - after).max() / np.abs(before).max())


SHAPES = [
    (plain, 18),
    (gated, 18),
    (heads, 18),
    (one_head, 18),
    (packed, 18),
    (grouped, 18),
    (operators, 23),
]


@pytest.mark.parametrize("norm", [layer, rms])
@pytest.mark.parametrize(("body", "opset"), SHAPES)
def test_blocks_that_read_the_same_input_are_flattened_exactly(
    body: Bodies, opset: int, norm: Bodies
) -> None:
    """x + f(x) + g(x), built by hand, is what flattening f and then g gives, in fewer operators."""
    program = _blocks(body, norm=norm, opset=opset)
    flat = flatten_blocks(program, *_names(program))
    assert _differ(_beside(body, norm, opset), flat) < 1e-5
    products = [sum(n.op_type == "MatMul" for n in p.graph) for p in (program, flat)]
    assert products[0] == 2 * products[1]
    assert len(list(flat.graph)) < 0.8 * len(list(program.graph))


def _beside(body: Bodies, norm: Bodies, opset: int) -> Program:
    """The reference: the same weights, drawn in the same order, both bodies on the first stream."""
    net = Net(opset=opset)
    x = tokens(net)
    made = [body(net, norm(net, x, f"b{i}.n0"), f"b{i}.{body.__name__}0") for i in range(2)]
    return net.program(net.op("Identity", net.op("Add", net.op("Add", x, made[0]), made[1])))


def test_flattened_attention_and_mlp_are_exact_where_the_first_block_adds_nothing() -> None:
    program = _blocks(heads, plain)
    found = find_branches(program).blocks
    quiet = _mute(program, *found[0].branches)
    assert _differ(quiet, flatten_blocks(quiet, *_names(quiet))) < 1e-5


def test_each_kind_alone_at_either_place() -> None:
    program = _blocks(heads, plain)
    first, second = find_branches(program).blocks
    sizes = [len(list(program.graph))]
    for option, muted in (
        ("flatten attention", (first.branches[0], first.branches[1])),
        ("flatten mlp", (first.branches[1], second.branches[0])),
        ("flatten attention late", (first.branches[1],)),
        ("flatten mlp late", (second.branches[0], first.branches[1])),
    ):
        quiet = _mute(program, *muted)
        flat = flatten_blocks(quiet, first.name, second.name, option)
        sizes.append(len(list(flat.graph)))
        if option != "flatten attention late":  # a1 then reads what a2 reads: the same only without m1
            assert _differ(quiet, flat) < 1e-5, option
    assert max(sizes[1:]) < sizes[0]


def test_convolutions_lie_side_by_side() -> None:
    net = Net()
    x = image(net)

    def conv(source: ir.Value, out: int, width: int) -> ir.Value:
        kernel, bias = net.weight(out, width, 3, 3, name="kernel"), net.weight(out, name="bias")
        return net.op("Conv", source, kernel, bias, pads=[1, 1, 1, 1])

    for _ in range(2):
        x = net.op("Relu", net.op("Add", x, conv(net.op("Relu", conv(x, 6, 4)), 4, 6)))
    program = net.program(net.op("Identity", x))
    found = find_branches(program)
    first = found.branches[0].name
    # relu(x) = x where x >= 0: a second block that reads the first's input reads the same without the first
    feeds = {"x": np.abs(_feeds(program)["x"])}
    quiet = _mute(program, first)
    flat = flatten_blocks(quiet, *_names(quiet))
    (before,), (after,) = run(quiet, feeds), run(flat, feeds)
    assert np.abs(before - after).max() / np.abs(before).max() < 1e-5
    assert sum(n.op_type == "Conv" for n in flat.graph) == 2


def test_the_norm_of_a_post_norm_block_stays() -> None:
    program = _blocks(heads, plain, post=True)
    flat = flatten_blocks(program, *_names(program))
    kinds = [n.op_type for n in flat.graph]
    assert kinds.count("LayerNormalization") == 4
    assert kinds.count("Softmax") == 1
    assert np.isfinite(run(flat, _feeds(program))[0]).all()


def test_it_is_the_drop_of_the_second_block_where_that_adds_nothing() -> None:
    program = _blocks(heads, plain, post=True)
    _, second = find_branches(program).blocks
    quiet = _mute(program, *second.branches)
    dropped = apply_drops(quiet, second.branches)
    assert _differ(dropped, flatten_blocks(quiet, *_names(quiet))) < 1e-5


def test_structure_interface_and_the_program_itself_are_kept() -> None:
    program = _blocks(heads, plain)
    before = text_of(program)
    flat = flatten_blocks(program, *_names(program))
    verify_structure(flat.model)
    assert text_of(program) == before
    assert [(v.name, v.shape, v.dtype) for v in flat.inputs] == [
        (v.name, v.shape, v.dtype) for v in program.inputs
    ]
    assert [(v.name, v.shape) for v in flat.outputs] == [(v.name, v.shape) for v in program.outputs]
    again = fold(flat)[0]
    assert len(list(again.graph)) < len(list(fold(program)[0].graph))
    assert _differ(flat, again) < 1e-5


def _site(program: Program) -> tuple[Site, dict[str, Option]]:
    transform = FlattenBlocks()
    (site,) = [s for s in transform.sites(program) if isinstance(s, Site)]
    return site, {o.name: o for o in transform.options(site, program, None, TARGET)}


def test_options_name_what_is_flattened() -> None:
    _, options = _site(_blocks(heads, plain))
    assert list(options) == [
        "flatten",
        "flatten attention",
        "flatten attention late",
        "flatten mlp",
        "flatten mlp late",
    ]
    assert list(_site(_blocks(plain))[1]) == ["flatten"]


def test_a_plan_reproduces_it_bit_for_bit_and_the_function_agrees() -> None:
    program = _blocks(heads, plain)
    site, options = _site(program)
    for option in options.values():
        plan = Plan("f", moves=(Move(site, option),))
        again = Plan.from_json(plan.to_json())
        applied = apply_moves(program, plan.moves)
        assert text_of(applied) == text_of(apply_moves(program, again.moves))
        assert _differ(applied, flatten_blocks(program, *_names(program), option.name)) == 0


@pytest.mark.parametrize("post", [False, True])
def test_what_is_made_anew_stands_for_the_last_sum(post: bool) -> None:
    program = _blocks(heads, plain, post=post)
    site, options = _site(program)
    for option in options.values():
        move = Move(site, option)
        made = standing([move], apply_moves(program, [move]))
        assert made == {f"{site.nodes[-1]}_joined_out": site.outputs[0]}


def test_the_supergraph_computes_what_the_rewritten_program_does() -> None:
    program = _blocks(heads, plain, count=4)
    transforms = [DropBranch(), FlattenBlocks(), get_transform("parallel-layers")]
    space = build_space(program, transforms, None, TARGET)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    feeds = _feeds(program)
    rng = np.random.default_rng(0)
    genomes = {space.nothing}
    for i, choice in enumerate(space.choices):
        genomes |= {
            tuple(k + 1 if j == i else 0 for j in range(len(space.choices)))
            for k in range(len(choice.options))
        }
    for _ in range(10):
        genomes.add(space.canonical([int(rng.integers(len(c.options) + 1)) for c in space.choices]))
    assert {c.transform.name for c in space.choices} == {"drop", "flatten-blocks", "parallel-layers"}
    for genome in sorted(genomes):
        (expected,) = run(apply_moves(program, space.moves(genome)), feeds)
        (got,) = supergraph.run(genome, feeds).values()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_an_odd_run_leaves_its_first_block_alone() -> None:
    sites = [s for s in FlattenBlocks().sites(_blocks(heads, plain, count=5)) if isinstance(s, Site)]
    assert [s.name for s in sites] == ["b1+b2", "b3+b4"]


def _reasons(program: Program) -> list[str]:
    return [r.reason for r in FlattenBlocks().sites(program) if isinstance(r, Refusal)]


def test_blocks_of_other_operators_are_refused() -> None:
    net = Net()
    x = tokens(net)
    for i, kind in enumerate(("Relu", "Tanh")):
        inner = net.op(kind, net.linear(net.norm(x, f"b{i}.n"), 2 * WIDTH, f"b{i}.up"))
        x = net.op("Add", x, net.linear(inner, name=f"b{i}.down", width=2 * WIDTH))
    (reason,) = _reasons(net.program(net.op("Identity", x)))
    assert reason.endswith("has no counterpart")


def test_a_body_too_deep_for_the_walk_is_refused() -> None:
    def deep(net: Net, x: ir.Value, name: str) -> ir.Value:
        hidden = net.linear(x, name=f"{name}.up")
        for _ in range(160):
            hidden = net.op("Relu", hidden)
        return net.linear(hidden, name=f"{name}.down")

    assert _reasons(_blocks(deep)) == ["a body has more than 150 operators in a row"]


def test_a_normalization_inside_the_body_is_refused() -> None:
    def inside(net: Net, x: ir.Value, name: str) -> ir.Value:
        return net.linear(net.norm(net.linear(x, name=f"{name}.up"), f"{name}.mid"), name=f"{name}.down")

    program = _blocks(inside)
    (reason,) = _reasons(program)
    assert reason.startswith("LayerNormalization '")
    assert reason.endswith("mixes what lies side by side")
    with pytest.raises(PassError, match="mixes what lies side by side"):
        flatten_blocks(program, *_names(program))


def test_a_value_between_that_is_read_elsewhere_is_refused() -> None:
    net = Net()
    x = tokens(net)
    shown = []
    for i in range(2):
        x = net.op("Add", x, net.mlp(net.norm(x, f"b{i}.n"), f"b{i}.mlp"))
        shown.append(x)
    program = net.program(net.op("Identity", x), net.op("Relu", shown[0]))
    assert _reasons(program) == [f"'{shown[0].name}' is read elsewhere"]


def test_keys_and_values_at_the_interface_are_refused() -> None:
    net = Net()
    x, outputs = tokens(net), []
    for i in range(2):

        def cache(value: ir.Value, side: str, i: int = i) -> ir.Value:
            past = net.input(f"past.{i}.{side}", ["batch", HEADS, "past", WIDTH // HEADS])
            present = net.op("Concat", past, value, axis=2)
            present.name = f"present.{i}.{side}"
            outputs.append(present)
            return present

        x = net.op("Add", x, net.attention(net.norm(x, f"b{i}.n"), f"b{i}.attn", cache=cache))
    program = net.program(net.op("Identity", x), *outputs)
    (reason,) = _reasons(program)
    assert reason.endswith("keeps keys and values: heads of two caches are no one cache")


def test_unknown_blocks_and_options_are_errors() -> None:
    program = _blocks(plain, count=4)
    with pytest.raises(PassError, match="no block is called 'nothing'"):
        flatten_blocks(program, "nothing", _names(program)[0])
    with pytest.raises(PassError, match="is not the block behind"):
        flatten_blocks(program, _names(program)[0], _names(program)[2])
    with pytest.raises(PassError, match="there is no option 'fold'"):
        flatten_blocks(program, *_names(program)[:2], "fold")


def test_it_is_one_of_the_transforms() -> None:
    assert "flatten-blocks" in transform_names()
    assert isinstance(get_transform("flatten-blocks"), FlattenBlocks)
