"""Residual branches: counts on reference models, and every structure that is one or only looks like one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference, zoo_dir
from residual_nets import HEADS, WIDTH, Net, image, text_of, tokens

from lamina.ir.branch_kinds import repeating_runs
from lamina.ir.branch_search import Search
from lamina.ir.branch_view import GraphView
from lamina.ir.branches import BranchesResult, find_branches
from lamina.ir.program import Program

# Manifest's architectures; (kind, shortcut) -> how many.
REFERENCE = {
    "resnet56_cifar10.onnx": {("conv", "identity"): 25, ("conv", "projection"): 2},
    "resnet20_cifar10.onnx": {("conv", "identity"): 7, ("conv", "projection"): 2},
    "mobilenet_v1_025_imagenet.onnx": {},
    "kwt1_speech_commands.onnx": {("attention", "identity"): 12, ("mlp", "identity"): 12},
    "stories260k.onnx": {("attention", "identity"): 5, ("mlp", "identity"): 5},
    "minilm/minilm_l6_v2.onnx": {("attention", "identity"): 6, ("mlp", "identity"): 6},
}
# Read off the graphs. gtcrn: two intra-frame GRU branches and three U-Net skips around them, nested; the
# inter-frame branches share one state tensor and are refused. ultraface: the RFB block with its 1x1 shortcut.
ZOO = {
    "dtln_1.onnx": {},
    "fastestdet.onnx": {("conv", "identity"): 1},
    "gtcrn_simple.onnx": {("recurrent", "identity"): 5},
    "magika_standard_v3_3.onnx": {},
    "mnist_cntk.onnx": {},
    "ppocr_v2_cls.onnx": {("conv", "identity"): 7},
    "ultraface_rfb320.onnx": {("conv", "projection"): 1},
}


def counts(result: BranchesResult) -> dict[tuple[str, str], int]:
    return dict(Counter((b.kind, b.shortcut) for b in result.branches))


def kinds(program: Program) -> list[str]:
    return [b.kind for b in find_branches(program).branches]


def load(path) -> Program:
    return Program(ir.load(path))


# -- reference models -----------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize("model", REFERENCE)
def test_reference_models_have_the_branches_their_architecture_states(model):
    assert counts(find_branches(load(models_dir / model))) == REFERENCE[model]


@pytest.mark.skipif(not zoo_dir.is_dir(), reason="zoo absent: set LAMINA_REFERENCE")
@pytest.mark.parametrize("model", ZOO)
def test_zoo_models_have_the_branches_read_off_their_graphs(model):
    assert counts(find_branches(load(zoo_dir / model))) == ZOO[model]


@needs_reference
def test_names_come_from_module_scopes():
    minilm = find_branches(load(models_dir / "minilm" / "minilm_l6_v2.onnx"))
    assert [b.name for b in minilm.branches[:2]] == ["m.encoder.layer.0.attention", "m.encoder.layer.0.mlp"]
    kwt1 = find_branches(load(models_dir / "kwt1_speech_commands.onnx"))
    assert [b.name for b in kwt1.branches[:2]] == ["L.0.attention", "L.0.mlp"]
    resnet = find_branches(load(models_dir / "resnet20_cifar10.onnx"))
    assert [b.name for b in resnet.branches[3:5]] == ["layer2.0", "layer2.1"]


@needs_reference
def test_blocks_are_layers():
    minilm = find_branches(load(models_dir / "minilm" / "minilm_l6_v2.onnx"))
    assert [len(b.branches) for b in minilm.blocks] == [2] * 6
    assert {b.run for b in minilm.blocks} == {0}
    assert minilm.blocks[3].name == "m.encoder.layer.3"
    resnet = find_branches(load(models_dir / "resnet56_cifar10.onnx"))
    assert [len(b.branches) for b in resnet.blocks] == [1] * 27


@needs_reference
def test_parameters_of_minilm_branches():
    """Attention: 4 matrices of 384 x 384 with biases; MLP: 384 x 1536 twice, with biases."""
    first, second = find_branches(load(models_dir / "minilm" / "minilm_l6_v2.onnx")).branches[:2]
    assert first.parameters == 4 * (384 * 384 + 384)
    assert second.parameters == 2 * 384 * 1536 + 1536 + 384


@needs_reference
def test_rotary_tables_mask_and_shapes_are_ambient():
    branch = find_branches(load(models_dir / "stories260k.onnx")).branches[1 * 2]
    assert {"slice_1", "slice_2", "slice_4"} <= set(branch.ambient)
    assert branch.skip not in branch.ambient


# -- structures that are branches -----------------------------------------------------------------------


def test_pre_norm_transformer_owns_its_norms():
    net = Net()
    x = tokens(net)
    for i in range(3):
        x = net.op("Add", x, net.attention(net.norm(x, f"l.{i}.n1"), f"l.{i}.attn"))
        x = net.op("Add", net.mlp(net.norm(x, f"l.{i}.n2"), f"l.{i}.mlp"), x)
    result = find_branches(net.program(net.norm(x, "final")))
    assert [b.kind for b in result.branches] == ["attention", "mlp"] * 3
    assert [b.name for b in result.branches[:2]] == ["l.0.attn", "l.0.mlp"]
    assert "l.0.n1.weight" in result.branches[0].weights
    assert "final.weight" not in {w for b in result.branches for w in b.weights}
    assert [b.name for b in result.blocks] == ["l.0", "l.1", "l.2"]


def test_post_norm_transformer_leaves_norms_outside():
    net = Net()
    x = tokens(net)
    for i in range(2):
        x = net.norm(net.op("Add", x, net.attention(x, f"l.{i}.attn")), f"l.{i}.n1")
        x = net.norm(net.op("Add", x, net.mlp(x, f"l.{i}.mlp")), f"l.{i}.n2")
    result = find_branches(net.program(x))
    assert [b.kind for b in result.branches] == ["attention", "mlp"] * 2
    assert not any("n1" in w or "n2" in w for b in result.branches for w in b.weights)


def test_parallel_branches_share_an_ambient_norm():
    """GPT-J: x + (attn(n(x)) + mlp(n(x)))."""
    net = Net()
    x = tokens(net)
    n = net.norm(x, "n")
    x = net.op("Add", net.op("Add", net.attention(n), net.mlp(n)), x)
    branches = find_branches(net.program(net.norm(x))).branches
    assert [b.kind for b in branches] == ["attention", "mlp"]
    assert branches[0].ambient == branches[1].ambient == (n.name,)
    assert {b.joint for b in branches} == {x.producer().name}
    assert not any("n.weight" in b.weights for b in branches)


def test_parallel_branches_chained():
    """(x + attn(n(x))) + mlp(n(x)): the second skip is the first sum."""
    net = Net()
    x = tokens(net)
    n = net.norm(x)
    first = net.op("Add", x, net.attention(n))
    second = net.op("Add", first, net.mlp(n))
    branches = find_branches(net.program(second)).branches
    assert [(b.kind, b.skip, b.joint) for b in branches] == [
        ("attention", x.name, None),
        ("mlp", first.name, None),
    ]


def test_low_rank_adapter_is_part_of_its_branch():
    """x + (W h + B(A h)): what the summands share has weights, so it is one branch."""
    net = Net()
    x = tokens(net)
    h = net.op("Relu", net.linear(net.norm(x)))
    adapter = net.op("MatMul", net.op("MatMul", h, net.weight(WIDTH, 2)), net.weight(2, WIDTH))
    body = net.op("Add", net.op("MatMul", h, net.weight(WIDTH, WIDTH)), adapter)
    branches = find_branches(net.program(net.op("Add", x, body))).branches
    assert [(b.kind, b.skip, b.joint) for b in branches] == [("mlp", x.name, None)]


def test_sandwich_norm_scale_dropout_identity_cast():
    net = Net()
    x = tokens(net)
    body = net.norm(net.mlp(net.norm(x)))
    scaled = net.op("Mul", net.array(np.full(WIDTH, 0.1, np.float32), "gamma"), body)
    body = net.op("Identity", net.op("Dropout", net.op("Cast", scaled, to=1)))
    skip = net.op("Identity", x)
    program = net.program(net.op("Add", skip, body))
    (branch,) = find_branches(program).branches
    assert (branch.kind, branch.shortcut, branch.skip, branch.source) == (
        "mlp",
        "identity",
        skip.name,
        x.name,
    )
    assert "gamma" in branch.weights


def test_resnet_with_identity_and_convolution_shortcuts():
    net = Net()
    x = image(net)
    x = net.op("Relu", net.op("Add", x, net.conv(net.op("Relu", net.conv(x)))))
    body = net.conv(net.op("Relu", net.conv(x, 6, stride=2)), 6, 6)
    shortcut = net.conv(x, 6, stride=2, kernel=1)
    x = net.op("Relu", net.op("Add", body, shortcut))
    first, second = find_branches(net.program(x)).branches
    assert (first.shortcut, second.shortcut) == ("identity", "projection")
    assert second.skip == shortcut.name
    assert len(second.nodes) == 5
    assert second.source in second.ambient


def test_preactivation_resnet_projection_shares_the_activation():
    net = Net()
    x = image(net)
    h = net.op("Relu", net.conv(x))
    out = net.op("Add", net.conv(h, kernel=1), net.conv(net.op("Relu", net.conv(h))))
    (branch,) = find_branches(net.program(out)).branches
    assert (branch.kind, branch.shortcut, branch.source) == ("conv", "projection", h.name)


def test_squeeze_and_excitation_stays_inside_the_branch():
    net = Net()
    x = image(net)
    h = net.op("Relu", net.conv(x))
    gate = net.op("GlobalAveragePool", h)
    gate = net.op("Sigmoid", net.op("Conv", gate, net.weight(4, 4, 1, 1)))
    out = net.op("Add", x, net.conv(net.op("Mul", h, gate)))
    (branch,) = find_branches(net.program(out)).branches
    assert branch.kind == "conv"
    assert len(branch.nodes) == 9


def test_nested_branches_have_parents():
    net = Net()
    x = image(net)
    h = net.conv(x)
    inner = []
    for _ in range(2):
        h = net.op("Add", h, net.conv(net.op("Relu", net.conv(h))))
        inner.append(h.producer().name)
    out = net.op("Add", x, net.conv(h))
    branches = find_branches(net.program(out)).branches
    outer = branches[-1]
    assert [b.parent for b in branches] == [outer.name, outer.name, None]
    assert set(inner) <= set(outer.nodes)
    assert set(branches[0].nodes) < set(outer.nodes)


def test_recurrent_branch():
    net = Net()
    x = net.input("x", ["seq", "batch", WIDTH])
    w, r = net.weight(1, 3 * WIDTH, WIDTH), net.weight(1, 3 * WIDTH, WIDTH)
    y, _ = net.op("GRU", x, w, r, outputs=2, hidden_size=WIDTH)
    out = net.op("Add", x, net.op("Squeeze", y, net.ints(1)))
    assert kinds(net.program(out)) == ["recurrent"]


def test_two_operand_sum_is_an_add():
    net = Net()
    x = tokens(net)
    assert kinds(net.program(net.op("Sum", x, net.mlp(net.norm(x))))) == ["mlp"]


def test_encoder_decoder_with_cross_attention():
    net = Net()
    source = net.input("source", ["batch", "src", WIDTH])
    memory = source
    for i in range(2):
        memory = net.op("Add", memory, net.attention(net.norm(memory), f"enc.{i}.attn"))
        memory = net.op("Add", memory, net.mlp(net.norm(memory), f"enc.{i}.mlp"))
    memory = net.norm(memory)
    x = net.input("target", ["batch", "tgt", WIDTH])
    for i in range(2):
        x = net.op("Add", x, net.attention(net.norm(x), f"dec.{i}.self"))
        x = net.op("Add", x, net.attention(net.norm(x), f"dec.{i}.cross", context=memory))
        x = net.op("Add", x, net.mlp(net.norm(x), f"dec.{i}.mlp"))
    result = find_branches(net.program(x))
    decoder = ["attention", "attention", "mlp"]
    assert [b.kind for b in result.branches] == ["attention", "mlp"] * 2 + decoder * 2
    assert all(b.parent is None for b in result.branches)
    cross = result.named("dec.0.cross")
    assert memory.name in cross.ambient
    assert "dec.0.cross.k.weight" in cross.weights
    assert [len(b.branches) for b in result.blocks] == [2, 2, 3, 3]


def decoder(layers: int = 2, past: bool = True) -> Program:
    """A decoder whose keys and values come from and go to the interface."""
    net = Net()
    x = tokens(net)
    mask = net.input("mask", ["batch", 1, "seq", "all"])
    shown: list[ir.Value] = []
    for i in range(layers):

        def cache(value: ir.Value, what: str, layer: int = i) -> ir.Value:
            if past:
                shape = ["batch", HEADS, "past", WIDTH // HEADS]
                before = net.input(f"past.{layer}.{what}", shape)
                value = net.op("Concat", before, value, axis=2)
            shown.append(net.op("Identity", value) if what == "key" else value)
            shown[-1].name = f"present.{layer}.{what}"
            return value

        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn", mask=mask, cache=cache))
        x = net.op("Add", x, net.mlp(net.norm(x), f"l.{i}.mlp"))
    return net.program(net.norm(x), *shown)


@pytest.mark.parametrize("past", [True, False])
def test_cached_attention_owns_its_state(past):
    result = find_branches(decoder(past=past))
    assert [b.kind for b in result.branches] == ["attention", "mlp"] * 2
    attention = result.named("l.1.attn")
    assert attention.cache_outputs == ("present.1.key", "present.1.value")
    assert attention.cache_inputs == (("past.1.key", "past.1.value") if past else ())
    assert attention.ambient == (("past.1.key", "past.1.value", "mask") if past else ("mask",))
    assert "node_identity_1" in attention.nodes


def test_state_shared_by_two_branches_belongs_to_neither():
    """One state tensor is updated by two branches in turn: neither may take it off the interface."""
    net = Net()
    x = tokens(net)
    state = net.input("state_cache", [2, "batch", "seq", WIDTH])
    for i in range(2):
        h = net.linear(net.norm(x), name=f"l.{i}.fc")
        old = net.op("Gather", state, net.array(np.array(i, np.int64)), axis=0)
        h = net.op("Tanh", net.op("Add", h, old))
        state = net.op(
            "ScatterND", state, net.array(np.array([[i]], np.int64)), net.op("Unsqueeze", h, net.ints(0))
        )
        x = net.op("Add", x, net.linear(h, name=f"l.{i}.out"))
    state.name = "state_cache_out"
    result = find_branches(net.program(x, state))
    assert not any(b.cache_outputs or b.cache_inputs for b in result.branches)


def fused(norm: str = "SkipLayerNormalization", post: bool = False) -> Program:
    """Attention and MLP whose Adds ONNX Runtime fused with the next normalization."""
    net = Net()
    x = tokens(net)
    h = net.norm(x)
    stream = h if post else x
    for i in range(2):
        for body in (net.attention, net.mlp):
            weights = [net.weight(WIDTH)] + ([net.weight(WIDTH)] if norm == "SkipLayerNormalization" else [])
            bias = [net.weight(WIDTH)]
            out = body(h, f"l.{i}.{body.__name__}")
            made = net.op(
                norm, out, stream, *weights, *bias, outputs=1 if post else 4, domain="com.microsoft"
            )
            h, stream = (made, made) if post else (made[0], made[3])
            if not post:
                made[1].name = made[2].name = ""
    return net.program(h)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("norm", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_fused_add_and_normalization(norm, post):
    assert kinds(fused(norm, post)) == ["attention", "mlp"] * 2


# -- structures that only look like one -----------------------------------------------------------------


def no_branch(net: Net, out: ir.Value) -> bool:
    return not find_branches(net.program(out)).branches


def test_gelu_bias_and_positions_are_not_branches():
    net = Net()
    x = net.op("Add", tokens(net), net.weight(1, 1, WIDTH, name="positions"))
    assert no_branch(net, net.mlp(net.gelu(x)))


def test_rotary_embedding_is_not_a_branch():
    net = Net()
    x = net.linear(tokens(net))
    low, high = net.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned = net.op("Concat", net.op("Neg", high), low, axis=-1)
    cos, sin = net.weight(WIDTH), net.weight(WIDTH)
    assert no_branch(net, net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin)))


def test_gates_are_not_branches():
    net = Net()
    x = tokens(net)
    silu = net.op("Mul", x, net.op("Sigmoid", net.linear(x)))
    assert no_branch(net, net.op("Mul", silu, net.linear(x)))


def test_mask_of_the_shape_of_the_scores_is_not_a_skip():
    """The mask of layer 2 is an ancestor of its scores, through all of layer 1."""
    net = Net()
    x = tokens(net)
    mask = net.input("mask", ["batch", HEADS, "seq", "seq"])
    for _ in range(3):
        x = net.op("Add", x, net.attention(net.norm(x), mask=mask))
    branches = find_branches(net.program(x)).branches
    assert [b.kind for b in branches] == ["attention"] * 3
    assert mask.name not in {b.skip for b in branches}


def test_positions_added_again_after_a_projection_are_not_a_skip():
    """The positions reach the projection through the residual stream, past other branches: not a shortcut."""
    net = Net()
    positions = net.input("positions", ["batch", "seq", WIDTH])
    x = net.op("Add", tokens(net), positions)
    x = net.op("Add", x, net.mlp(net.norm(x)))
    x = net.op("Add", x, net.op("Relu", net.op("Add", net.linear(net.norm(x)), positions)))
    branches = find_branches(net.program(x)).branches
    assert positions.name not in {b.skip for b in branches}
    assert [b.parent for b in branches] == [None, None]


def test_mixture_of_experts_is_one_branch():
    """The experts are summed, but share a router with weights."""
    net = Net()
    x = tokens(net)
    n = net.norm(x)
    gates = net.op("Split", net.op("Softmax", net.linear(n, 2), axis=-1), outputs=2, axis=-1, num_outputs=2)
    experts = [net.op("Mul", gate, net.mlp(n)) for gate in gates]
    (branch,) = find_branches(net.program(net.op("Add", x, net.op("Add", *experts)))).branches
    assert (branch.joint, branch.skip, branch.kind) == (None, x.name, "mlp")


def test_tables_cut_to_length_are_ambient_in_a_single_layer():
    """Nobody else reads them, yet they do not depend on what the branch computes."""
    net = Net()
    x = tokens(net)
    length = net.op("Shape", x, start=1, end=2)
    table = net.array(np.zeros((9, 9), np.float32), "table")
    rows = net.op("Slice", table, net.ints(0), length, net.ints(0))
    mask = net.op("Slice", rows, net.ints(0), length, net.ints(1))
    out = net.op("Add", x, net.attention(net.norm(x), mask=mask))
    (branch,) = find_branches(net.program(out)).branches
    assert mask.name in branch.ambient
    assert not any("slice" in n or "shape" in n.split("_")[1:] for n in branch.nodes)


def test_two_linear_paths_are_not_a_projection():
    """W x + V x has neither a body nor a shortcut; a re-parameterizable pair of convolutions likewise."""
    net = Net()
    x = tokens(net)
    assert no_branch(net, net.op("Add", net.linear(x), net.linear(x)))
    net = Net()
    x = image(net)
    assert no_branch(net, net.op("Add", net.conv(x), net.conv(x, kernel=1)))


def test_feature_pyramid_lateral_is_not_a_branch():
    net = Net()
    fine = net.op("Relu", net.conv(image(net)))
    coarse = net.op("Relu", net.conv(fine, stride=2))
    net.op("Relu", coarse)
    scales = net.array(np.array([1, 1, 2, 2], np.float32))
    up = net.op("Resize", coarse, None, scales, mode="nearest")
    assert no_branch(net, net.op("Add", net.conv(fine, kernel=1), up))


def test_body_read_elsewhere_is_refused_by_name():
    net = Net()
    x = tokens(net)
    body = net.mlp(x)
    result = find_branches(net.program(net.op("Add", x, body), net.op("Relu", body)))
    assert not result.branches
    (near,) = result.refusals
    assert near.reason == f"value '{body.name}' escapes the branch: 'node_relu' reads it too"


def test_inner_value_on_the_interface_is_refused_by_name():
    net = Net()
    x = tokens(net)
    hidden = net.op("Relu", net.linear(x))
    result = find_branches(net.program(net.op("Add", x, net.linear(hidden)), hidden))
    assert not result.branches
    (near,) = result.refusals
    assert near.reason == f"value '{hidden.name}' escapes the branch: it is an output of the model"


def test_shown_attention_weights_are_not_members():
    """They escape, with the query and key paths; the value path still is a branch that can go."""
    net = Net()
    x = tokens(net)
    shown: list[ir.Value] = []
    out = net.op("Add", x, net.attention(net.norm(x), "attn", show=shown))
    (branch,) = find_branches(net.program(out, *shown)).branches
    assert branch.kind == "attention"
    assert shown[0].name in branch.ambient
    assert {"attn.v.weight", "attn.o.weight"} <= set(branch.weights)
    assert not any(w.startswith(("attn.q", "attn.k")) for w in branch.weights)


def test_broadcast_skip_is_refused():
    net = Net()
    x = net.input("x", [1, 1, WIDTH])
    other = net.input("y", [3, 5, WIDTH])
    body = net.op("Mul", net.mlp(x), other)
    result = find_branches(net.program(net.op("Add", x, body)))
    assert not result.branches
    assert [n.reason for n in result.refusals] == ["the skip 'x' has another shape than the sum"]


# -- the whole ------------------------------------------------------------------------------------------


def test_reads_only_and_deterministic():
    program = decoder()
    before = text_of(program)
    assert find_branches(program) == find_branches(program)
    assert text_of(program) == before


def test_members_nest_and_never_overlap_partly():
    for program in (decoder(), fused()):
        sets = [set(b.nodes) | {b.add} for b in find_branches(program).branches]
        assert all(a <= b or b <= a or not a & b for a in sets for b in sets)


def test_subgraph_captures_count_as_reads():
    """An If that reads a value of the body keeps it from being a member."""
    net = Net()
    x = tokens(net)
    hidden = net.op("Relu", net.linear(x))
    inner = ir.node("Neg", [hidden], name="inner")
    inner.outputs[0].name = "inner_out"
    other = ir.node("Abs", [hidden], name="other")
    other.outputs[0].name = "other_out"
    condition = net.input("condition", [], ir.DataType.BOOL)
    branches = [ir.Graph([], n.outputs, nodes=[n], name=n.name) for n in (inner, other)]
    chosen = net.op("If", condition, then_branch=branches[0], else_branch=branches[1])
    result = find_branches(net.program(net.op("Add", x, net.linear(hidden)), chosen))
    assert not result.branches
    assert "escapes the branch: 'node_if' reads it too" in result.refusals[0].reason


def test_repeating_runs():
    assert repeating_runs("amamam") == [(0, 2, 3)]
    assert repeating_runs("amamaxmaxm") == [(0, 2, 2), (4, 3, 2)]
    assert repeating_runs("abc") == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert repeating_runs("ccccc") == [(0, 1, 5)]
    assert repeating_runs("") == []


def deep(blocks: int, width: int = 2) -> Program:
    """Pre-norm attention with a shared mask and a gated MLP: 20 nodes a block."""
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    tensor = np.ones((width, width), np.float32)

    def value(name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["b", "t", width]), type=ir.TensorType(ir.DataType.FLOAT))

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(op_type, list(inputs), name=f"n{len(nodes)}")
        node.outputs[0].name = f"v{len(nodes)}"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(["b", "t", width]), x.type
        nodes.append(node)
        return node.outputs[0]

    def linear(v: ir.Value) -> ir.Value:
        w = ir.Value(name=f"w{len(weights)}", const_value=ir.Tensor(tensor, name=f"w{len(weights)}"))
        weights.append(w)
        return op("MatMul", v, w)

    x, mask = value("x"), value("mask")
    h = x
    for _ in range(blocks):
        n = op("Softplus", h)
        scores = op("Add", op("MatMul", linear(n), op("Transpose", linear(n))), mask)
        h = op("Add", h, linear(op("MatMul", op("Softmax", scores), linear(n))))
        u = linear(op("Softplus", h))
        cube = op("Mul", op("Mul", u, u), u)
        h = op("Add", h, linear(op("Mul", u, op("Tanh", op("Add", u, cube)))))
    graph = ir.Graph([x, mask], [h], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="deep")
    return Program(ir.Model(graph, ir_version=9))


def steps(program: Program) -> int:
    view = GraphView(program.graph)
    Search(view).run()
    return view.steps


def test_cost_is_linear_in_depth():
    """Steps of all walks, not seconds: the same per block at 50 and at 800 blocks."""
    assert steps(deep(800)) <= 16 * steps(deep(50)) * 1.01


def test_a_hundred_thousand_nodes():
    program = deep(5000)
    assert len(program.graph) == 100_000
    result = find_branches(program)
    assert len(result.branches) == 10_000
    assert len(result.blocks) == 5000


def test_entangled_graph_stays_linear():
    """Every block starts from the input again, so each region is the whole prefix: refused, not quadratic."""
    net = Net()
    x = tokens(net)
    h = x
    for _ in range(500):
        h = net.op("Add", x, net.op("Relu", net.op("MatMul", h, net.weight(WIDTH, WIDTH))))
    graph = ir.Graph(
        net.inputs, [h], nodes=net.nodes, initializers=net.initializers, opset_imports={"": 18}, name="long"
    )
    program = Program(ir.Model(graph, ir_version=9))
    result = find_branches(program)
    assert result.branches
    assert {n.reason for n in result.refusals} == {"what it sums is too entangled to examine in linear time"}
    assert steps(program) <= 500 * 2 * 256 + 100_000 + 1500
