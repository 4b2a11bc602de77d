"""Dropping a branch equals multiplying its output by zero, and what only it needed leaves the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference, zoo_dir
from residual_nets import HEADS, WIDTH, Net, image, keeping, run, session_of, switched, text_of, tokens

from lamina.errors import PassError
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import DropBranch, apply_drops
from lamina.passes.fold.chain_residual_sums import ChainResidualSums
from lamina.passes.pass_ import Refusal, Site

RANDOM = np.random.default_rng(7)


def sites(program: Program) -> dict[str, Site]:
    return {s.name: s for s in DropBranch().sites(program) if isinstance(s, Site)}


def refusals(program: Program) -> list[Refusal]:
    return [s for s in DropBranch().sites(program) if isinstance(s, Refusal)]


def feeds_of(program: Program, **dims: int) -> dict[str, np.ndarray]:
    sizes = {"batch": 2, "seq": 3, **dims}
    feeds = {}
    for port in program.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in port.shape]
        if port.numpy_dtype.kind == "f":
            feeds[port.name] = RANDOM.standard_normal(shape).astype(port.numpy_dtype)
        else:
            feeds[port.name] = np.ones(shape, port.numpy_dtype)
    return feeds


def assert_drops_are_zeros(
    program: Program, choices: Sequence[Sequence[str]], feeds: dict[str, np.ndarray]
) -> list[Program]:
    """Bit equal outputs in a runtime that optimizes nothing; the program given is not touched."""
    before = text_of(program)
    branches = find_branches(program).branches
    zeroing = session_of(switched(program, branches))
    results = []
    for names in choices:
        dropped = apply_drops(program, names)
        shown = {p.name for p in dropped.outputs}
        wanted = zip(zeroing({**feeds, **keeping(branches, names)}), program.outputs, strict=True)
        expected = [e for e, p in wanted if p.name in shown]
        for got, want in zip(run(dropped, feeds), expected, strict=True):
            np.testing.assert_array_equal(got, want)
        results.append(dropped)
    assert text_of(program) == before
    return results


def assert_drop_is_zero(program: Program, names: Sequence[str], feeds: dict[str, np.ndarray]) -> Program:
    return assert_drops_are_zeros(program, [names], feeds)[0]


def weights_of(program: Program) -> set[str]:
    return set(program.graph.initializers)


def transformer(pre: bool = True, layers: int = 2, seed: int = 0) -> Program:
    net = Net(seed)
    x = tokens(net)
    for i in range(layers):
        for make, part in ((net.attention, "attn"), (net.mlp, "mlp")):
            name = f"l.{i}.{part}"
            if pre:
                x = net.op("Add", x, make(net.norm(x, f"{name}.norm"), name))
            else:
                x = net.norm(net.op("Add", make(x, name), x), f"{name}.norm")
    return net.program(x)


# -- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_branch_of_a_transformer(pre, seed):
    program = transformer(pre, seed=seed)
    feeds = feeds_of(program)
    names = list(sites(program))
    assert_drops_are_zeros(program, [*([n] for n in names), names], feeds)


def test_random_subsets_of_a_deep_transformer():
    program = transformer(layers=6, seed=3)
    feeds = feeds_of(program)
    names = list(sites(program))
    choices = [[n for n in names if RANDOM.random() < 0.5] or names[:1] for _ in range(6)]
    assert_drops_are_zeros(program, choices, feeds)


def test_resnet_with_both_shortcuts():
    net = Net(4)
    x = image(net)
    x = net.op("Relu", net.op("Add", x, net.conv(net.op("Relu", net.conv(x)))))
    body = net.conv(net.op("Relu", net.conv(x, 6, stride=2)), 6, 6)
    x = net.op("Relu", net.op("Add", body, net.conv(x, 6, stride=2, kernel=1)))
    program = net.program(x)
    feeds = feeds_of(program)
    names = list(sites(program))
    assert len(names) == 2
    for chosen in ([names[0]], [names[1]], names):
        dropped = assert_drop_is_zero(program, chosen, feeds)
        assert interface(dropped) == interface(program)
    assert len([n for n in dropped.graph if n.op_type == "Conv"]) == 1  # the shortcut


def interface(program: Program) -> tuple[object, ...]:
    return program.inputs, program.outputs


def test_outer_branch_takes_inner_ones_along():
    net = Net(5)
    x = image(net)
    h = net.conv(x)
    h = net.op("Add", h, net.conv(net.op("Relu", net.conv(h))))
    program = net.program(net.op("Relu", net.op("Add", x, net.conv(h))))
    feeds = feeds_of(program)
    inner, outer = [b.name for b in find_branches(program).branches]
    assert_drop_is_zero(program, [inner], feeds)
    assert_drop_is_zero(program, [outer], feeds)
    both = apply_drops(program, [inner, outer])
    assert text_of(both) == text_of(apply_drops(program, [outer]))
    assert [n.op_type for n in both.graph] == ["Relu"]


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]])
def test_parallel_branches_after_chaining(chosen):
    net = Net(6)
    x = tokens(net)
    for i in range(2):
        n = net.norm(x, f"l.{i}.n")
        x = net.op("Add", net.op("Add", net.attention(n, f"l.{i}.attn"), net.mlp(n, f"l.{i}.mlp")), x)
    program = net.program(net.norm(x))
    assert [r.reason.split("'")[0] for r in refusals(program)] == ["its Add "] * 2
    chained = program.clone()
    rewriter = Rewriter(chained.model)
    ChainResidualSums().apply(rewriter)
    assert len(rewriter.records) == 2
    feeds = feeds_of(program)
    (want,), (got,) = run(program, feeds), run(chained, feeds)
    assert np.abs(got - want).max() <= 4 * np.spacing(np.abs(want).max()) * 16
    assert not refusals(chained)
    names = list(sites(chained))
    assert len(names) == 4
    assert_drop_is_zero(chained, [names[i] for i in chosen], feeds)
    again = Rewriter(chained.model)
    ChainResidualSums().apply(again)
    assert not again.records


def test_branch_that_ends_in_the_models_output():
    """The output keeps its name although the skip is an input, and a cached skip keeps its own."""
    net = Net(8)
    x = tokens(net)
    program = net.program(net.op("Add", x, net.mlp(x)))
    dropped = assert_drop_is_zero(program, list(sites(program)), feeds_of(program))
    assert interface(dropped) == interface(program)
    assert [n.op_type for n in dropped.graph] == ["Identity"]


def decoder(layers: int = 3) -> Program:
    net = Net(9)
    x = tokens(net)
    mask = net.input("mask", ["batch", 1, "seq", "all"])
    shown: list[ir.Value] = []
    for i in range(layers):

        def cache(value: ir.Value, what: str, layer: int = i) -> ir.Value:
            before = net.input(f"past.{layer}.{what}", ["batch", HEADS, "past", WIDTH // HEADS])
            value = net.op("Concat", before, value, axis=2)
            shown.append(net.op("Identity", value) if what == "key" else value)
            shown[-1].name = f"present.{layer}.{what}"
            return value

        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn", mask=mask, cache=cache))
        x = net.op("Add", x, net.mlp(net.norm(x), f"l.{i}.mlp"))
    return net.program(net.norm(x), *shown)


def test_cache_of_a_dropped_attention_leaves_the_interface():
    program = decoder()
    feeds = feeds_of(program, past=4, all=7)
    dropped = assert_drop_is_zero(program, ["l.1.attn"], feeds)
    gone = {"past.1.key", "past.1.value", "present.1.key", "present.1.value"}
    ports = [p.name for p in (*program.inputs, *program.outputs)]
    assert [p.name for p in (*dropped.inputs, *dropped.outputs)] == [p for p in ports if p not in gone]
    dropped = assert_drop_is_zero(program, ["l.1.mlp"], feeds)
    assert interface(dropped) == interface(program)


def test_all_attention_dropped_keeps_the_mask_input():
    program = decoder(2)
    dropped = apply_drops(program, ["l.0.attn", "l.1.attn"])
    assert [p.name for p in dropped.inputs] == ["x", "mask"]
    assert [p.name for p in dropped.outputs] == [program.outputs[0].name]


@pytest.mark.parametrize("norm", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("post", [True, False])
def test_fused_add_and_normalization(norm, opset, post):
    """What stays is the normalization of the skip; the fused bias is the branch's own."""
    net = Net(10, opset)
    x = tokens(net)
    scale = net.weight(WIDTH)
    shift = [net.weight(WIDTH)] if norm == "SkipLayerNormalization" else []
    body = net.op("MatMul", net.op("Relu", net.linear(x)), net.weight(WIDTH, WIDTH))
    made = net.op(
        norm, body, x, scale, *shift, net.weight(WIDTH), outputs=1 if post else 4, domain="com.microsoft"
    )
    outputs = [made] if post else [made[0], made[3]]
    for value in outputs:
        value.shape = x.shape
    if not post:
        made[1].name = made[2].name = ""
    program = net.program(*outputs)
    (site,) = sites(program).values()
    dropped = apply_drops(program, [site.name])
    feeds = feeds_of(program)
    got = run(dropped, feeds)
    centered = feeds["x"] - (feeds["x"].mean(-1, keepdims=True) if shift else 0)
    unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + (1e-12 if shift else 1e-6))
    want = unit * scale.const_value.numpy() + (shift[0].const_value.numpy() if shift else 0)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)
    if not post:
        np.testing.assert_array_equal(got[1], feeds["x"])
    assert not [n for n in dropped.graph if n.op_type == "MatMul"]


@needs_reference
@pytest.mark.parametrize(
    ("model", "feeds"),
    [
        ("resnet20_cifar10.onnx", {"x": RANDOM.standard_normal((2, 3, 32, 32)).astype(np.float32)}),
        ("kwt1_speech_commands.onnx", {"feats": RANDOM.standard_normal((1, 98, 40)).astype(np.float32)}),
        ("stories260k.onnx", {"tokens": RANDOM.integers(0, 512, (1, 9))}),
    ],
)
def test_every_branch_of_reference_models(model, feeds):
    program = Program(ir.load(models_dir / model))
    names = list(sites(program))
    assert len(names) == len(find_branches(program).branches)
    for dropped in assert_drops_are_zeros(program, [[n] for n in names], feeds):
        assert interface(dropped) == interface(program)


@needs_reference
def test_minilm_first_and_last_layer():
    program = Program(ir.load(models_dir / "minilm" / "minilm_l6_v2.onnx"))
    ids = RANDOM.integers(1000, 20000, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds["attention_mask"][0, 5:] = 0
    names = list(sites(program))
    assert_drops_are_zeros(program, [names[:1], names[-2:]], feeds)


@pytest.mark.skipif(not zoo_dir.is_dir(), reason="zoo absent: set LAMINA_REFERENCE")
@pytest.mark.parametrize("model", ["fastestdet", "gtcrn_simple", "ppocr_v2_cls", "ultraface_rfb320"])
def test_models_made_by_others(model):
    """Projections, U-Net skips around each other with streaming state, weights in Constant nodes."""
    program = capture(zoo_dir / f"{model}.onnx")
    names = list(sites(program))
    sizes = {k: v.shape for k, v in program.example.items()}
    sizes["x"] = (1, 3, 48, 64)  # ppocr states no size at all
    feeds = {p.name: RANDOM.standard_normal(sizes[p.name]).astype(np.float32) for p in program.inputs}
    results = assert_drops_are_zeros(program, [[n] for n in names[:3]], feeds)
    assert all(len(r.graph) < len(program.graph) for r in results)


# -- what leaves ----------------------------------------------------------------------------------------


def test_parameters_leave_the_file():
    program = transformer()
    branch = find_branches(program).branches[0]
    dropped = apply_drops(program, [branch.name])
    assert weights_of(program) - weights_of(dropped) == set(branch.weights)
    saved = len(text_of(program)) - len(text_of(dropped))
    assert saved >= 4 * branch.parameters
    assert not {n.name for n in dropped.graph} & {*branch.nodes, branch.add}


def test_shared_weights_stay():
    """Two branches with one weight matrix: dropping one leaves it, dropping both takes it."""
    net = Net(11)
    x = tokens(net)
    shared = net.weight(WIDTH, WIDTH, name="shared")
    for _ in range(2):
        x = net.op(
            "Add", x, net.op("Relu", net.op("MatMul", net.op("MatMul", x, shared), net.weight(WIDTH, WIDTH)))
        )
    program = net.program(net.op("Relu", x))
    first, second = sites(program)
    assert "shared" not in sites(program)[first].weights
    feeds = feeds_of(program)
    assert "shared" in weights_of(assert_drop_is_zero(program, [first], feeds))
    assert "shared" not in weights_of(assert_drop_is_zero(program, [first, second], feeds))


def test_ambient_values_others_read_stay():
    program = decoder(2)
    dropped = apply_drops(program, ["l.0.attn"])
    mask = next(v for v in dropped.graph.inputs if v.name == "mask")
    assert len(mask.uses()) == 1


# -- the protocol ---------------------------------------------------------------------------------------


def test_site_states_what_it_replaces():
    program = transformer(layers=1)
    site = next(iter(sites(program).values()))
    branch = find_branches(program).branches[0]
    assert site.nodes == (*branch.nodes, branch.add)
    assert (site.inputs, site.outputs) == ((branch.skip,), (branch.output,))
    assert (site.transform, site.kind, site.weights) == ("drop", "attention", branch.weights)


@pytest.mark.parametrize("skip_first", [True, False])
def test_option_names_the_operand_that_stays(skip_first):
    net = Net(12)
    x = tokens(net)
    body = net.mlp(net.norm(x))
    program = net.program(net.op("Add", x, body) if skip_first else net.op("Add", body, x))
    (site,) = sites(program).values()
    (option,) = DropBranch().options(site, program, None, None)
    assert option.name == "drop"
    assert json.loads(json.dumps(option.parameters)) == {"skip_operand": 0 if skip_first else 1}


def test_emit_reads_the_skip_as_it_is_now_and_adds_nothing():
    program = transformer(layers=1)
    site = list(sites(program).values())[1]
    (option,) = DropBranch().options(site, program, None, None)
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    nodes = {n: rewriter.node(n) for n in site.nodes}
    add = nodes[site.nodes[-1]]
    index = option.parameters["skip_operand"]
    moved = rewriter.at(add).op("Identity", [add.inputs[index]])
    add.replace_input_with(index, moved)
    count = len(clone.graph)
    assert DropBranch().emit(site, option, rewriter, nodes) == [moved]
    assert len(clone.graph) == count


def test_emit_survives_swapped_operands():
    program = transformer(layers=1)
    site = next(iter(sites(program).values()))
    (option,) = DropBranch().options(site, program, None, None)
    clone = program.clone()
    nodes = {n: Rewriter(clone.model).node(n) for n in site.nodes}
    add = nodes[site.nodes[-1]]
    first, second = add.inputs
    add.replace_input_with(0, second)
    add.replace_input_with(1, first)
    (kept,) = DropBranch().emit(site, option, Rewriter(clone.model), nodes)
    assert kept.name == site.inputs[0]


def test_second_run_finds_only_what_is_left():
    program = transformer()
    names = list(sites(program))
    assert list(sites(apply_drops(program, names[:1]))) == names[1:]
    assert not sites(apply_drops(program, names))


def test_unknown_and_refused_names_are_errors():
    program = transformer()
    with pytest.raises(PassError) as error:
        apply_drops(program, ["l.0.atn"])
    assert str(error.value) == (
        "no branch is called 'l.0.atn'\n  at <memory>\n  did you mean l.0.attn, l.1.attn?"
    )


def test_option_of_another_program_is_an_error():
    site = dataclasses.replace(next(iter(sites(transformer()).values())), nodes=("nothing",))
    with pytest.raises(PassError, match="is not in this program"):
        DropBranch().options(site, transformer(), None, None)


def test_unknown_shapes_are_refused():
    program = transformer(layers=1)
    for node in program.graph:
        for value in node.outputs:
            if node.op_type == "Add":
                value.shape = None
    assert {r.reason.split("'")[2] for r in refusals(program)} == {" is unknown, so the skip may broadcast"}


def test_near_misses_become_refusals():
    net = Net(13)
    x = tokens(net)
    body = net.mlp(x)
    found = refusals(net.program(net.op("Add", x, body), net.op("Relu", body)))
    assert [(r.transform, r.reason) for r in found] == [
        ("drop", f"value '{body.name}' escapes the branch: 'node_relu' reads it too")
    ]
